"""Checks of the installed library, each run on every rank of a world: what `python -m deepep check` shows.

Every rank draws the inputs of all ranks from the same seed, so that deepep.reference's global view
can work out its own outputs, and compares bits. A check returns a few words of what it saw, or raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.api.buffer import Buffer
from deepep.errors import ArgumentError, PeerTimeoutError
from deepep.formats import fp8_cast
from deepep.reference import high_throughput, low_latency
from deepep.reference.high_throughput import DispatchInput
from deepep.reference.layout import DispatchLayout, dispatch_layout

HIDDEN, TOPK, LOCAL_EXPERTS = 512, 4, 3
MAX_TOKENS = 32


class CheckFailed(AssertionError):
    """An output is not what it has to be."""


@dataclass(frozen=True)
class Site:
    """One rank's place in a check: it comes with a buffer of its own, and everybody's inputs."""

    buffer: Buffer
    device: torch.device
    xs: list[Tensor]  # [T_r, H] bf16, T different on every rank, zero on the last
    topk_idx: list[Tensor]  # [T_r, K] int64 with -1 and duplicates
    topk_weights: list[Tensor]  # [T_r, K] float32
    layouts: list[DispatchLayout]

    @property
    def rank(self) -> int:
        return self.buffer.rank

    @property
    def num_experts(self) -> int:
        return LOCAL_EXPERTS * self.buffer.group_size

    def mine(self, per_rank: list[Tensor]) -> Tensor:
        """This rank's tensor, on its device."""
        return per_rank[self.rank].to(self.device)


Check = Callable[[Site], str]
CHECKS: dict[str, Check] = {}


def check(name: str) -> Callable[[Check], Check]:
    """Registers a check under what it shows to hold."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def run_check(
    context: Any, name: str, backend: str | None, low_latency_mode: bool = True
) -> tuple[str, float]:
    """Runs one check on a rank of a world (deepep.sim): what it saw, and the seconds it took."""
    started = time.perf_counter()
    options: dict[str, Any] = {"timeout": 20.0, "device": context.device}
    if name == MISSING_RANK:
        options |= {"timeout": 5.0, "enable_shrink": True}  # waited for in full
    if name == EXACT_SUMS:
        options["reduction"] = "exact"
    buffer = Buffer(context.group, low_latency_mode=low_latency_mode, backend=backend, **options)
    try:
        seen = CHECKS[name](make_site(buffer, context.device))
    finally:
        buffer.destroy()
    return seen, time.perf_counter() - started


def make_site(buffer: Buffer, device: torch.device) -> Site:
    """Inputs for all ranks of the buffer's group, the same on every rank."""
    num_ranks = buffer.group_size
    num_experts = LOCAL_EXPERTS * num_ranks
    generator = torch.Generator().manual_seed(num_ranks)
    xs, idx, weights = [], [], []
    for rank in range(num_ranks):
        tokens = 0 if rank == num_ranks - 1 > 0 else MAX_TOKENS - 3 * rank
        xs.append(torch.randn(tokens, HIDDEN, generator=generator).bfloat16())
        idx.append(torch.randint(-1, num_experts, (tokens, TOPK), generator=generator))
        weights.append(torch.rand(tokens, TOPK, generator=generator))
    layouts = [dispatch_layout(i, num_experts, num_ranks) for i in idx]
    return Site(buffer, device, xs, idx, weights, layouts)


def demand_same(name: str, got: Tensor | None, expected: Tensor | None) -> None:
    """Same dtype, shape and bits."""
    if got is None or expected is None:
        if got is not expected:
            raise CheckFailed(f"{name}: got {got}, expected {expected}")
        return
    got = got.detach().cpu()
    if got.dtype != expected.dtype or got.shape != expected.shape:
        shapes = f"{got.dtype} {list(got.shape)}, expected {expected.dtype} {list(expected.shape)}"
        raise CheckFailed(f"{name}: got {shapes}")
    raw_got, raw_expected = (
        t.clone(memory_format=torch.contiguous_format).flatten() for t in (got, expected)
    )
    different = (raw_got.view(torch.uint8) != raw_expected.view(torch.uint8)).sum().item()
    if different:
        raise CheckFailed(f"{name}: {different} of {raw_got.view(torch.uint8).numel()} bytes differ")


def _dispatch(site: Site, x: Any = None, **options: Any) -> tuple[Any, ...]:
    """Layout and dispatch of this rank's inputs."""
    idx = site.mine(site.topk_idx)
    per_rank, per_node, per_expert, in_rank, _ = site.buffer.get_dispatch_layout(idx, site.num_experts)
    return site.buffer.dispatch(
        site.mine(site.xs) if x is None else x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=site.mine(site.topk_weights),
        **options,
    )


def _expected(site: Site, xs: list[Tensor] | None = None, scales: Any = None, **options: Any) -> Any:
    """Results that `_dispatch` has to give this rank."""
    inputs = [
        DispatchInput(
            (xs or site.xs)[r],
            layout.is_token_in_rank,
            scales=None if scales is None else scales[r],
            topk_idx=site.topk_idx[r],
            topk_weights=site.topk_weights[r],
            num_tokens_per_expert=layout.num_tokens_per_expert,
        )
        for r, layout in enumerate(site.layouts)
    ]
    return high_throughput.dispatch(inputs, site.num_experts, **options)[site.rank]


@check("layout: counts per rank and expert, token in rank")
def _layout(site: Site) -> str:
    idx = site.mine(site.topk_idx)
    per_rank, per_node, per_expert, in_rank, _ = site.buffer.get_dispatch_layout(idx, site.num_experts)
    expected = site.layouts[site.rank]
    demand_same("num_tokens_per_rank", per_rank, expected.num_tokens_per_rank)
    demand_same("num_tokens_per_rdma_rank", per_node, expected.num_tokens_per_node)
    demand_same("num_tokens_per_expert", per_expert, expected.num_tokens_per_expert)
    demand_same("is_token_in_rank", in_rank, expected.is_token_in_rank)
    counted = site.buffer.get_dispatch_layout(idx.int(), site.num_experts)[2]
    demand_same("int32 indices", counted, expected.num_tokens_per_expert)
    return f"{len(idx)} tokens, int32 and int64"


@check("dispatch: BF16 rows, indices and weights, in order")
def _dispatch_bf16(site: Site) -> str:
    recv_x, recv_idx, recv_weights, counts, _, _ = _dispatch(site, expert_alignment=8)
    expected = _expected(site, expert_alignment=8)
    demand_same("recv_x", recv_x, expected.recv_x)
    demand_same("recv_topk_idx", recv_idx, expected.recv_topk_idx)
    demand_same("recv_topk_weights", recv_weights, expected.recv_topk_weights)
    if counts != expected.num_recv_tokens_per_expert:
        raise CheckFailed(f"counts: got {counts}, expected {expected.num_recv_tokens_per_expert}")
    return f"{len(recv_x)} rows received"


@check("dispatch: FP8 rows with scales")
def _dispatch_fp8(site: Site) -> str:
    cast = [fp8_cast(x) for x in site.xs]
    mine = cast[site.rank]
    strided = mine.scales.t().contiguous().t().to(site.device)
    (recv_x, recv_scales), *_ = _dispatch(site, (mine.values.to(site.device), strided))
    expected = _expected(site, [c.values for c in cast], [c.scales for c in cast])
    demand_same("recv_x", recv_x, expected.recv_x)
    demand_same("recv_scales", recv_scales, expected.recv_scales)
    return "column-major scales"


@check("dispatch: a fixed number of rows, without waiting for counts")
def _dispatch_worst_case(site: Site) -> str:
    worst = sum(map(len, site.xs)) + 5
    recv_x, recv_idx, _, counts, _, _ = _dispatch(site, num_worst_tokens=worst)
    real = _expected(site).recv_x
    expected = _expected(site, num_worst_tokens=worst)
    demand_same("recv_x", recv_x[: len(real)], real)
    demand_same("recv_topk_idx", recv_idx, expected.recv_topk_idx)
    if counts:
        raise CheckFailed(f"counts: got {counts}, expected none")
    return f"{worst} rows, {len(real)} of them real"


@check("combine: sum over ranks, biases, weights sent home")
def _combine(site: Site) -> str:
    recv_x, _, recv_weights, _, handle, _ = _dispatch(site)
    biases = [(x.flip(1), x.flip(0)) for x in site.xs]
    first, second = biases[site.rank]
    mine = (first.to(site.device), second.to(site.device))
    got_x, got_weights, _ = site.buffer.combine(recv_x, handle, topk_weights=recv_weights, bias=mine)
    tables = [layout.is_token_in_rank for layout in site.layouts]
    inputs = [
        DispatchInput(x, table, topk_idx=idx, topk_weights=weights)
        for x, table, idx, weights in zip(site.xs, tables, site.topk_idx, site.topk_weights, strict=True)
    ]
    received = high_throughput.dispatch(inputs, site.num_experts)
    weights = [out.recv_topk_weights for out in received if out.recv_topk_weights is not None]
    expected = high_throughput.combine(
        [out.recv_x for out in received], tables, topk_weights=weights, biases=biases
    )[site.rank]
    demand_same("combined_x", got_x, expected.x)
    demand_same("combined_topk_weights", got_weights, expected.topk_weights)
    return "two biases"


@check("handles: cached dispatch, used twice and out of order")
def _cached(site: Site) -> str:
    handle = _dispatch(site)[4]
    _dispatch(site)
    for turned in ([x.flip(1) for x in site.xs], site.xs):
        again, *_ = site.buffer.dispatch(site.mine(turned), handle=handle)
        assert isinstance(again, Tensor)
        demand_same("recv_x", again, _expected(site, turned).recv_x)
    return "bit for bit"


@check("events: asynchronous operations and what waits for them")
def _events(site: Site) -> str:
    recv_x, _, _, _, handle, event = _dispatch(
        site, previous_event=Buffer.capture(), async_finish=True, allocate_on_comm_stream=True
    )
    with event:
        pass
    demand_same("recv_x", recv_x, _expected(site).recv_x)
    combined, _, done = site.buffer.combine(recv_x, handle, async_finish=True)
    done.current_stream_wait()
    tables = [layout.is_token_in_rank for layout in site.layouts]
    rows = high_throughput.dispatch(
        [DispatchInput(x, t) for x, t in zip(site.xs, tables, strict=True)], site.num_experts
    )
    expected = high_throughput.combine([r.recv_x for r in rows], tables)[site.rank]
    demand_same("combined_x", combined, expected.x)
    return "dispatch and combine"


def _low_latency(site: Site, fp8: bool) -> list[low_latency.LowLatencyOutput]:
    """Results that low-latency dispatch has to give every rank."""
    return low_latency.dispatch(site.xs, site.topk_idx, MAX_TOKENS, site.num_experts, fp8=fp8)


@check("low latency: FP8 dispatch with a hook, weighted combine")
def _low_latency_fp8(site: Site) -> str:
    return _low_latency_round_trip(site, "rank")


EXACT_SUMS = 'low latency: the same with reduction="exact"'


@check(EXACT_SUMS)
def _low_latency_exact(site: Site) -> str:
    return _low_latency_round_trip(site, "token")


def _low_latency_round_trip(site: Site, reduce: Literal["rank", "token"]) -> str:
    x, idx, weights = site.mine(site.xs), site.mine(site.topk_idx), site.mine(site.topk_weights)
    (recv_x, scales), count, handle, _, hook = site.buffer.low_latency_dispatch(
        x, idx, MAX_TOKENS, site.num_experts, return_recv_hook=True
    )
    assert hook is not None
    hook()
    expected = _low_latency(site, fp8=True)
    mine = expected[site.rank]
    scales_of = mine.recv_scales
    assert scales_of is not None
    demand_same("recv_count", count, mine.recv_count)
    for expert, rows in enumerate(mine.recv_count.tolist()):
        demand_same(f"expert {expert}", recv_x[expert, :rows], mine.recv_x[expert, :rows])
        demand_same(f"expert {expert} scales", scales[expert, :rows], scales_of[expert, :rows])
    ys = [out.recv_x.to(torch.bfloat16) for out in expected]
    y = recv_x.to(torch.bfloat16)
    for expert, rows in enumerate(mine.recv_count.tolist()):
        y[expert, rows:] = float("nan")  # rows past the count must not matter
    combined, _, hook = site.buffer.low_latency_combine(y, idx, weights, handle, return_recv_hook=True)
    assert hook is not None
    hook()
    sums = low_latency.combine(
        ys,
        site.topk_idx,
        site.topk_weights,
        expected,
        num_max_tokens=MAX_TOKENS,
        num_experts=site.num_experts,
        reduce=reduce,
    )
    demand_same("combined_x", combined, sums[site.rank])
    return f"{int(count.sum())} rows, rows past the count ignored"


@check("low latency: BF16 dispatch, LogFMT combine")
def _low_latency_bf16(site: Site) -> str:
    x, idx, weights = site.mine(site.xs), site.mine(site.topk_idx), site.mine(site.topk_weights)
    recv_x, count, handle, _, _ = site.buffer.low_latency_dispatch(
        x, idx, MAX_TOKENS, site.num_experts, use_fp8=False
    )
    assert isinstance(recv_x, Tensor)
    expected = _low_latency(site, fp8=False)
    for expert, rows in enumerate(expected[site.rank].recv_count.tolist()):
        demand_same(f"expert {expert}", recv_x[expert, :rows], expected[site.rank].recv_x[expert, :rows])
    small = [out.recv_x / 64 for out in expected]  # below 1, where LogFMT applies
    y = torch.where(site.mine([out.recv_src_info for out in expected]).unsqueeze(-1) >= 0, recv_x / 64, 0)
    combined, _, _ = site.buffer.low_latency_combine(y, idx, weights, handle, use_logfmt=True)
    sums = low_latency.combine(
        small,
        site.topk_idx,
        site.topk_weights,
        expected,
        num_max_tokens=MAX_TOKENS,
        num_experts=site.num_experts,
        logfmt=True,
    )
    demand_same("combined_x", combined, sums[site.rank])
    return f"{int(count.sum())} rows"


@check("layers: gradients of dispatch and combine")
def _gradients(site: Site) -> str:
    from deepep.nn import combine, dispatch

    x = site.mine(site.xs).requires_grad_()
    weights = site.mine(site.topk_weights).requires_grad_()
    received = dispatch(site.buffer, x, site.mine(site.topk_idx), weights, site.num_experts)
    out = combine(received.x, received.route)
    (out.sum() + received.topk_weights.sum()).backward()
    # A token's row counts once per rank that got it, and comes back as often; a weight counts once if its
    # expert exists. Small integers are exact in bf16.
    visits = site.layouts[site.rank].is_token_in_rank.sum(1, keepdim=True).bfloat16()
    demand_same("gradient of x", x.grad, visits.expand(-1, HIDDEN).contiguous())
    demand_same("gradient of weights", weights.grad, (site.topk_idx[site.rank] >= 0).float())
    return "rows and weights"


@check("errors: a bad argument on one rank is refused on all")
def _bad_argument(site: Site) -> str:
    x = site.mine(site.xs)
    x = x[:, : HIDDEN // 2] if site.rank == 0 else x  # not contiguous, or narrower than the others'
    try:
        _dispatch(site, x)
    except ArgumentError as error:
        if error.rank is None:
            raise CheckFailed(f"the error names no rank: {error}") from error
        demand_same("recv_x afterwards", _dispatch(site)[0], _expected(site).recv_x)
        return type(error).__name__
    if site.buffer.group_size == 1:
        return "needs two ranks"
    raise CheckFailed("a rank's narrower rows were accepted")


MISSING_RANK = "faults: a missing rank is named, and can be left out"


@check(MISSING_RANK)
def _missing_rank(site: Site) -> str:
    last = site.buffer.group_size - 1
    if last == 0:
        return "needs two ranks"
    _dispatch(site)
    if site.rank == last:
        # Leaving would end its buffer, which is an operation too: it waits, on the user's own group.
        dist.barrier(group=site.buffer.group)
        return "stayed away"
    try:
        _dispatch(site)
    except PeerTimeoutError as error:
        if error.record.waited_on != (last,):
            raise CheckFailed(f"blamed {error.record.waited_on}, expected rank {last}") from error
    else:
        raise CheckFailed("a dispatch ended although a rank stayed away")
    site.buffer.low_latency_update_mask_buffer(last, True)
    demand_same("recv_x without it", _dispatch(site)[0], _expected(site, masked=(last,)).recv_x)
    dist.barrier(group=site.buffer.group)
    return f"rank {last} named, the others carry on"
