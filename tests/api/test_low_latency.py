"""low_latency_dispatch and low_latency_combine against the global-view
oracle, bit for bit, with every option.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import deepep

HIDDEN = 512
MOST = 6


def topk_of(rank: int, pattern: str, num_ranks: int, num_experts: int, num_topk: int) -> torch.Tensor:
    rng = np.random.default_rng([rank, num_ranks, num_topk, len(pattern)])
    num_tokens = {"none": 0, "full": MOST, "one": 1}.get(pattern, int(rng.integers(0, MOST + 1)))
    low, high = {"duplicates": (0, 2), "last expert": (num_experts - 1, num_experts), "nowhere": (-1, 0)}.get(
        pattern, (-1, num_experts)
    )
    return torch.from_numpy(rng.integers(low, high, size=(num_tokens, num_topk)))


def inputs_of(rank: int, idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x with values over many binary orders, a group of zeros, a NaN; weights."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(len(idx), HIDDEN, generator=generator)
    x = (x * torch.exp2(torch.randint(-20, 4, x.shape, generator=generator))).bfloat16()
    if len(idx):
        x[0, :128] = 0
        x[-1, 130] = float("nan")
    return x, torch.randn(idx.shape, generator=generator)


def valid(counts: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
    """The rows of each expert that mean something."""
    return [rows[expert, :count] for expert, count in enumerate(counts.tolist())]


def run(
    ctx: Any,
    buffer_of: Any,
    same_bits: Any,
    pattern: str,
    num_local: int,
    num_topk: int,
    index_dtype: torch.dtype,
    options: dict[str, bool],
    logfmt: bool,
    early: str,
    reduction: str | None = None,
) -> None:
    from deepep.reference import low_latency as oracle

    rank, num_ranks = ctx.rank, ctx.num_ranks
    buffer = buffer_of(ctx) if reduction is None else buffer_of(ctx, reduction=reduction)
    num_experts = num_local * num_ranks
    everyone = range(num_ranks)
    topk = [topk_of(r, pattern, num_ranks, num_experts, num_topk).to(index_dtype) for r in everyone]
    xs, weights = zip(*(inputs_of(r, topk[r]) for r in everyone), strict=True)
    names = {"use_fp8": "fp8", "round_scale": "round_scale", "use_ue8m0": "ue8m0"}
    layouts = oracle.dispatch(
        list(xs), topk, MOST, num_experts, **{names[name]: value for name, value in options.items()}
    )
    expected = layouts[rank]
    how = {"async_finish": early == "event", "return_recv_hook": early == "hook"}

    stats = torch.full((num_local,), 5, dtype=torch.int32)
    received, count, handle, event, hook = buffer.low_latency_dispatch(
        xs[rank], topk[rank], MOST, num_experts, stats, **options, **how
    )
    assert (event.event is not None) == (early == "event")
    assert (hook is not None) == (early == "hook")
    if early == "event":
        event.current_stream_wait()
    if hook is not None:
        hook()
        hook()  # once more does nothing
    x, scales = received if isinstance(received, tuple) else (received, None)
    assert x.shape == (num_local, num_ranks * MOST, HIDDEN)
    assert same_bits(count, expected.recv_count)
    assert torch.equal(stats, expected.recv_count + 5)
    for got, wanted in zip(valid(count, x), valid(count, expected.recv_x), strict=True):
        assert same_bits(got, wanted)
    if scales is not None:
        assert scales.stride() == expected.recv_scales.stride()
        for got, wanted in zip(valid(count, scales), valid(count, expected.recv_scales), strict=True):
            assert same_bits(got, wanted)
    source, ranges, most, hidden, experts = handle
    assert same_bits(source, expected.recv_src_info)
    assert same_bits(ranges, expected.layout_range)
    assert (most, hidden, experts) == (MOST, HIDDEN, num_experts)

    def expert_output(r: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(90 + r)
        rows = torch.randn(num_local, num_ranks * MOST, HIDDEN, generator=generator)
        return (rows * 0.01).bfloat16()

    wanted = oracle.combine(
        [expert_output(r) for r in everyone],
        topk,
        list(weights),
        layouts,
        num_max_tokens=MOST,
        num_experts=num_experts,
        logfmt=logfmt,
        reduce="token" if reduction == "exact" else "rank",
    )[rank]
    for out, zero_copy in itertools.product(
        (None, torch.empty(len(topk[rank]), HIDDEN).bfloat16()), (False, True)
    ):
        if zero_copy and logfmt:
            continue
        rows = expert_output(rank)
        if zero_copy:
            slots = buffer.get_next_low_latency_combine_buffer(handle)
            assert slots.shape == rows.shape
            slots.copy_(rows)
            rows.fill_(float("nan"))  # only the buffer's contents count
        combined, event, hook = buffer.low_latency_combine(
            rows, topk[rank], weights[rank], handle, use_logfmt=logfmt, zero_copy=zero_copy, out=out, **how
        )
        if early == "event":
            event.current_stream_wait()
        if hook is not None:
            hook()
        assert out is None or combined is out
        assert same_bits(combined, wanted)


BF16 = {"use_fp8": False}
FP8 = {"use_fp8": True}
ROUNDED = {"use_fp8": True, "round_scale": True}
PACKED = {"use_fp8": True, "round_scale": True, "use_ue8m0": True}

CASES = {
    "plain": ("random", 2, 3, torch.int64, FP8, False, "sync"),
    "bf16, hook": ("random", 2, 3, torch.int32, BF16, False, "hook"),
    "rounded, event": ("random", 3, 4, torch.int64, ROUNDED, False, "event"),
    "packed, hook": ("random", 2, 2, torch.int64, PACKED, False, "hook"),
    "LogFMT": ("random", 2, 3, torch.int64, BF16, True, "sync"),
    "LogFMT, hook": ("full", 1, 1, torch.int32, FP8, True, "hook"),
    "T = 0": ("none", 2, 3, torch.int64, FP8, False, "hook"),
    "T = 1": ("one", 1, 1, torch.int64, FP8, False, "sync"),
    "T = M": ("full", 2, 2, torch.int64, PACKED, False, "event"),
    "all -1": ("nowhere", 2, 2, torch.int64, FP8, False, "sync"),
    "duplicates": ("duplicates", 2, 5, torch.int64, BF16, False, "sync"),
    "one expert": ("last expert", 2, 3, torch.int64, FP8, False, "hook"),
    "K > E": ("random", 1, 9, torch.int64, BF16, False, "sync"),
    "K = 32": ("random", 4, 32, torch.int64, BF16, False, "sync"),
}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_oracle(world_of: Any, buffer_of: Any, same_bits: Any, case: str, num_ranks: int) -> None:
    world_of(num_ranks).run(run, buffer_of, same_bits, *CASES[case])


@pytest.mark.parametrize(
    "case", ["plain", "bf16, hook", "packed, hook", "LogFMT", "T = M", "duplicates", "K = 32"]
)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_exact_mode_matches_the_oracle(
    world_of: Any, buffer_of: Any, same_bits: Any, case: str, num_ranks: int
) -> None:
    world_of(num_ranks).run(run, buffer_of, same_bits, *CASES[case], "exact")


def repeated(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    buffer, num_experts = buffer_of(ctx), 2 * ctx.num_ranks
    idx = routing(ctx.rank, ctx.num_ranks, num_experts, 2, 4)
    x = torch.full((4, 128), float(ctx.rank + 1)).bfloat16()
    weights = torch.ones(4, 2)
    handles = [
        buffer.low_latency_dispatch(x * (1 + i), idx, MOST, num_experts, use_fp8=False) for i in range(3)
    ]
    # Three dispatches in a row, then their combines in another order.
    for i in (2, 0, 1):
        received, _, handle, _, _ = handles[i]
        combined, _, _ = buffer.low_latency_combine(received, idx, weights, handle)
        assert same_bits(combined, 2 * x * (1 + i))


def test_dispatches_in_a_row_without_a_combine(
    world_of: Any, buffer_of: Any, same_bits: Any, routing: Any
) -> None:
    world_of(3).run(repeated, buffer_of, same_bits, routing)


def plain_tuples(ctx: Any, buffer_of: Any, same_bits: Any, routing: Any) -> None:
    buffer, num_experts = buffer_of(ctx), ctx.num_ranks
    idx = routing(ctx.rank, ctx.num_ranks, num_experts, 1, 4)
    x = torch.full((4, 128), float(ctx.rank + 1)).bfloat16()
    received, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, MOST, num_experts, use_fp8=False)
    combined, _, _ = buffer.low_latency_combine(received, idx, torch.ones(4, 1), tuple(handle))
    assert same_bits(combined, x)


def test_a_handle_taken_apart_and_put_together(
    world_of: Any, buffer_of: Any, same_bits: Any, routing: Any
) -> None:
    world_of(2).run(plain_tuples, buffer_of, same_bits, routing)


def where_it_rounds(ctx: Any, buffer_of: Any, reduction: str) -> float:
    """The sum of one token's rows: 1 of rank 0, 256 and 1 of rank 1. 257 is a tie: 256 in bf16."""
    buffer = buffer_of(ctx, reduction=reduction) if reduction else buffer_of(ctx)
    idx = torch.tensor([[0, 2, 3]]) if ctx.rank == 0 else torch.empty(0, 3, dtype=torch.int64)
    x, weights = torch.ones(len(idx), 128).bfloat16(), torch.ones(idx.shape)
    handle = buffer.low_latency_dispatch(x, idx, 1, 4, use_fp8=False)[2]
    rows = torch.ones(2, 2, 128).bfloat16()
    if ctx.rank == 1:
        rows[0] = 256
    sums = buffer.low_latency_combine(rows, idx, weights, handle)[0]
    return float(sums[0, 0]) if ctx.rank == 0 else 0.0


@pytest.mark.parametrize(("reduction", "wanted"), [("", 256.0), ("expert_rank", 256.0), ("exact", 258.0)])
def test_experts_ranks_sum_first_unless_told_otherwise(
    world_of: Any, buffer_of: Any, reduction: str, wanted: float
) -> None:
    # rank 1 has 256 + 1, which rounds to 256 on its way; the owner's 1 + 256 is the same tie again.
    assert world_of(2).run(where_it_rounds, buffer_of, reduction)[0] == wanted


def forks(ctx: Any, buffer_of: Any, same_bits: Any) -> None:
    """Arguments that clients pass for DeepEP's forks: meant, or refused on every rank."""
    buffer = buffer_of(ctx)
    x, idx = torch.randn(4, 128).bfloat16(), torch.arange(8).view(4, 2) % (2 * ctx.num_ranks)
    experts, weights, scale = 2 * ctx.num_ranks, torch.ones(4, 2), torch.ones(1)
    plain = buffer.low_latency_dispatch(x, idx, 8, experts)
    for aligned in (True, False):
        again = buffer.low_latency_dispatch(x, idx, 8, experts, align_fp8_quantization=aligned)
        for got, wanted, count in zip(again[0][0], plain[0][0], plain[1].tolist(), strict=True):
            assert same_bits(got[:count], wanted[:count])
    rows = torch.zeros(2, 8 * ctx.num_ranks, 128).bfloat16()
    bad = ctx.rank == 0
    for given in ({"use_nvfp4": bad}, {"x_global_scale": scale if bad else None}):
        with pytest.raises(deepep.ArgumentError, match="NVFP4"):
            buffer.low_latency_dispatch(x, idx, 8, experts, **given)
    handle = buffer.low_latency_dispatch(x, idx, 8, experts, use_nvfp4=False, x_global_scale=None)[2]
    with pytest.raises(deepep.ArgumentError, match="overlap"):
        buffer.low_latency_combine(rows, idx, weights, handle, overlap=bad, comp_signal=scale)
    buffer.low_latency_combine(rows, idx, weights, handle, overlap=False, comp_signal=None, threshold=0)


def test_arguments_of_forks(world_of: Any, buffer_of: Any, same_bits: Any) -> None:
    world_of(2).run(forks, buffer_of, same_bits)
