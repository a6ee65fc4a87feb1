"""Cached dispatches: along the route of an earlier one, prepared once and then launched with addresses alone.

A cached dispatch is made again and again with rows of one kind, and little of it is new: three or four
addresses. So it is kept with its route, and the next one is compared with that alone. A call takes some 20 us
of the host, most of it torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.dispatch import acquire
from deepep.backends.cuda.launch import Plan
from deepep.backends.cuda.memory.arrays import Templates, receive_spec
from deepep.backends.cuda.memory.heap import SymmetricMemory
from deepep.backends.cuda.sm_split import dispatch_split
from deepep.backends.cuda.streams import CommStream, hand_out
from deepep.config import DEFAULT_NUM_SMS
from deepep.runtime import streams
from deepep.runtime.requests import Dispatched, DispatchRequest, Route, Schedule

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine


@dataclass(frozen=True, slots=True, eq=False)
class CachedDispatch:
    """A dispatch along one plan, prepared for rows of one kind.

    x [T, H] of `dtype`; scales: (dtype, shape, strides) of theirs, or None. templates: of what is received,
    for as many rows as any rank receives; num_bytes: of them. call: the kernel's arguments but for addresses.
    memory: where it received. payload: as of DispatchRequest.
    """

    engine: CudaEngine
    plan: Plan
    device: int
    shape: torch.Size
    dtype: torch.dtype
    scales: tuple[torch.dtype, torch.Size, tuple[int, ...]] | None
    num_sms: int
    templates: Templates
    num_bytes: int
    call: _cuda.CachedDispatch
    memory: SymmetricMemory
    payload: int

    def addresses(self, x: object, scales: object, num_sms: int) -> tuple[int, int] | None:
        """Of x and of scales (0: none), if a call with these passes all checks and differs in them alone."""
        if not (
            type(x) is Tensor
            and x.dtype is self.dtype
            and x.shape == self.shape
            and x.get_device() == self.device
            and x.is_contiguous()
            and not x.is_neg()
            and num_sms == self.num_sms
        ):
            return None
        address = x.data_ptr()
        if address % 16 != 0:
            return None
        if self.scales is None:
            return (address, 0) if scales is None else None
        if (
            type(scales) is Tensor
            and not scales.is_neg()
            and scales.get_device() == self.device
            and (scales.dtype, scales.shape, scales.stride()) == self.scales
        ):
            return address, scales.data_ptr()
        return None

    def launch(self, x: object, scales: object, num_sms: int) -> Tensor | tuple[Tensor, Tensor] | None:
        """Makes it now, on the current stream. Returns the rows received, and their scales; None: it was not
        made, and is to be made the usual way.
        """
        given = self.addresses(x, scales, num_sms)
        if given is None or self.payload:
            return None
        engine, memory = self.engine, self.memory
        with engine.issuing:
            stream = streams.current_address(self.device)
            if (
                engine.unsettled
                or engine.symmetric is not memory
                or stream != self.plan.stream
                or self.num_bytes > memory.overflow.num_bytes  # it is to grow first
                or engine.has_fault()
                or torch.cuda.is_current_stream_capturing()
            ):
                return None
            made = memory.pool.acquire_now(self.templates, stream)
            if made is None:
                return None
            to_scales = 0 if self.scales is None else made[1].data_ptr()
            memory.endpoint.domain.dispatch_cached(self.call, *given, made[0].data_ptr(), to_scales, stream)
            rows = self.plan.num_rows
            if rows != made[0].shape[0]:
                for tensor in made:
                    tensor.resize_(rows, tensor.shape[1])
            return made[0] if self.scales is None else (made[0], made[1])


def cached(
    engine: CudaEngine, request: DispatchRequest, route: Route, schedule: Schedule, capturing: bool
) -> Dispatched:
    """A dispatch along the request's route, of a checked request, under the engine's lock."""
    plan = route.plan
    assert isinstance(plan, Plan)
    x, scales = request.x, request.scales
    if schedule.after is None and not schedule.asynchronous:
        received = _launch(engine, request, route, plan, capturing, streams.current_address(engine.index))
        return Dispatched(*received, None, None, [], route)
    with CommStream(engine.comm, engine.symmetric.endpoint.domain, schedule.after) as stream:
        received = _launch(engine, request, route, plan, capturing, stream)
    completion = hand_out(engine.comm, engine.symmetric.pool.users, schedule, (x, scales), received)
    return Dispatched(*received, None, None, [], route, completion)


def _launch(
    engine: CudaEngine, request: DispatchRequest, route: Route, plan: Plan, capturing: bool, stream: int
) -> tuple[Tensor, Tensor | None]:
    """The launch on the current stream, `stream`. What it prepares stays with the route."""
    x, scales, memory = request.x, request.scales, engine.symmetric
    capacity = max(64, plan.num_rows if plan.most_rows is None else plan.most_rows)
    spec = receive_spec(x, scales, None, with_source=False)
    received = acquire(engine, spec, capacity, False, capturing, stream)
    known = route.cached
    if (
        isinstance(known, CachedDispatch)
        and known.memory is memory
        and known.payload == request.payload
        and known.addresses(x, scales, request.num_sms) is not None
    ):
        call = known.call
    else:
        split = dispatch_split(
            max(1, min(request.num_sms or DEFAULT_NUM_SMS, engine.sms)), engine.info.num_ranks
        )
        call = memory.endpoint.prepare_cached(x, scales, split, capacity, plan, request.payload)
        if not capturing:  # or templates would be made in the graph's memory
            route.cached = CachedDispatch(
                engine=engine,
                plan=plan,
                device=engine.index,
                shape=x.shape,
                dtype=x.dtype,
                scales=None if scales is None else (scales.dtype, scales.shape, scales.stride()),
                num_sms=request.num_sms,
                templates=spec.templates(capacity, engine.device),
                num_bytes=spec.num_bytes(capacity),
                call=call,
                memory=memory,
                payload=request.payload,
            )
    memory.endpoint.domain.dispatch_cached(
        call,
        x.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        received.x.data_ptr(),
        0 if received.scales is None else received.scales.data_ptr(),
        stream,
    )
    if plan.stream != stream:
        plan.table.record_stream(streams.current(engine.index))
    if capturing or received.overflow_stream:
        received = memory.copy_out(received, plan.num_rows)
    elif plan.num_rows != capacity:
        received.cut(plan.num_rows)
    return received.x, received.scales
