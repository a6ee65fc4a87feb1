"""Low-latency operations between processes against the global view, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepep.reference import low_latency as oracle
from deepep.reference.wire import Wire
from deepep.sim import World

Draw = Callable[[int, int, str], tuple[int, list[Tensor]]]
SameBits = Callable[[Tensor, Tensor], bool]
WireOf = Callable[[Any, tuple[int, ...]], Wire | None]


@dataclass
class Call:
    """A rank's part of a case: a dispatch and a combine."""

    num_max_tokens: int
    num_experts: int
    members: tuple[int, ...]
    members_at_combine: tuple[int, ...]
    x: Tensor  # [T, H] bfloat16
    topk_idx: Tensor
    topk_weights: Tensor
    format: dict[str, bool]
    logfmt: bool
    reduce: Literal["token", "rank"]
    into_given: bool  # outputs allocated by the caller
    seed: int  # of what the rank's experts return

    def on(self, device: torch.device) -> Call:
        """The same with its tensors on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def bf16_rows(seed: list[int], shape: tuple[int, ...]) -> Tensor:
    """bfloat16 of a character that differs by row: below 1, around 1, far apart, any bits, zeros."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, (int(np.prod(shape[:-1])), shape[-1]), dtype=np.uint16)
    exponent = bits >> 7 & 0xFF
    kind = rng.integers(10, size=(bits.shape[0], 1))
    exponent = np.where(kind < 4, 120 + exponent % 7, exponent)
    exponent = np.where((kind >= 4) & (kind < 6), 124 + exponent % 6, exponent)
    exponent = np.where((kind >= 6) & (kind < 8), 87 + exponent % 52, exponent)
    bits = bits & 0x807F | exponent.astype(np.uint16) << 7
    bits[(kind == 9).squeeze(1)] = 0
    bits[bits % 61 == 7] = 0x8000
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).view(shape)


def returned(call: Call, rank: int, num_ranks: int) -> Tensor:
    """[L, R*M, H]: what the experts of a rank make of their rows, and of the room past them."""
    room = num_ranks * call.num_max_tokens
    shape = (call.num_experts // num_ranks, room, call.x.shape[1])
    return bf16_rows([call.seed, rank], shape)


def on_a_rank(ctx: Any, wire_of: WireOf, calls: list[Call]) -> list[dict[str, Any] | None]:
    """Runs in a rank's process. None where the rank is masked."""
    from deepep.reference import all_to_all_low_latency as low_latency

    results: list[dict[str, Any] | None] = []
    for call in (call.on(ctx.device) for call in calls):
        wire, wire_at_combine = wire_of(ctx, call.members), wire_of(ctx, call.members_at_combine)
        if wire is None:
            results.append(None)
            continue
        underway = low_latency.start_dispatch(
            wire, call.x, call.topk_idx, call.num_max_tokens, call.num_experts, **call.format
        )
        out = combined_out = None
        if call.into_given:
            out = low_latency.allocate(
                ctx.num_ranks,
                call.num_max_tokens,
                call.num_experts,
                call.x.shape[1],
                fp8=call.format["fp8"],
                ue8m0=call.format["ue8m0"],
                device=ctx.device,
            )
            out.recv_x.view(torch.uint8).fill_(0xAB)
            combined_out = torch.full_like(call.x, 7.0)
        got = underway.finish(out)
        assert not call.into_given or got is out
        counts = got.recv_count.tolist()

        def real(padded: Tensor, counts: list[int] = counts) -> list[Tensor]:
            return [padded[expert, :count] for expert, count in enumerate(counts)]

        result: dict[str, Any] = {
            "x": torch.cat(real(got.recv_x.view(torch.uint8))),
            "scales": None if got.recv_scales is None else torch.cat(real(got.recv_scales)),
            "scale_strides": None if got.recv_scales is None else got.recv_scales.stride(),
            "dtype": got.recv_x.dtype,
            "shape": got.recv_x.shape,
            "count": got.recv_count,
            "src_info": got.recv_src_info,
            "range": got.layout_range,
        }
        if wire_at_combine is not None:
            combined = low_latency.start_combine(
                wire_at_combine,
                returned(call, ctx.rank, ctx.num_ranks).to(ctx.device),
                call.topk_idx,
                call.topk_weights,
                got.recv_src_info,
                got.layout_range,
                num_max_tokens=call.num_max_tokens,
                num_experts=call.num_experts,
                logfmt=call.logfmt,
                reduce=call.reduce,
                ranks_per_domain=2,
            ).finish(combined_out)
            assert not call.into_given or combined is combined_out
            result["combined"] = combined
        results.append({k: v.cpu() if isinstance(v, Tensor) else v for k, v in result.items()})
    return results


FORMATS = [
    {"fp8": False, "round_scale": False, "ue8m0": False},
    {"fp8": True, "round_scale": False, "ue8m0": False},
    {"fp8": True, "round_scale": True, "ue8m0": False},
    {"fp8": True, "round_scale": True, "ue8m0": True},
]


def make_case(seed: int, num_ranks: int, pattern: str, draw_routing: Draw) -> list[Call]:
    """One case, as each rank's part of it."""
    rng = np.random.default_rng([seed, num_ranks])
    num_experts, topk = draw_routing(seed, num_ranks, pattern)
    format = FORMATS[rng.integers(4)]
    widths = [512] if format["ue8m0"] else [128, 256, 512, 640]
    hidden = int(rng.choice([*widths, 1024] if num_ranks < 8 else widths[:2]))
    members = members_at_combine = tuple(range(num_ranks))
    if num_ranks > 1 and rng.random() < 0.25:
        members_at_combine = tuple(r for r in range(num_ranks) if r != num_ranks // 2)
        members = members_at_combine if rng.random() < 0.5 else members
    common: dict[str, Any] = {
        "num_max_tokens": max(1, *(idx.shape[0] for idx in topk), 1) + int(rng.integers(3)),
        "num_experts": num_experts,
        "members": members,
        "members_at_combine": members_at_combine,
        "format": format,
        "logfmt": bool(rng.random() < 0.4),
        "reduce": str(rng.choice(["rank", "token", "domain"])),
        "into_given": bool(rng.random() < 0.5),
        "seed": seed,
    }
    if common["reduce"] == "domain":
        common["logfmt"] = False
    idx_dtype = torch.int32 if rng.random() < 0.5 else torch.int64
    return [
        Call(
            x=bf16_rows([seed, rank, 1], (idx.shape[0], hidden)),
            topk_idx=idx.to(idx_dtype),
            topk_weights=torch.from_numpy(rng.standard_normal(tuple(idx.shape)).astype(np.float32)),
            **common,
        )
        for rank, idx in enumerate(topk)
    ]


def check(calls: list[Call], results: list[dict[str, Any] | None], same_bits: SameBits) -> None:
    """Compares what the ranks got with what the oracle says."""
    first, num_ranks = calls[0], len(calls)
    masked = set(range(num_ranks)) - set(first.members)
    masked_at_combine = set(range(num_ranks)) - set(first.members_at_combine)
    indices = [call.topk_idx for call in calls]
    want = oracle.dispatch(
        [call.x for call in calls],
        indices,
        first.num_max_tokens,
        first.num_experts,
        masked=masked,
        **first.format,
    )
    combined = oracle.combine(
        [returned(call, rank, num_ranks) for rank, call in enumerate(calls)],
        indices,
        [call.topk_weights for call in calls],
        want,
        num_max_tokens=first.num_max_tokens,
        num_experts=first.num_experts,
        logfmt=first.logfmt,
        reduce=first.reduce,
        ranks_per_domain=2,
        masked=masked_at_combine,
    )
    for rank, got in enumerate(results):
        assert (got is None) == (rank in masked)
        if got is None:
            continue
        expected = want[rank]
        counts = expected.recv_count.tolist()
        assert same_bits(got["count"], expected.recv_count)
        assert same_bits(got["range"], expected.layout_range)
        assert same_bits(got["src_info"], expected.recv_src_info)
        assert got["dtype"] == expected.recv_x.dtype
        assert got["shape"] == expected.recv_x.shape
        rows = torch.cat([expected.recv_x[e, :n].view(torch.uint8) for e, n in enumerate(counts)])
        assert same_bits(got["x"], rows)
        assert (got["scales"] is None) == (expected.recv_scales is None)
        if expected.recv_scales is not None:
            assert same_bits(
                got["scales"], torch.cat([expected.recv_scales[e, :n] for e, n in enumerate(counts)])
            )
            assert got["scale_strides"] == expected.recv_scales.stride()
        assert ("combined" in got) == (rank not in masked_at_combine)
        if "combined" in got:
            assert same_bits(got["combined"], combined[rank])


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


@pytest.mark.parametrize(("num_ranks", "batches"), [(1, 5), (2, 6), (3, 6), (4, 6), (8, 3)])
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


def send_then_others_then_receive(ctx: Any) -> bool:
    """Other operations may run between the two halves of an operation."""
    from deepep.reference import all_to_all
    from deepep.reference import all_to_all_low_latency as low_latency
    from deepep.reference.wire import Wire

    wire = Wire.whole(ctx.group)
    x = torch.full((2, 128), float(ctx.rank + 1)).to(torch.bfloat16)
    idx = torch.arange(ctx.num_ranks).expand(2, -1).contiguous()
    weights = torch.ones(idx.shape)
    sizes = {"num_max_tokens": 2, "num_experts": ctx.num_ranks}
    first = low_latency.start_dispatch(wire, x, idx, 2, ctx.num_ranks, fp8=False)
    second = low_latency.start_dispatch(wire, 2 * x, idx, 2, ctx.num_ranks, fp8=False)
    plan = all_to_all.exchange_counts(wire, torch.ones(2, ctx.num_ranks, dtype=torch.bool))
    plain = all_to_all.combine(wire, plan, all_to_all.dispatch(wire, plan, x).x)
    sums = []
    for underway in (first, second):
        got = underway.finish()
        back = low_latency.start_combine(
            wire, got.recv_x, idx, weights, got.recv_src_info, got.layout_range, **sizes
        )
        sums.append((back, plain.x))
    done = [(back.finish(), want) for back, want in sums]
    return torch.equal(done[0][0], done[0][1]) and torch.equal(done[1][0], 2 * done[1][1])


def test_halves_may_lie_apart(world_of: Callable[[int], World]) -> None:
    assert world_of(3).run(send_then_others_then_receive) == [True] * 3


def refusals(ctx: Any) -> list[str]:
    """Refusals of malformed arguments; a rank alone, nothing is sent."""
    from deepep.reference.all_to_all_low_latency import start_combine, start_dispatch
    from deepep.reference.wire import Wire

    wire = Wire.whole(ctx.group)
    x, idx = torch.ones(2, 128, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64)
    rows, info = torch.ones(2, 3, 128, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.int32)
    ranges, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    sizes = {"num_max_tokens": 3, "num_experts": 2}
    attempts: list[Callable[[], object]] = [
        lambda: start_dispatch(wire, x.float(), idx, 3, 2),
        lambda: start_dispatch(wire, x, idx, 1, 2),
        lambda: start_dispatch(wire, x, idx, 3, 2, ue8m0=True),
        lambda: start_dispatch(wire, x, idx.float(), 3, 2),
        lambda: start_dispatch(wire, x, idx[:1], 3, 2),
        lambda: start_dispatch(wire, x, idx, 3, 0),
        lambda: start_dispatch(wire, x[:, :64], idx, 3, 2),
        lambda: start_combine(wire, rows.float(), idx, weights, info, ranges, **sizes),
        lambda: start_combine(wire, rows[:, :2], idx, weights, info, ranges, **sizes),
        lambda: start_combine(wire, rows, idx, weights.double(), info, ranges, **sizes),
        lambda: start_combine(wire, rows, idx, weights, info[:, :2], ranges, **sizes),
        lambda: start_combine(wire, rows, idx, weights, info, ranges, reduce="node", **sizes),  # type: ignore[arg-type]
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
    names = ["x", "x", "ue8m0", "topk_idx", "topk_idx", "num_experts", "values"]
    names += ["x", "x", "topk_weights", "recv_src_info, layout_range", "reduce"]
    said = world_of(1).run(refusals)[0]
    assert [sentence.split(":")[0] for sentence in said] == names
