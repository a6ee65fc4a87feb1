"""Fresh dispatches: counts travel first, rows arrive at their final place in memory of the receive pool."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepep._core import MAX_TOPK
from deepep.backends.cuda import spread
from deepep.backends.cuda.launch import MAX_LOCAL_EXPERTS, Phase, Plan
from deepep.backends.cuda.memory.arrays import ExpandedArrays, ReceiveArrays, ReceiveSpec, receive_spec
from deepep.backends.cuda.memory.tensor_set import Array, TensorSet
from deepep.backends.cuda.sm_split import dispatch_split, expanded_split
from deepep.backends.cuda.streams import CommStream, hand_out
from deepep.config import DEFAULT_NUM_SMS
from deepep.errors import ArgumentError, CapacityError
from deepep.runtime import checks, streams
from deepep.runtime.completion import Completion
from deepep.runtime.requests import Dispatched, DispatchRequest, Operation, Route, Schedule

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine

_ROW_DTYPES = frozenset(checks.ROW_DTYPES)
_INDEX_DTYPES = frozenset(checks.INDEX_DTYPES)
_BYTE_DTYPES = frozenset(checks.BYTE_DTYPES)
_MOST_SPECS = 256
_specs: dict[tuple[object, ...], ReceiveSpec] = {}


@lru_cache(_MOST_SPECS)
def _tables(tokens: int, ranks: int, device: torch.device, with_ranks: bool) -> TensorSet:
    """A plan's table [T + R, R] int32 and, if wanted, the ranks of each token [T, R] bool."""
    ranks_of_tokens = [Array((tokens, ranks), torch.bool)] if with_ranks else []
    return TensorSet(device, [Array((tokens + ranks, ranks), torch.int32), *ranks_of_tokens])


def is_usual(engine: CudaEngine, request: DispatchRequest) -> bool:
    """True if all checks would pass, as far as that can be said without them; False says nothing.

    The checks that can say what is wrong take the better part of a call's host time. The usual call is known
    by the very tensors of this engine's last layout, or by its handle.
    """
    x, scales, route = request.x, request.scales, request.route
    is_by_topk = request.layout is None and route is None
    given = (x, request.topk_idx, request.topk_weights, *(() if scales is None else (scales,)))
    others = request.num_experts, request.expert_alignment, request.num_worst_tokens, len(given)
    known = engine.last_dispatch
    if (
        is_by_topk
        and others == known.others
        and known.are_alike(*given)
        and x.data_ptr() % 16 == 0
        and type(request.expert_alignment) is int
        and type(request.num_worst_tokens) is int
    ):
        return True
    if type(x) is not Tensor or x.device != engine.device or x.dim() != 2:
        return False
    tokens, hidden = x.shape
    row_bytes = hidden * x.element_size()
    if not (
        row_bytes > 0
        and row_bytes % 16 == 0
        and x.is_contiguous()
        and not x.is_neg()
        and x.data_ptr() % 16 == 0
    ):
        return False
    if scales is None:
        if x.dtype not in _ROW_DTYPES:
            return False
    elif not (
        x.dtype in _BYTE_DTYPES
        and type(scales) is Tensor
        and scales.dtype in checks.SCALE_DTYPES
        and scales.device == engine.device
        and scales.dim() == 2
        and scales.shape[0] == tokens
        and not scales.is_neg()
    ):
        return False
    if route is not None:
        return route.engine is engine and tokens == route.num_tokens
    topk_idx, weights, layout = request.topk_idx, request.topk_weights, request.layout
    if layout is None:
        if not _is_usual_topk(engine, topk_idx, request.num_experts):
            return False
    elif (
        engine.last_layout is None
        or topk_idx is not engine.last_layout[0]
        or layout.is_token_in_rank is not (made := engine.last_layout[1]).is_token_in_rank
        or layout.num_tokens_per_rank is not made.num_tokens_per_rank
        or layout.num_tokens_per_expert is not made.num_tokens_per_expert
        or made.num_tokens_per_expert.shape[0] > MAX_LOCAL_EXPERTS
    ):
        return False
    is_usual = (
        topk_idx is not None
        and tokens == topk_idx.shape[0]
        and type(weights) is Tensor
        and weights.dtype is torch.float32
        and weights.device == engine.device
        and weights.shape == topk_idx.shape
        and weights.is_contiguous()
        and not weights.is_neg()
        and type(request.expert_alignment) is int
        and request.expert_alignment >= 1
        and type(request.num_worst_tokens) is int
        and request.num_worst_tokens >= 0
    )
    if is_usual and is_by_topk:
        known.note(given, others)
    return is_usual


def _is_usual_topk(engine: CudaEngine, topk_idx: object, num_experts: int) -> bool:
    """True if checks of these would pass, but for the number of tokens."""
    ranks = engine.info.num_ranks
    return (
        type(topk_idx) is Tensor
        and topk_idx.dtype in _INDEX_DTYPES
        and topk_idx.device == engine.device
        and topk_idx.dim() == 2
        and 1 <= topk_idx.shape[1] <= MAX_TOPK
        and topk_idx.is_contiguous()
        and not topk_idx.is_neg()
        and num_experts % ranks == 0
        and num_experts <= ranks * MAX_LOCAL_EXPERTS
    )


def fresh(engine: CudaEngine, request: DispatchRequest, schedule: Schedule, capturing: bool) -> Dispatched:
    """A dispatch along a new route, of a checked request, under the engine's lock."""
    layout, worst = request.layout, request.num_worst_tokens
    ranks, tokens = engine.info.num_ranks, request.x.shape[0]
    experts = request.num_experts if layout is None else layout.num_tokens_per_expert.shape[0]
    if worst == 0 and capturing:
        allowed = "more than 0 while a graph is captured: the host cannot wait for counts"
        raise ArgumentError("num_worst_tokens", "0", allowed, engine.info.rank)
    capacity = worst or max(64, engine.rows_seen * 5 // 4 or ranks * tokens)
    is_guess = worst == 0
    on_caller = schedule.after is None and not schedule.asynchronous
    completion = None
    while True:
        if on_caller:
            stream = streams.current_address(engine.index)
            plan, received, expanded = _launch(engine, request, capacity, is_guess, capturing, stream)
        else:
            with CommStream(engine.comm, engine.symmetric.endpoint.domain, schedule.after) as stream:
                plan, received, expanded = _launch(engine, request, capacity, is_guess, capturing, stream)
        # All that can be done before the counts are known is done now: small batches wait for the host.
        if not on_caller and received.overflow_stream is None:
            completion = _hand_out(engine, request, schedule, received, plan, expanded)
        if worst:
            plan.num_rows, per_expert = worst, []
            break
        counts = engine.wait_counts(experts // ranks)
        if counts.phase == Phase.TOO_MANY_ROWS:
            capacity, is_guess = counts.max_rows, False  # all ranks learned the same, and acquire anew
            continue
        engine.rows_seen = max(counts.max_rows, engine.rows_seen * 15 // 16)
        if received.overflow_stream is None:
            received.cut(counts.num_rows)
        else:
            received = engine.symmetric.copy_out(received, counts.num_rows)
            if not on_caller:
                completion = _hand_out(engine, request, schedule, received, plan, expanded)
        plan.num_rows, plan.known = counts.num_rows, counts.table
        plan.most_rows, plan.returning = counts.max_rows, counts.num_returned
        per_expert, alignment = counts.per_expert, request.expert_alignment
        if alignment > 1:
            per_expert = [-(-n // alignment) * alignment for n in per_expert]
        break
    plan.source = received.source
    assert plan.in_rank is not None
    route = Route(engine, tokens, experts, plan.in_rank, plan.num_rows, plan)
    arrays = (received.x, received.scales, received.topk_idx, received.topk_weights)
    spread_to = None
    if expanded is not None and request.expansion is not None:
        num_rows = request.expansion.num_rows if worst else _num_expanded(engine, request, per_expert)
        spread_to = spread.spread_rows(expanded, plan.num_rows, num_rows)
    return Dispatched(*arrays, per_expert, route, completion, spread_to)


def _num_expanded(engine: CudaEngine, request: DispatchRequest, per_expert: list[int]) -> int:
    """The expanded rows of a call, by which those of later ones are guessed."""
    assert request.expansion is not None
    alignment = request.expansion.alignment
    num_rows = sum(-(-count // alignment) * alignment for count in per_expert)
    engine.expanded_seen = max(num_rows, engine.expanded_seen * 15 // 16)
    return num_rows


def _launch(
    engine: CudaEngine,
    request: DispatchRequest,
    capacity: int,
    is_guess: bool,
    capturing: bool,
    stream: int,
) -> tuple[Plan, ReceiveArrays, ExpandedArrays | None]:
    """One attempt, on the current stream, `stream`:
    into arrays for `capacity` rows, or fewer if that is a guess.
    """
    x, scales, topk_idx, layout = request.x, request.scales, request.topk_idx, request.layout
    memory, worst = engine.symmetric, request.num_worst_tokens
    endpoint = memory.endpoint
    if engine.lines is not None and engine.lines.asks:
        engine.lines.attach(endpoint.domain)
    tokens, ranks = x.shape[0], engine.info.num_ranks
    tables = _tables(tokens, ranks, engine.device, layout is None).make()
    plan = Plan(tables[0], tokens, capacity, endpoint.live, stream)
    plan.in_rank = tables[1] if layout is None else layout.is_token_in_rank
    of_scales = None if scales is None else (scales.shape[1], scales.dtype)
    of_topk = None if topk_idx is None else (topk_idx.shape[1], topk_idx.dtype)
    expansion = request.expansion
    places = expansion is not None and expansion.spreads
    key = (x.shape[1], x.dtype, of_scales, of_topk, places)
    spec = _specs.get(key)
    if spec is None:
        if len(_specs) >= _MOST_SPECS:
            _specs.clear()
        spec = _specs[key] = receive_spec(x, scales, topk_idx, with_source=True, with_places=places)
    made, templates = None, spec.kept.get(capacity)
    # At once where the pool has room, if the overflow area need not grow first, nor anything else be done.
    fits = capacity * spec.row_bytes + spec.spare_bytes <= memory.overflow.num_bytes
    if fits and templates is not None and templates[0].device == engine.device and not capturing:
        made = memory.pool.acquire_now(templates, stream)
    if made is not None:
        received = ReceiveArrays(*[None if i is None else made[i] for i in spec.order])  # type: ignore[arg-type]
    else:
        received = acquire(engine, spec, capacity, is_guess, capturing, stream)
    num_sms = max(1, min(request.num_sms or DEFAULT_NUM_SMS, engine.sms))
    expanded = None if expansion is None else spread.make(engine, request, received)
    endpoint.dispatch(
        x,
        received,
        dispatch_split(num_sms, ranks) if expanded is None else expanded_split(num_sms, ranks),
        stream,
        plan,
        scales=scales,
        topk_idx=topk_idx,
        topk_weights=request.topk_weights,
        is_token_in_rank=plan.in_rank,
        tokens_per_rank=None if layout is None else layout.num_tokens_per_rank,
        tokens_per_expert=None if layout is None else layout.num_tokens_per_expert,
        num_local_experts=request.num_experts // ranks,
        num_worst_tokens=worst,
        post_counts=worst == 0,
        payload=request.payload,
        expanded=expanded,
    )
    if capturing or (worst and received.overflow_stream):
        received = memory.copy_out(received, worst)
    return plan, received, expanded


def acquire(
    engine: CudaEngine, spec: ReceiveSpec, capacity: int, is_guess: bool, capturing: bool, stream: int
) -> ReceiveArrays:
    """Memory for `capacity` rows, or fewer if that is a guess, on the current stream, `stream`."""
    memory = engine.symmetric
    if capturing:
        received = memory.acquire_for_graph(spec, capacity)
    else:
        received = memory.acquire(spec, capacity, is_guess, stream)
    if received is None:
        size = spec.num_bytes(capacity)
        got = f"{capacity} rows to receive, {size} bytes"
        full = CapacityError("x", got, memory.shortage(size, capturing), engine.info.rank)
        engine.refuse(Operation.DISPATCH, full, Schedule())
    return received


def _hand_out(
    engine: CudaEngine,
    request: DispatchRequest,
    schedule: Schedule,
    received: ReceiveArrays,
    plan: Plan,
    expanded: ExpandedArrays | None,
) -> Completion | None:
    layout = request.layout
    given = [request.x, request.scales, request.topk_idx, request.topk_weights]
    made = [*received.tensors(), plan.table]
    if expanded is not None:
        made += expanded.tensors()
    if layout is None:
        made.append(plan.in_rank)
    else:
        given += [layout.num_tokens_per_rank, layout.num_tokens_per_expert, layout.is_token_in_rank]
    return hand_out(engine.comm, engine.symmetric.pool.users, schedule, tuple(given), tuple(made))
