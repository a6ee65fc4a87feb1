"""Runs a case through `deepep.Buffer`, as a client would call it; what one rank does."""

from __future__ import annotations

from typing import Any

import torch

from deepep.sim.cases.case import Case
from deepep.sim.cases.values import inputs
from deepep.sim.fuzz.all_to_all_runs import pause
from deepep.sim.rules.observed import (
    RankView,
    array,
    fill_again,
    fill_combine,
    fill_dispatch,
    fill_layout,
    fill_low_latency,
)
from deepep.sim.rules.oracle import expert_rows, returned_rows, worst_tokens
from deepep.sim.worlds.rank_process import RankContext

#: Seconds a buffer of the simulator waits for its peers.
TIMEOUT = 20.0

#: Buffer's word for where a low-latency combine sums, by the case's.
REDUCTIONS = {"rank": "expert_rank", "token": "exact"}


def as_buffer_call(case: Case) -> Case:
    """The nearest case in terms of V1's interface: nodes of eight ranks, and a buffer's default reduction."""
    return case.with_options(ranks_per_node=8, reduce="rank")


def as_call_in_one_domain(case: Case) -> Case:
    """The same, but for low latency the case says which reduction the buffer is constructed with."""
    return as_buffer_call(case).with_options(reduce=_reduce_of(case))


def as_call_of_some_buffer(case: Case) -> Case:
    """The same, and a case between domains says which domains the buffer is constructed with."""
    return case if case.sums_by_domain else as_call_in_one_domain(case)


def _reduce_of(case: Case) -> str:
    return case.options.reduce if case.options.mode == "ll" else "rank"


def run_buffer(ctx: RankContext, case: Case, backend: str | None = None) -> RankView:
    """One rank's part of a case, on this rank's buffer of its reduction, kept from case to case."""
    per_domain = case.options.ranks_per_node if case.sums_by_domain else None
    buffer = buffer_of(ctx, backend, REDUCTIONS[_reduce_of(case)], per_domain)
    view = RankView()
    if _mask(case, buffer, "dispatch"):
        view = run_on_buffer(case, buffer)
    if case.masked:
        buffer.low_latency_clean_mask_buffer()
    return view


def run_on_buffer(case: Case, buffer: Any) -> RankView:
    """The calls of a case. The ranks that are left out of the dispatch are masked already."""
    view = RankView()
    if case.options.mode == "ht":
        _high_throughput(case, buffer, view)
    else:
        _low_latency(case, buffer, view)
    return view


def _mask(case: Case, buffer: Any, when: str) -> bool:
    """Masks the case's ranks if it is time for that; whether this rank takes part in what follows.

    A rank that the others leave out leaves them out, so that both sides start anew when all are taken in
    again.
    """
    if not case.masked or case.options.mask_at != when:
        return True
    stays = buffer.rank not in case.masked
    for rank in case.masked if stays else case.members:
        buffer.low_latency_update_mask_buffer(rank, True)
    return stays


def buffer_of(
    ctx: RankContext,
    backend: str | None,
    reduction: str = "expert_rank",
    ranks_per_domain: int | None = None,
) -> Any:
    """This rank's buffer; each constructed once, by all ranks."""
    from deepep import Buffer

    buffers, key = ctx.scratch.setdefault("buffers", {}), (backend, reduction, ranks_per_domain)
    if key not in buffers:
        buffers[key] = Buffer(
            ctx.group,
            low_latency_mode=True,
            enable_shrink=True,
            backend=backend,
            timeout=TIMEOUT,
            reduction=reduction,
            ranks_per_domain=ranks_per_domain,
        )
    return buffers[key]


def _high_throughput(case: Case, buffer: Any, view: RankView) -> None:
    options, rank = case.options, buffer.rank
    mine = inputs(case, rank).to(device_of(buffer))
    early = options.schedule != "sync"  # hooks are for low latency; elsewhere: asynchronous
    pause(case, rank, 0)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        mine.topk_idx, case.num_experts, async_finish=early
    )
    how: dict[str, Any] = {}
    if early:
        how = {"previous_event": event, "async_finish": True, "allocate_on_comm_stream": True}
    pause(case, rank, 1)
    rows, indices, weights, counts, handle, event = buffer.dispatch(
        mine.x if mine.scales is None else (mine.x, mine.scales),
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=mine.topk_idx if options.topk else None,
        topk_weights=mine.topk_weights if options.topk else None,
        expert_alignment=options.expert_alignment,
        num_worst_tokens=worst_tokens(case),
        **how,
    )
    _finish(event)
    fill_layout(view, per_rank, per_node, per_expert, in_rank)
    received = sum(int(case.is_token_in_rank(source)[:, rank].sum()) for source in case.dispatch_members)
    x, scales = rows if isinstance(rows, tuple) else (rows, None)
    fill_dispatch(view, x, scales, indices, weights, counts, received)
    pause(case, rank, 2)
    if options.cached:
        second = inputs(case, rank, again=True).to(mine.x.device)
        given = second.x if second.scales is None else (second.x, second.scales)
        rows, *_, event = buffer.dispatch(given, handle=handle, async_finish=early)
        _finish(event)
        again_x, again_scales = rows if isinstance(rows, tuple) else (rows, None)
        fill_again(view, again_x, again_scales, received)
    if not _mask(case, buffer, "combine"):
        return
    bias = None if not mine.biases else mine.biases[0] if len(mine.biases) == 1 else mine.biases
    combined, combined_weights, event = buffer.combine(
        returned_rows(case, rank, x),
        handle,
        topk_weights=weights if options.combine_weights else None,
        bias=bias,
        async_finish=early,
    )
    _finish(event)
    fill_combine(view, combined, combined_weights)


def _low_latency(case: Case, buffer: Any, view: RankView) -> None:
    options, rank = case.options, buffer.rank
    mine = inputs(case, rank).to(device_of(buffer))
    how = {"async_finish": options.schedule == "async", "return_recv_hook": options.schedule == "hook"}
    stats = None
    if options.stats:
        stats = torch.zeros(case.num_local_experts, dtype=torch.int32, device=mine.tokens.device)
    fill_layout(view, *buffer.get_dispatch_layout(mine.topk_idx, case.num_experts)[:4])
    pause(case, rank, 0)
    rows, count, handle, event, hook = buffer.low_latency_dispatch(
        mine.tokens,
        mine.topk_idx,
        case.num_max_tokens,
        case.num_experts,
        cumulative_local_expert_recv_stats=stats,
        use_fp8=options.low_latency != "bf16",
        round_scale=options.low_latency in ("fp8+rounded", "fp8+ue8m0"),
        use_ue8m0=options.low_latency == "fp8+ue8m0",
        topk_weights=mine.topk_weights if options.topk else None,
        **how,
    )
    pause(case, rank, 1)
    _finish(event, hook)
    x, scales = rows if isinstance(rows, tuple) else (rows, None)
    source_token, ranges = handle[0], handle[1]
    fill_low_latency(view, x, scales, count, source_token, ranges)
    if stats is not None:
        view.stats = array(stats)
    if not _mask(case, buffer, "combine"):
        return
    returned = expert_rows(case, rank, x, count)
    if options.zero_copy:
        slots = buffer.get_next_low_latency_combine_buffer(handle)
        slots.copy_(returned)
        returned = slots
    out = torch.empty_like(mine.tokens) if options.given_out else None
    pause(case, rank, 2)
    combined, event, hook = buffer.low_latency_combine(
        returned,
        mine.topk_idx,
        mine.topk_weights,
        handle,
        use_logfmt=options.logfmt,
        zero_copy=options.zero_copy,
        out=out,
        **how,
    )
    pause(case, rank, 3)
    _finish(event, hook)
    fill_combine(view, combined, None)


def device_of(buffer: Any) -> torch.device:
    """The device of a buffer's tensors."""
    kind = buffer.runtime.info.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _finish(event: Any, hook: Any = None) -> None:
    """Waits until the outputs may be read, by the means that the call gave."""
    if hook is not None:
        hook()
    elif event is not None and event.event is not None:
        event.current_stream_wait()
