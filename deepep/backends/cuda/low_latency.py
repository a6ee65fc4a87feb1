"""Low-latency operations of the CUDA backend: this library's kernels, and what they leave to NCCL.

A call is a launch, or two with a hook: between them nothing of this library runs. Nothing of the host crosses
ranks, but where sizes and formats are new (low_latency_state.py). What the kernels do not do goes by NCCL, by
a rule that all ranks decide alike: sizes beyond `served`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.low_latency_checks import (
    checked_combine,
    checked_dispatch,
    is_usual_combine,
    key_of,
    served,
    usual_dispatch,
)
from deepep.backends.cuda.low_latency_launch import (
    Halves,
    LowLatencyArrays,
    LowLatencyFormat,
    LowLatencyPlan,
)
from deepep.backends.cuda.low_latency_state import LowLatencyState
from deepep.backends.cuda.streams import behind_caller, hand_out
from deepep.backends.reference.low_latency import LowLatencyOperations
from deepep.errors import ArgumentError, DeepEPError, MismatchError
from deepep.runtime import streams
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.low_latency_checks import check_levels
from deepep.runtime.requests import (
    Hook,
    LowLatencyCombined,
    LowLatencyCombineRequest,
    LowLatencyDispatched,
    LowLatencyDispatchRequest,
    LowLatencyRoute,
    Operation,
    Schedule,
)

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine


class CudaLowLatency:
    """The low-latency operations of one engine."""

    def __init__(self, control: ControlPlane, engine: CudaEngine, turns: _cuda.Turns) -> None:
        self._control = control
        self._nccl = LowLatencyOperations(control, engine)
        self.state = LowLatencyState(control, engine, turns)

    # dispatch

    def dispatch(
        self, engine: CudaEngine, request: LowLatencyDispatchRequest, schedule: Schedule
    ) -> LowLatencyDispatched:
        """Into fixed slots."""
        operation, state = Operation.LOW_LATENCY_DISPATCH, self.state
        with self._control.issuing:
            is_agreed, late = True, None
            form = usual_dispatch(request, state.agreed, engine.index, state.last_dispatch)
            try:
                if self._control.pending_hook is not None:
                    raise self._control.hook_pending_error()
                if engine.domains is not None:
                    check_levels(engine.info, schedule)
                if form is None:
                    form = checked_dispatch(request, engine)
                    is_agreed = key_of(request) in state.agreed
            except ArgumentError as problem:
                state.refuse(operation, problem, schedule)
            if state.unsettled or state.has_fault():
                late = state.late_error()
            if is_agreed:
                done = self._dispatch(engine, request, form, schedule)
            elif served(form.num_ranks, form.num_max_tokens, request.num_experts):
                state.agree(operation, form)
                state.agreed[key_of(request)] = form
                done = self._dispatch(engine, request, form, schedule)
            else:
                state.announce(operation)
                done = self._nccl.dispatch(request, schedule)
            self._nccl.staged = None
            if late is not None:
                _end_with(late, done.hook)
            return done

    def _dispatch(
        self,
        engine: CudaEngine,
        request: LowLatencyDispatchRequest,
        form: LowLatencyFormat,
        schedule: Schedule,
    ) -> LowLatencyDispatched:
        """A call that all ranks have agreed on."""
        endpoint = self.state.memory.endpoint
        if engine.lines is not None and engine.lines.asks:
            engine.lines.attach(endpoint.domain)
        if self._control.waits.asks and request.wait_nanoseconds is None:
            sums = self._control.waits.of_kernels("low_latency_dispatch", engine.device)
            request = replace(request, wait_nanoseconds=sums)
        given, waits = (request.x, request.topk_idx, request.topk_weights), request.wait_nanoseconds
        blocks = min(form.num_blocks, request.num_sms) if request.num_sms else form.num_blocks
        completion = hook = None
        if not schedule.asynchronous:
            stream = streams.current_address(engine.index)
            out, plan = form.outputs(request.x.shape[0], engine.device, stream)
            if schedule.hook:
                endpoint.dispatch(plan, *given, out, Halves.SEND, blocks, stream)
                hook = self._dispatch_hook(engine, request, plan, out, blocks)
            else:
                endpoint.dispatch(plan, *given, out, Halves.BOTH, blocks, stream, waits)
                if request.expert_counts is not None:
                    _add_counts(request.expert_counts, out)
        else:
            out, plan = form.outputs(request.x.shape[0], engine.device, streams.current_address(engine.index))
            stream = behind_caller(engine.comm, endpoint.domain)
            endpoint.dispatch(plan, *given, out, Halves.BOTH, blocks, stream, waits)
            if request.expert_counts is not None:
                with streams.switched(engine.comm):
                    _add_counts(request.expert_counts, out)
            held = (*given, request.expert_counts, waits, *out.tensors())
            completion = hand_out(engine.comm, None, schedule, held, ())
        route = LowLatencyRoute(
            out.source, out.ranges, form.num_max_tokens, form.hidden, request.num_experts, engine, plan
        )
        return LowLatencyDispatched(out.x, out.scales, out.count, route, completion, hook)

    def _dispatch_hook(
        self,
        engine: CudaEngine,
        request: LowLatencyDispatchRequest,
        plan: LowLatencyPlan,
        out: LowLatencyArrays,
        blocks: int,
    ) -> Hook:
        endpoint, counts = self.state.memory.endpoint, request.expert_counts
        given = (request.x, request.topk_idx, request.topk_weights)

        def receive(stream: int) -> None:
            endpoint.dispatch(plan, *given, out, Halves.RECEIVE, blocks, stream, request.wait_nanoseconds)
            if stream != plan.stream:
                _record((plan.table, *out.tensors()), engine.index)
            if counts is not None:
                _add_counts(counts, out)

        return self._hook(engine, Operation.LOW_LATENCY_DISPATCH, receive)

    # combine

    def combine(
        self, engine: CudaEngine, request: LowLatencyCombineRequest, schedule: Schedule
    ) -> LowLatencyCombined:
        """A weighted sum over k, ascending."""
        operation, state, route = Operation.LOW_LATENCY_COMBINE, self.state, request.route
        with self._control.issuing:
            late = None
            plan = route.plan if isinstance(route.plan, LowLatencyPlan) else None
            try:
                if self._control.pending_hook is not None:
                    raise self._control.hook_pending_error()
                if engine.domains is not None:
                    check_levels(engine.info, schedule, request.use_logfmt)
                if plan is None or not is_usual_combine(request, plan, engine, state.last_combine):
                    plan = checked_combine(request, engine)
                x = self._nccl.staged_rows(route) if request.zero_copy else request.x
            except ArgumentError as problem:
                state.refuse(operation, problem, schedule)
            if state.unsettled or state.has_fault():
                late = state.late_error()
            if plan is not None:
                if not state.is_ready:  # other ranks take part than did in the dispatch
                    state.agree(operation, plan.form)
                done = self._combine(engine, request, x, plan, schedule)
            else:
                state.announce(operation)
                done = self._nccl.combine(request, schedule)
            self._nccl.staged = None
            if late is not None:
                _end_with(late, done.hook)
            return done

    def _combine(
        self,
        engine: CudaEngine,
        request: LowLatencyCombineRequest,
        x: Tensor,
        plan: LowLatencyPlan,
        schedule: Schedule,
    ) -> LowLatencyCombined:
        """A call whose dispatch all ranks have agreed on."""
        endpoint = self.state.memory.endpoint
        if engine.lines is not None and engine.lines.asks:
            engine.lines.attach(endpoint.domain)
        given, waits = (x, request.topk_idx, request.topk_weights), request.wait_nanoseconds
        if self._control.waits.asks and waits is None:
            waits = self._control.waits.of_kernels("low_latency_combine", engine.device)
        most = plan.form.num_blocks
        blocks = min(most, request.num_sms) if request.num_sms else most
        completion = hook = None
        if not schedule.asynchronous:
            stream = streams.current_address(engine.index)
            out = request.out
            if out is None:
                out = plan.form.sums(plan.num_tokens, engine.device)
            halves = Halves.SEND if schedule.hook else Halves.BOTH
            endpoint.combine(plan, *given, out, halves, blocks, stream, request.use_logfmt, waits)
            if plan.stream != stream:
                _record((plan.table,), engine.index)
            if schedule.hook:
                hook = self._combine_hook(engine, given, plan, out, blocks, request.use_logfmt, waits)
        else:
            out = request.out
            if out is None:
                out = plan.form.sums(plan.num_tokens, engine.device)
            stream = behind_caller(engine.comm, endpoint.domain)
            endpoint.combine(plan, *given, out, Halves.BOTH, blocks, stream, request.use_logfmt, waits)
            if plan.stream != stream and plan.stream != streams.current_address(engine.index):
                plan.table.record_stream(engine.comm)
            held = (*given, plan.table, out, waits)
            completion = hand_out(engine.comm, None, schedule, held, ())
        return LowLatencyCombined(out, completion, hook)

    def _combine_hook(
        self,
        engine: CudaEngine,
        given: tuple[Tensor, Tensor, Tensor],
        plan: LowLatencyPlan,
        out: Tensor,
        blocks: int,
        in_logfmt: bool,
        waits: Tensor | None,
    ) -> Hook:
        endpoint, sent_on = self.state.memory.endpoint, streams.current_address(engine.index)

        def receive(stream: int) -> None:
            endpoint.combine(plan, *given, out, Halves.RECEIVE, blocks, stream, in_logfmt, waits)
            if stream != sent_on:
                _record((plan.table, out), engine.index)

        return self._hook(engine, Operation.LOW_LATENCY_COMBINE, receive)

    def combine_buffer(self, route: LowLatencyRoute) -> Tensor:
        """[L, R*M, H] bf16: where the next zero-copy combine reads from. Kernels read them where they lie."""
        return self._nccl.combine_buffer(route)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the rows that the next zero-copy combine reads from."""
        return self._nccl.staged_bytes

    def release(self) -> DeepEPError | None:
        """Lets go of memory and of staged rows. Collective. Returns what kernels had reported."""
        self._nccl.staged = None
        return self.state.release()

    # hooks

    def _hook(self, engine: CudaEngine, operation: Operation, receive: Callable[[int], None]) -> Hook:
        """A hook that receives, once, on the stream that is current when it is called."""
        control, state = self._control, self.state

        is_called = False

        def hook() -> None:
            nonlocal is_called
            with control.issuing:
                if is_called:
                    return
                control.check_alive()
                is_called = True
                control.forget_hook()
                receive(streams.current_address(engine.index))
                late = state.late_error()
            if late is not None:
                raise late

        control.await_hook(operation, hook)
        return hook


def _end_with(late: MismatchError, hook: Hook | None) -> NoReturn:
    """Ends a call whose results nobody will see: all of it is made, or ranks would no longer be in step."""
    if hook is not None:
        hook()
    raise late


def _add_counts(counts: Tensor, out: LowLatencyArrays) -> None:
    """Adds the rows received to the caller's counts [L], on the current stream."""
    with torch.inference_mode():  # they may have been made in it
        counts.add_(out.count)


def _record(tensors: tuple[Tensor | None, ...], device: int) -> None:
    """The current stream uses them, which is not the one that they belong to."""
    stream = streams.current(device)
    for tensor in tensors:
        if tensor is not None:
            tensor.record_stream(stream)
