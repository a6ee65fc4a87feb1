"""Low-latency operations over all_to_all: send and receive halves, joined by a hook or run in one."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from deepep.backends.reference.low_latency_handles import check_handle, check_rows
from deepep.backends.reference.wire import wire_over
from deepep.errors import ArgumentError
from deepep.reference import all_to_all_low_latency as low_latency
from deepep.reference.checks import Reduce
from deepep.reference.wire import Wire
from deepep.runtime import checks
from deepep.runtime.completion import Completion
from deepep.runtime.control.agreement import dtype_code
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.transport import Link
from deepep.runtime.engine import Engine, EngineInfo, Reduction
from deepep.runtime.low_latency_checks import (
    check_levels,
    check_low_latency_combine,
    check_low_latency_dispatch,
)
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


class LowLatencyUnderway(Protocol):
    """An operation whose send half has run, as deepep.reference.all_to_all_low_latency has them."""

    @property
    def wire(self) -> Wire:
        """Between whom."""

    def wait(self) -> object:
        """Blocks until all rows have come."""

    def finish(self, out: Any) -> object:
        """Receives into `out`."""


@dataclass(eq=False)
class KeptFromDispatch:
    """A dispatch's leavings for combines along it, filled in when it sends: the plan of its route.

    topk_weights: [T, K] float32, if it was given some. by_kernels: what another exchange has made.
    """

    topk_weights: Tensor | None = None
    by_kernels: Any = None


class LowLatencyExchange:
    """The send halves of both operations, over all_to_all. A backend may put its own in their place.

    ranks_per_domain: where there are several domains; 0: one has all ranks.
    """

    def __init__(self, ranks_per_domain: int = 0) -> None:
        self._per_domain = ranks_per_domain

    def start_dispatch(
        self, wire: Wire, request: LowLatencyDispatchRequest, kept: KeptFromDispatch, hooked: bool
    ) -> LowLatencyUnderway:
        """Sends, and fills in `kept`; hooked: the receive half runs when the caller says so."""
        return low_latency.start_dispatch(
            wire,
            request.x,
            request.topk_idx,
            request.num_max_tokens,
            request.num_experts,
            fp8=request.use_fp8,
            round_scale=request.round_scale,
            ue8m0=request.use_ue8m0,
        )

    def start_combine(
        self, wire: Wire, request: LowLatencyCombineRequest, reduction: Reduction, hooked: bool
    ) -> LowLatencyUnderway:
        """The same of a combine."""
        route = request.route
        return low_latency.start_combine(
            wire,
            request.x,
            request.topk_idx,
            request.topk_weights,
            route.source_index,
            route.ranges,
            num_max_tokens=route.num_max_tokens,
            num_experts=route.num_experts,
            logfmt=request.use_logfmt,
            reduce=self._reduce(reduction),
            ranks_per_domain=self._per_domain,
        )

    def _reduce(self, reduction: Reduction) -> Reduce:
        if reduction == "domain":
            return "domain" if self._per_domain else "rank"
        return "rank" if reduction == "expert_rank" else "token"


class LowLatencyOperations:
    """The low-latency operations of one engine, over the links of its control plane.

    staged: rows to be filled for the next operation, a zero-copy combine.
    """

    def __init__(
        self, control: ControlPlane, engine: Engine, exchange: LowLatencyExchange | None = None
    ) -> None:
        self._control = control
        self._exchange = exchange or LowLatencyExchange()
        # Weak, or the engine would be freed late: it owns this.
        self._owner = weakref.ref(engine)
        self.staged: Tensor | None = None

    @property
    def _engine(self) -> Engine:
        engine = self._owner()
        assert engine is not None
        return engine

    @property
    def staged_bytes(self) -> int:
        """Bytes of the rows that the next zero-copy combine reads from."""
        return 0 if self.staged is None else self.staged.nbytes

    def dispatch(self, request: LowLatencyDispatchRequest, schedule: Schedule) -> LowLatencyDispatched:
        """Checks and issues a dispatch."""
        engine = self._engine
        with self._control.issuing:
            try:
                check_low_latency_dispatch(request, engine.info)
                check_levels(engine.info, schedule)
                out = self._allocate(request, schedule)
            except ArgumentError as problem:
                engine.refuse(Operation.LOW_LATENCY_DISPATCH, problem, schedule)
            self.staged = None
            done = _dispatch(self._control, engine.info, self._exchange, request, schedule, out)
            done.route.engine = engine
            return done

    def _allocate(
        self, request: LowLatencyDispatchRequest, schedule: Schedule
    ) -> low_latency.LowLatencyTensors:
        """Outputs of a checked request. Raises CapacityError."""
        most, experts, x = request.num_max_tokens, request.num_experts, request.x
        slots = f"{most}, with num_experts = {experts}"
        with (
            checks.memory_for("num_max_dispatch_tokens_per_rank", slots),
            self._control.queue.allocating(schedule.allocate_on_comm_stream),
        ):
            return low_latency.allocate(
                self._control.num_ranks,
                most,
                experts,
                x.shape[1],
                fp8=request.use_fp8,
                ue8m0=request.use_ue8m0,
                device=x.device,
            )

    def combine(self, request: LowLatencyCombineRequest, schedule: Schedule) -> LowLatencyCombined:
        """Checks and issues a combine."""
        engine = self._engine
        with self._control.issuing:
            try:
                checks.check_own(request.route, engine)
                check_low_latency_combine(request, engine.info)
                check_levels(engine.info, schedule, request.use_logfmt)
                if request.zero_copy:
                    request = replace(request, x=self.staged_rows(request.route))
            except ArgumentError as problem:
                engine.refuse(Operation.LOW_LATENCY_COMBINE, problem, schedule)
            self.staged = None
            return _combine(self._control, engine.info, self._exchange, request, schedule)

    def combine_buffer(self, route: LowLatencyRoute) -> Tensor:
        """[L, R*M, H] bf16: where the next zero-copy combine reads from."""
        checks.check_own(route, self._engine)
        # Fresh memory each time: an earlier combine may still be reading from what it was given.
        self.staged = route.ranges.new_empty(self._slot_shape(route), dtype=torch.bfloat16)
        return self.staged

    def staged_rows(self, route: LowLatencyRoute) -> Tensor:
        """The rows that were filled in for a combine along this route. Raises ArgumentError if none were."""
        if self.staged is None or self.staged.shape != self._slot_shape(route):
            allowed = "get_next_low_latency_combine_buffer called since the last low-latency operation"
            raise ArgumentError("zero_copy", "True, with no buffer filled for it", allowed)
        return self.staged

    def _slot_shape(self, route: LowLatencyRoute) -> tuple[int, int, int]:
        num_ranks = self._control.num_ranks
        return route.num_experts // num_ranks, num_ranks * route.num_max_tokens, route.hidden


def _dispatch(
    control: ControlPlane,
    info: EngineInfo,
    exchange: LowLatencyExchange,
    request: LowLatencyDispatchRequest,
    schedule: Schedule,
    out: low_latency.LowLatencyTensors,
) -> LowLatencyDispatched:
    """A checked request, issued."""
    x, topk_idx = request.x.detach(), request.topk_idx.detach()
    weights = None if request.topk_weights is None else request.topk_weights.detach()
    if _may_be_repeated(info, schedule):
        x, topk_idx = x.clone(), topk_idx.clone()
        weights = None if weights is None else weights.clone()
    given = replace(request, x=x, topk_idx=topk_idx, topk_weights=weights)
    underway: list[LowLatencyUnderway] = []
    kept, waits = KeptFromDispatch(), _Waits(request.wait_nanoseconds)

    def inspect() -> None:
        checks.check_index_range(topk_idx, request.num_experts)
        if not schedule.hook:
            waits.begin()

    def send(link: Link) -> None:
        if not schedule.hook:
            waits.end()
        control.enter("send")
        kept.topk_weights = None if weights is None else weights.clone()
        underway.append(exchange.start_dispatch(wire_over(link), given, kept, schedule.hook))

    def receive() -> None:
        started = underway.pop()
        waits.begin(unless_begun=True)
        started.wait()
        waits.end()
        started.finish(out)
        control.acknowledge()
        if request.expert_counts is not None:
            request.expert_counts.add_(out.recv_count)
        waits.add_to_all(started.wire)

    agreed = {
        "num_max_dispatch_tokens_per_rank": request.num_max_tokens,
        "num_experts": request.num_experts,
        "hidden": x.shape[1],
        "num_topk": topk_idx.shape[1],
        "topk_idx dtype": dtype_code(topk_idx.dtype),
        "use_fp8": request.use_fp8,
        "round_scale": request.round_scale,
        "use_ue8m0": request.use_ue8m0,
        "topk_weights given": weights is not None,
    }
    tensors = (
        *(x, topk_idx, weights, request.expert_counts, request.wait_nanoseconds),
        *(out.recv_x, out.recv_scales, out.recv_count, out.recv_src_info, out.layout_range),
    )
    completion, hook = _issue(
        control,
        Operation.LOW_LATENCY_DISPATCH,
        schedule,
        send,
        receive,
        agreed=agreed,
        inspect=inspect,
        waits=waits,
        num_tokens=x.shape[0],
        tensors=tensors,
    )
    sizes = (request.num_max_tokens, x.shape[1], request.num_experts)
    route = LowLatencyRoute(out.recv_src_info, out.layout_range, *sizes, plan=kept)
    return LowLatencyDispatched(out.recv_x, out.recv_scales, out.recv_count, route, completion, hook)


def _combine(
    control: ControlPlane,
    info: EngineInfo,
    exchange: LowLatencyExchange,
    request: LowLatencyCombineRequest,
    schedule: Schedule,
) -> LowLatencyCombined:
    """A checked request, issued; of a zero-copy one, `x` is the staged rows already."""
    route, x = request.route, request.x.detach()
    topk_idx, topk_weights = request.topk_idx.detach(), request.topk_weights.detach()
    out = request.out
    if out is None:
        with control.queue.allocating(schedule.allocate_on_comm_stream):
            out = x.new_empty(topk_idx.shape[0], route.hidden)
    result, waits = out, _Waits(request.wait_nanoseconds)
    underway: list[LowLatencyUnderway] = []
    if _may_be_repeated(info, schedule):
        x, topk_idx, topk_weights = x.clone(), topk_idx.clone(), topk_weights.clone()
    given = replace(request, x=x, topk_idx=topk_idx, topk_weights=topk_weights)

    def inspect() -> None:
        checks.check_index_range(topk_idx, route.num_experts)
        check_handle(route)
        _check_weights(topk_weights, route)
        if not schedule.hook:
            waits.begin()

    def send(link: Link) -> None:
        check_rows(link, topk_idx, route, info.num_ranks)
        if not schedule.hook:
            waits.end()
        control.enter("send")
        underway.append(exchange.start_combine(wire_over(link), given, info.options.reduction, schedule.hook))

    def receive() -> None:
        started = underway.pop()
        waits.begin(unless_begun=True)
        started.wait()
        waits.end()
        started.finish(result)
        control.acknowledge()
        waits.add_to_all(started.wire)

    agreed = {
        "num_max_dispatch_tokens_per_rank": route.num_max_tokens,
        "num_experts": route.num_experts,
        "hidden": route.hidden,
        "num_topk": topk_idx.shape[1],
        "topk_idx dtype": dtype_code(topk_idx.dtype),
        "use_logfmt": request.use_logfmt,
    }
    completion, hook = _issue(
        control,
        Operation.LOW_LATENCY_COMBINE,
        schedule,
        send,
        receive,
        agreed=agreed,
        inspect=inspect,
        waits=waits,
        num_tokens=topk_idx.shape[0],
        tensors=(x, topk_idx, topk_weights, route.source_index, route.ranges, out, request.wait_nanoseconds),
    )
    return LowLatencyCombined(result, completion, hook)


def _may_be_repeated(info: EngineInfo, schedule: Schedule) -> bool:
    """True if a hook may have to send again, when the caller has long had its inputs back."""
    return schedule.hook and info.options.masks


def _issue(
    control: ControlPlane,
    operation: Operation,
    schedule: Schedule,
    send: Callable[[Link], None],
    receive: Callable[[], None],
    *,
    agreed: dict[str, int],
    inspect: Callable[[], None],
    waits: _Waits,
    num_tokens: int,
    tensors: tuple[Tensor | None, ...],
) -> tuple[Completion | None, Hook | None]:
    """Both halves at once, or the first now and the second in the hook that is returned."""

    def body(link: Link, limits: dict[int, int]) -> None:
        send(link)
        if not schedule.hook:
            control.enter("receive")
            receive()

    completion = control.perform(
        operation,
        schedule,
        body,
        agreed=agreed,
        inspect=inspect,
        num_tokens=num_tokens,
        tensors=tensors,
    )
    if schedule.hook:
        received = control.hook(operation, completion, receive, tensors)

        def hook() -> None:
            waits.begin(unless_begun=True)
            received()

        return None, hook
    return control.finish(schedule, completion), None


def _check_weights(topk_weights: Tensor, route: LowLatencyRoute) -> None:
    """They are those that the dispatch was given, if it was given some. Kernels sum with the ones it sent."""
    kept = route.plan.topk_weights if isinstance(route.plan, KeptFromDispatch) else None
    if kept is None:
        return
    if not torch.equal(kept.view(torch.int32), topk_weights.view(torch.int32)):
        raise ArgumentError("topk_weights", "others than the dispatch was given", "the same, bit for bit")


class _Waits:
    """Nanoseconds that this rank waits for the others in one operation: for the late ones, then for rows.

    A hooked call waits from its hook on: what passes before that is no wait. One exchange brings all rows, so
    every other rank is charged the same. On CUDA the host does not wait.

    stats: [R] int64 to add them to, or None.
    """

    def __init__(self, stats: Tensor | None) -> None:
        self._stats = None if stats is None or stats.is_cuda else stats
        self._begun: int | None = None
        self._total = 0

    def begin(self, *, unless_begun: bool = False) -> None:
        """A wait begins now."""
        if self._begun is None or not unless_begun:
            self._begun = time.perf_counter_ns()

    def end(self) -> None:
        """The wait is over, if there was one: an operation that is made again has not begun another."""
        if self._begun is not None:
            self._total += time.perf_counter_ns() - self._begun
            self._begun = None

    def add_to_all(self, wire: Wire) -> None:
        """Charges the other ranks that take part."""
        if self._stats is not None:
            for member in wire.members:
                if member != wire.rank:
                    self._stats[member] += self._total
