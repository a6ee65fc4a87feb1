"""High-throughput operations between processes against the global view, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepep.reference import high_throughput as oracle
from deepep.reference.layout import dispatch_layout
from deepep.reference.wire import Wire
from deepep.sim import World

Draw = Callable[[int, int, str], tuple[int, list[Tensor]]]
SameBits = Callable[[Tensor, Tensor], bool]
WireOf = Callable[[Any, tuple[int, ...]], Wire | None]

FLOAT8 = torch.float8_e4m3fn


@dataclass
class Call:
    """A rank's part of a case: a dispatch, a cached dispatch of other rows, a combine. FP8 comes as bytes."""

    num_experts: int
    members: tuple[int, ...]
    members_at_combine: tuple[int, ...]
    is_token_in_rank: Tensor
    num_tokens_per_expert: Tensor | None
    x: Tensor
    is_float8: bool
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    worst: int
    again: Tensor  # [T, H]: for the cached dispatch
    returned: Tensor  # [N, H]: what the rank's experts make of its rows
    returned_weights: Tensor | None  # [N, K]
    biases: tuple[Tensor, ...]

    def on(self, device: torch.device) -> Call:
        """The same with its tensors on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, biases=tuple(bias.to(device) for bias in self.biases))

    def rows(self) -> Tensor:
        return self.x.view(FLOAT8) if self.is_float8 else self.x


def on_a_rank(ctx: Any, wire_of: WireOf, calls: list[Call]) -> list[dict[str, Any] | None]:
    """Runs in a rank's process. None where the rank is masked."""
    from deepep.reference import all_to_all

    results: list[dict[str, Any] | None] = []
    for call in (call.on(ctx.device) for call in calls):
        wire, wire_at_combine = wire_of(ctx, call.members), wire_of(ctx, call.members_at_combine)
        if wire is None:
            results.append(None)
            continue
        plan = all_to_all.exchange_counts(wire, call.is_token_in_rank, call.num_tokens_per_expert)
        given: dict[str, Any] = {
            "scales": call.scales,
            "topk_idx": call.topk_idx,
            "topk_weights": call.topk_weights,
        }
        out = None
        if call.worst:
            out = all_to_all.allocate(plan, call.rows(), num_worst_tokens=call.worst, **given)
        got = all_to_all.dispatch(wire, plan, call.rows(), num_experts=call.num_experts, out=out, **given)
        result = {
            "x": got.x.view(torch.uint8) if call.is_float8 else got.x,
            "scales": got.scales,
            "topk_idx": got.topk_idx,
            "topk_weights": got.topk_weights,
            "N": plan.num_recv_tokens,
            "src_rank": plan.src_rank,
            "src_token": plan.src_token.clone(),
            "per_expert": plan.num_recv_tokens_per_expert,
            "counts": plan.counts,
        }
        restored = all_to_all.restore_plan(ctx.rank, call.is_token_in_rank, plan.counts)
        cached = all_to_all.dispatch(wire, restored, call.again)
        result["again"] = cached.x
        result["restored_src_token"] = restored.src_token
        if wire_at_combine is not None:
            before = [bias.double().cpu().numpy().tobytes() for bias in call.biases]
            combined = all_to_all.combine(
                wire_at_combine,
                plan,
                call.returned,
                topk_weights=call.returned_weights,
                biases=call.biases,
            )
            after = [bias.double().cpu().numpy().tobytes() for bias in call.biases]
            assert before == after, "biases were written to"
            result["combined"], result["combined_weights"] = combined.x, combined.topk_weights
        results.append({k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()})
    return results


def any_bits(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """bfloat16 of any bits: NaNs, infinities, subnormals and negative zeros among them."""
    bits = rng.integers(-(1 << 15), 1 << 15, shape, dtype=np.int16)
    bits[rng.random(shape) < 0.1] = -(1 << 15)
    return torch.from_numpy(bits).view(torch.bfloat16)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Finite numbers of magnitudes far apart, so that the order of a sum shows."""
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)
    return torch.from_numpy(values).to(dtype)


def make_scales(rng: np.random.Generator, num_tokens: int) -> Tensor:
    """[T, P] float32 or int32 in one of the layouts that callers have."""
    width = int(rng.integers(1, 4))
    raw = rng.integers(-(1 << 31), 1 << 31, (num_tokens, width), dtype=np.int32)
    scales = torch.from_numpy(raw)
    if rng.random() < 0.5:
        scales = scales.view(torch.float32)  # any bits, NaNs too
    layout = rng.integers(3)
    if layout == 0:
        return scales
    if layout == 1:
        return scales.t().contiguous().t()  # column-major
    wide = scales.new_zeros(num_tokens, 2 * width + 1)
    wide[:, 1::2] = scales
    return wide[:, 1::2]


def make_case(seed: int, num_ranks: int, pattern: str, draw_routing: Draw) -> list[Call]:
    """One case, as each rank's part of it."""
    rng = np.random.default_rng([seed, num_ranks])
    num_experts, topk = draw_routing(seed, num_ranks, pattern)
    hidden = int(rng.choice([1, 4, 7, 16]))
    members = members_at_combine = tuple(range(num_ranks))
    if num_ranks > 1 and rng.random() < 0.2:
        members_at_combine = tuple(r for r in range(num_ranks) if r != num_ranks // 2)
        members = members_at_combine if rng.random() < 0.5 else members
    is_float8 = rng.random() < 0.3
    with_topk = rng.random() < 0.7
    with_counts = rng.random() < 0.8
    idx_dtype = torch.int32 if rng.random() < 0.5 else torch.int64
    combine_dtype = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float64][rng.integers(4)]
    num_biases = int(rng.integers(3))
    layouts = [dispatch_layout(idx, num_experts, num_ranks) for idx in topk]
    tables = [layout.is_token_in_rank for layout in layouts]
    received = [
        sum(int(tables[s][:, r].sum()) for s in members) if r in members else 0 for r in range(num_ranks)
    ]
    worst = [0, max(received), max(received) + 3][rng.integers(3)] if with_topk else 0

    def sums(shape: tuple[int, ...]) -> Tensor:
        if combine_dtype == torch.bfloat16:
            return any_bits(rng, shape)
        return numbers(rng, shape, combine_dtype)

    calls = []
    for rank in range(num_ranks):
        num_tokens = topk[rank].shape[0]
        x = any_bits(rng, (num_tokens, hidden))
        if is_float8:
            x = torch.from_numpy(rng.integers(0, 256, (num_tokens, hidden), dtype=np.uint8))
        calls.append(
            Call(
                num_experts=num_experts,
                members=members,
                members_at_combine=members_at_combine,
                is_token_in_rank=tables[rank],
                num_tokens_per_expert=layouts[rank].num_tokens_per_expert if with_counts else None,
                x=x,
                is_float8=is_float8,
                scales=None,
                topk_idx=topk[rank].to(idx_dtype) if with_topk else None,
                topk_weights=numbers(rng, tuple(topk[rank].shape), torch.float32) if with_topk else None,
                worst=worst,
                again=numbers(rng, (num_tokens, 3), torch.float32),
                returned=sums((received[rank] + (2 if worst else 0), hidden)),
                returned_weights=None,
                biases=tuple(sums((num_tokens, hidden)) for _ in range(num_biases)),
            )
        )
        if with_topk:
            rows = calls[-1].returned.shape[0]
            calls[-1].returned_weights = numbers(rng, (rows, topk[rank].shape[1]), torch.float32)
    if is_float8 or rng.random() < 0.2:
        scales = make_scales(rng, sum(idx.shape[0] for idx in topk))
        for call, part in zip(calls, scales.split([idx.shape[0] for idx in topk]), strict=True):
            call.scales = part
    return calls


def check(calls: list[Call], results: list[dict[str, Any] | None], same_bits: SameBits) -> None:
    """Compares what the ranks got with what the oracle says."""
    num_ranks = len(calls)
    masked = set(range(num_ranks)) - set(calls[0].members)
    masked_at_combine = set(range(num_ranks)) - set(calls[0].members_at_combine)
    tables = [call.is_token_in_rank for call in calls]
    want = oracle.dispatch(
        [
            oracle.DispatchInput(
                x=call.rows(),
                is_token_in_rank=call.is_token_in_rank,
                scales=call.scales,
                topk_idx=call.topk_idx,
                topk_weights=call.topk_weights,
                num_tokens_per_expert=call.num_tokens_per_expert,
            )
            for call in calls
        ],
        calls[0].num_experts,
        masked=masked,
    )
    again = oracle.dispatch(
        [oracle.DispatchInput(x=call.again, is_token_in_rank=call.is_token_in_rank) for call in calls],
        calls[0].num_experts,
        masked=masked,
    )
    weights = [call.returned_weights for call in calls if call.returned_weights is not None]
    combined = oracle.combine(
        [call.returned for call in calls],
        tables,
        topk_weights=weights or None,
        biases=[call.biases for call in calls],
        masked=masked_at_combine,
        masked_at_dispatch=masked,
    )
    for rank, (call, got) in enumerate(zip(calls, results, strict=True)):
        assert (got is None) == (rank in masked)
        if got is None:
            continue
        rows = want[rank].recv_x.shape[0]
        assert got["N"] == rows
        assert got["x"].shape[0] == (call.worst or rows)
        got_x = got["x"].view(FLOAT8) if call.is_float8 else got["x"]
        assert same_bits(got_x[:rows], want[rank].recv_x)
        for name in ("scales", "topk_idx", "topk_weights"):
            expected = getattr(want[rank], f"recv_{name}")
            assert (got[name] is None) == (expected is None)
            if expected is not None:
                assert same_bits(got[name][:rows], expected), name
        if got["topk_idx"] is not None:
            assert (got["topk_idx"][rows:] == -1).all()
        assert got["scales"] is None or got["scales"].is_contiguous()
        assert torch.equal(got["src_rank"], want[rank].src_rank)
        assert torch.equal(got["src_token"], want[rank].src_token)
        assert torch.equal(got["restored_src_token"], want[rank].src_token)
        assert got["per_expert"] == want[rank].num_recv_tokens_per_expert
        alive = [[s not in masked and r not in masked for r in range(num_ranks)] for s in range(num_ranks)]
        assert got["counts"] == [
            [int(table[:, r].sum()) * alive[s][r] for r in range(num_ranks)] for s, table in enumerate(tables)
        ]
        assert same_bits(got["again"], again[rank].recv_x)
        if rank in masked_at_combine:
            assert "combined" not in got
            continue
        assert same_bits(got["combined"], combined[rank].x)
        expected = combined[rank].topk_weights
        assert (got["combined_weights"] is None) == (expected is None)
        assert expected is None or same_bits(got["combined_weights"], expected)


def run_batches(
    world: World,
    batches: int,
    draw_routing: Draw,
    patterns: tuple[str, ...],
    same_bits: SameBits,
    wire_of: WireOf,
) -> None:
    """An example is a batch: a case of every routing pattern, in one round trip. Seeds cannot be shrunk."""

    @settings(max_examples=batches, deadline=None, phases=[Phase.reuse, Phase.generate])
    @given(st.integers(0, 2**32 - 1))
    def batch(seed: int) -> None:
        cases = [make_case(seed, world.num_ranks, pattern, draw_routing) for pattern in patterns]
        by_rank = [([case[rank] for case in cases],) for rank in range(world.num_ranks)]
        results = world.run(on_a_rank, wire_of, per_rank=by_rank)
        for number, (pattern, case) in enumerate(zip(patterns, cases, strict=True)):
            try:
                check(case, [result[number] for result in results], same_bits)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, pattern {pattern!r}: {error}") from error

    batch()


@pytest.mark.parametrize(("num_ranks", "batches"), [(1, 6), (2, 10), (3, 10), (4, 10), (8, 6)])
def test_agrees_with_the_global_view(
    num_ranks: int,
    batches: int,
    world_of: Callable[[int], World],
    draw_routing: Draw,
    patterns: tuple[str, ...],
    same_bits: SameBits,
    wire_of: WireOf,
) -> None:
    run_batches(world_of(num_ranks), batches, draw_routing, patterns, same_bits, wire_of)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_agrees_over_nccl(
    num_ranks: int, draw_routing: Draw, patterns: tuple[str, ...], same_bits: SameBits, wire_of: WireOf
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with World(num_ranks, backend="nccl") as world:
        run_batches(world, 5, draw_routing, patterns, same_bits, wire_of)


def refusals(ctx: Any) -> list[str]:
    """Refusals of malformed arguments by dispatch and combine; a rank alone, nothing is sent."""
    from deepep.reference import all_to_all
    from deepep.reference.wire import Wire

    wire = Wire.whole(ctx.group)
    routed = torch.ones(2, 1, dtype=torch.bool)
    plan = all_to_all.exchange_counts(wire, routed)
    x, idx, weights = torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    small = all_to_all.DispatchTensors(x[:1])
    attempts: list[Callable[[], object]] = [
        lambda: all_to_all.exchange_counts(wire, routed.int()),
        lambda: all_to_all.exchange_counts(wire, torch.ones(2, 2, dtype=torch.bool)),
        lambda: all_to_all.dispatch(wire, plan, x[:1]),
        lambda: all_to_all.dispatch(wire, plan, x, scales=torch.ones(3, 1)),
        lambda: all_to_all.dispatch(wire, plan, x, topk_idx=idx, num_experts=1),
        lambda: all_to_all.dispatch(wire, plan, x, topk_idx=idx, topk_weights=weights),
        lambda: all_to_all.dispatch(wire, plan, x, out=small),
        lambda: all_to_all.combine(wire, plan, x[:1]),
        lambda: all_to_all.combine(wire, plan, x.half()),
        lambda: all_to_all.combine(wire, plan, x, topk_weights=weights[:1]),
        lambda: all_to_all.combine(wire, plan, x, biases=[x[:1]]),
        lambda: all_to_all.combine(wire, plan, x, biases=[x, x, x]),
    ]
    said = []
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("nothing")
    return said


def test_refuses(world_of: Callable[[int], World]) -> None:
    names = ["is_token_in_rank"] * 2 + ["x", "scales", "topk_weights", "num_experts", "out"]
    names += ["x", "x", "topk_weights", "bias", "biases"]
    said = world_of(1).run(refusals)[0]
    assert [sentence.split(":")[0] for sentence in said] == names


def cached_after_mask(ctx: Any, wire_of: WireOf) -> str:
    from deepep.reference import all_to_all

    everyone, alone = wire_of(ctx, (0, 1)), [wire_of(ctx, (0,)), wire_of(ctx, (1,))][ctx.rank]
    assert everyone is not None
    assert alone is not None
    plan = all_to_all.exchange_counts(everyone, torch.ones(1, 2, dtype=torch.bool))
    try:
        all_to_all.dispatch(alone, plan, torch.ones(1, 4))
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_plan_with_rows_of_a_masked_rank_dispatches_no_more(
    world_of: Callable[[int], World], wire_of: WireOf
) -> None:
    assert all("masked" in said for said in world_of(2).run(cached_after_mask, wire_of))
