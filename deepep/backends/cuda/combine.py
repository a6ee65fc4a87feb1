"""Combines: rows travel back to their tokens' owners and are summed there as they arrive."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepep._core import MAX_TOPK
from deepep.backends.cuda.launch import Plan
from deepep.backends.cuda.memory.tensor_set import Array, TensorSet
from deepep.backends.cuda.sm_split import (
    COPY_ENGINE_BYTES,
    NO_COPY_ENGINE,
    SUMMED_BYTES,
    SUMMING_SMS,
    ce_chunks,
    combine_split,
)
from deepep.backends.cuda.streams import CommStream, behind_caller, hand_out, takes_callers_memory
from deepep.config import DEFAULT_NUM_SMS
from deepep.errors import CapacityError
from deepep.runtime import streams
from deepep.runtime.requests import Combined, CombineRequest, Schedule

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine


def is_usual(engine: CudaEngine, request: CombineRequest) -> bool:
    """True if all checks would pass, as far as that can be said without them; False says nothing."""
    x, route = request.x, request.route
    if (
        route.engine is not engine
        or request.biases
        or type(x) is not Tensor
        or x.dtype is not torch.bfloat16
        or x.device != engine.device
        or x.dim() != 2
    ):
        return False
    weights = request.topk_weights
    if weights is not None and not (
        request.slots is None
        and type(weights) is Tensor
        and weights.dtype is torch.float32
        and weights.device == engine.device
        and weights.dim() == 2
        and weights.shape[0] == route.num_rows
        and weights.shape[1] <= MAX_TOPK
        and weights.is_contiguous()
        and not weights.is_neg()
    ):
        return False
    row_bytes = x.shape[1] * 2
    return (
        (x.shape[0] == route.num_rows or request.slots is not None)
        and row_bytes > 0
        and row_bytes % 16 == 0
        and x.is_contiguous()
        and not x.is_neg()
        and x.data_ptr() % 16 == 0
    )


def sums_expanded(x: Tensor, num_sms: int) -> bool:
    """True if a combine sums expanded rows x [X, H] itself, no slower than a pass of all SMs before it."""
    return (
        x.dtype is torch.bfloat16
        and x.is_contiguous()
        and not x.is_neg()
        and x.data_ptr() % 16 == 0
        and ((num_sms or DEFAULT_NUM_SMS) >= SUMMING_SMS or x.numel() * 2 <= SUMMED_BYTES)
    )


def check_staging(engine: CudaEngine, request: CombineRequest, plan: Plan) -> None:
    """The rows that come back have room. Raises CapacityError."""
    topk = 0 if request.topk_weights is None else request.num_topk
    room = engine.symmetric.endpoint.staging_capacity(request.x.shape[1] * 2, topk)
    coming = plan.num_tokens * (engine.info.num_ranks - 1) if plan.returning is None else plan.returning
    if coming > room:
        allowed = f"at most {room}: set DEEPEP_SYMMETRIC_BYTES higher"
        raise CapacityError("x", f"{coming} rows coming back", allowed)


def combine(engine: CudaEngine, request: CombineRequest, plan: Plan, schedule: Schedule) -> Combined:
    """A combine of a checked request, under the engine's lock."""
    if schedule.after is None and not schedule.asynchronous:
        return Combined(*_launch(engine, request, plan, streams.current_address(engine.index)))
    given = (request.x, request.topk_weights, *request.biases, request.slots, request.factors, plan.table)
    fork, users = engine.symmetric.endpoint.domain, engine.symmetric.pool.users
    if takes_callers_memory(schedule):
        made = _launch(engine, request, plan, behind_caller(engine.comm, fork))
        return Combined(*made, hand_out(engine.comm, users, schedule, (*given, *made), ()))
    with CommStream(engine.comm, fork, schedule.after) as stream:
        made = _launch(engine, request, plan, stream)
    return Combined(*made, hand_out(engine.comm, users, schedule, given, made))


@lru_cache(256)
def _outputs(tokens: int, hidden: int, topk: int | None, device: torch.device) -> TensorSet:
    """Sums [T, H] bf16, and, if there are any, weights [T, K] float32."""
    weights = [] if topk is None else [Array((tokens, topk), torch.float32)]
    return TensorSet(device, [Array((tokens, hidden), torch.bfloat16), *weights])


def _launch(
    engine: CudaEngine, request: CombineRequest, plan: Plan, stream: int
) -> tuple[Tensor, Tensor | None]:
    """The launch on `stream`, into memory of the current stream. That is another only if the caller holds
    what the kernel reads and writes.
    """
    x, weights, slots, tokens, device = (
        *(request.x, request.topk_weights, request.slots),
        *(plan.num_tokens, engine.device),
    )
    sms, ranks = max(1, min(request.num_sms or DEFAULT_NUM_SMS, engine.sms)), engine.info.num_ranks
    topk = None if weights is None else request.num_topk
    out, *of_weights = _outputs(tokens, x.shape[1], topk, device).make()
    out_weights = of_weights[0] if of_weights else None
    if engine.lines is not None and engine.lines.asks:
        engine.lines.attach(engine.symmetric.endpoint.domain)
    by_copy_engine = slots is None and x.numel() * 2 >= COPY_ENGINE_BYTES * (ranks - 1)
    engine.symmetric.endpoint.combine(
        x,
        plan,
        combine_split(sms, ranks, expanded=slots is not None),
        stream,
        slots=slots,
        factors=request.factors,
        topk_weights=weights,
        biases=request.biases,
        out=out,
        out_weights=out_weights,
        ce_chunks=ce_chunks(sms, ranks) if by_copy_engine else NO_COPY_ENGINE,
    )
    caller = streams.current_address(engine.index)
    if plan.stream != stream and plan.stream != caller:
        plan.table.record_stream(streams.current(engine.index) if stream == caller else engine.comm)
    return out, out_weights
