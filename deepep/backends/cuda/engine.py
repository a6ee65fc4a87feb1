"""The CUDA backend: high-throughput operations by kernels over NVLink, inside one node.

One file an operation: dispatch.py, cached.py, combine.py, layout.py; low_latency.py has the low-latency ones,
with memory and state of their own. members.py changes who takes part; routes.py reads what dispatches leave.
This file is the engine around them: its control plane, its symmetric memory, what it refuses, and what
kernels have reported.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda import checks as cuda_checks
from deepep.backends.cuda import combine, dispatch, spread
from deepep.backends.cuda.cached import cached
from deepep.backends.cuda.domains import Domains, is_divided
from deepep.backends.cuda.engram import CudaEngram
from deepep.backends.cuda.gather_sessions import CudaSessions
from deepep.backends.cuda.launch import MAX_COUNTED_TOKENS, Counts, Endpoint, Phase
from deepep.backends.cuda.layout import LayoutKernel
from deepep.backends.cuda.local_rows import RowKernels
from deepep.backends.cuda.low_latency import CudaLowLatency
from deepep.backends.cuda.members import CudaMembers
from deepep.backends.cuda.memory.generations import Generations
from deepep.backends.cuda.memory.heap import SymmetricMemory, symmetric_bytes
from deepep.backends.cuda.memory.ipc import SymmetricHeap
from deepep.backends.cuda.remembered import Remembered
from deepep.backends.cuda.ring import CudaRing
from deepep.backends.cuda.routes import CudaRoutes, plan_of
from deepep.backends.cuda.streams import CommStream, hand_out
from deepep.backends.cuda.warp_lines import KernelLines
from deepep.errors import (
    ArgumentError,
    CapacityError,
    DeepEPError,
    FaultRecord,
    HandleError,
    MismatchError,
    PeerTimeoutError,
)
from deepep.runtime import checks, streams
from deepep.runtime.completion import Completion
from deepep.runtime.control.issue import LAST_MOMENT, ControlPlane
from deepep.runtime.control.waits import WaitRecorder
from deepep.runtime.engine import EngineInfo, EngineOptions, Made, Observer
from deepep.runtime.requests import (
    RANKS_PER_DOMAIN,
    Combined,
    CombineRequest,
    Dispatched,
    DispatchRequest,
    Layout,
    LowLatencyCombined,
    LowLatencyCombineRequest,
    LowLatencyDispatched,
    LowLatencyDispatchRequest,
    LowLatencyRoute,
    Operation,
    Schedule,
)

_BY_KERNELS = (
    *("layout", "dispatch", "cached dispatch", "combine"),
    *("low-latency dispatch", "low-latency combine"),
)
OPERATIONS = {
    **dict.fromkeys(_BY_KERNELS, "CUDA kernels"),
    "barrier": "all_gather over gloo",
    "all-gather sessions": "cudaMemcpyAsync, a barrier kernel behind it",
    "sends around a ring": "cudaMemcpyAsync, kernels of one warp around it",
    "Engram storage": "peers' memory, read where it lies",
}


OPERATIONS_BETWEEN_DOMAINS = {
    **OPERATIONS,
    **dict.fromkeys(_BY_KERNELS[1:], "CUDA kernels, puts over NVSHMEM"),
    **dict.fromkeys(("all-gather sessions", "sends around a ring", "Engram storage"), "not between domains"),
}


def _memory_of_one_domain(
    rank: int, live: int, timeout: float, turns: _cuda.Turns, heap: SymmetricHeap
) -> SymmetricMemory:
    """A quarter of the heap is for rows that combine returns."""
    endpoint = Endpoint(
        rank, heap.own, heap.addresses, staging_bytes=heap.own.numel() // 4, timeout=timeout, turns=turns
    )
    endpoint.set_live(live)
    return SymmetricMemory(endpoint)


class CudaEngine(CudaRoutes, CudaMembers):
    """See `Engine`.

    symmetric: symmetric memory, there from the first dispatch or combine on. unsettled: something is to be
    done or raised before the next operation (`_settle`). has_fault: whether a kernel has reported one since.
    last_layout: a layout of ours and its indices, kept until the next: only of tensors that live is it
    certain which they are. last_dispatch: by top-k, that needs no checks again. rows_seen: the most rows of
    recent dispatches; expanded_seen: and of those spread.
    """

    symmetric: SymmetricMemory
    has_fault: Callable[[], bool]
    lines: KernelLines | None

    def __init__(self, options: EngineOptions, control: ControlPlane) -> None:
        session, self._control = control.session, control
        assert session.stream is not None
        self.comm, self.device, self.index = session.stream, session.device, session.stream.device_index
        self.issuing = control.issuing
        self.info = EngineInfo(
            "cuda",
            session.rank,
            session.num_ranks,
            "cuda",
            options,
            operations=OPERATIONS_BETWEEN_DOMAINS if is_divided(options, session.num_ranks) else OPERATIONS,
            ranks_per_domain=options.ranks_per_domain or RANKS_PER_DOMAIN,
        )
        self.sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.local_rows = RowKernels(self.index)
        self.lines = None if is_divided(options, session.num_ranks) else KernelLines(self)
        self.last_layout: tuple[Tensor, Layout] | None = None
        self.last_dispatch = Remembered()
        self.rows_seen = self.expanded_seen = 0
        self._num_bytes = symmetric_bytes(options.symmetric_bytes)
        self._turns = _cuda.Turns()
        # The bytes for low latency are memory between domains alone.
        needs_room = options.low_latency and is_divided(options, session.num_ranks)
        about_low_latency = {"num_rdma_bytes": options.low_latency_bytes} if needs_room else {}
        control.agree({**options.statement(), "symmetric_bytes": self._num_bytes, **about_low_latency})
        self.domains = Domains.of(options, session.rank, session.num_ranks, self.index)
        reach = None if self.domains is None else self.domains.neighbours
        self._generations = Generations(control.membership, self.device, "build", reach)
        self._low_latency = CudaLowLatency(self._control, self, self._turns)
        self._sessions = CudaSessions(self._control, self, self._turns)
        self._ring = CudaRing(self._control, self, self._turns)
        self._engram = CudaEngram(self._control, self, self._turns)
        self._layout_kernel = LayoutKernel(session.num_ranks, self.device)
        self.live = control.membership.live
        self._is_built = False
        self._must_build = self.unsettled = True
        self._refused = False
        self._fault: FaultRecord | None = None
        self._control.waits.on_change = self._measure
        self._generations.free()  # of buffers that are no more: the peers have come here, too

    # operations

    def layout(
        self, topk_idx: Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        with self.issuing:
            try:
                checks.check_topk_idx(topk_idx, self.info.device_type)
                checks.check_num_experts(num_experts, self.info.num_ranks)
            except ArgumentError as problem:
                # A dispatch would have come next: there the others, who call it, learn why not.
                self.refuse(Operation.DISPATCH, problem, schedule)
            kernel, completion = self._layout_kernel, None
            if schedule.after is None and not schedule.asynchronous:
                stream = streams.current_address(self.index)
                made = kernel.launch(topk_idx, num_experts, self.info.ranks_per_domain, stream)
            else:
                with CommStream(self.comm, kernel.domain, schedule.after) as stream:
                    made = kernel.launch(topk_idx, num_experts, self.info.ranks_per_domain, stream)
                completion = hand_out(self.comm, None, schedule, (topk_idx,), made)
            layout = Layout(*made)
            self.last_layout = topk_idx, layout
            return layout, completion

    def dispatch(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        route = request.route
        with self.issuing:
            try:
                if not dispatch.is_usual(self, request):
                    self._check_dispatch(request)
                if self.domains is not None:
                    self.domains.check_dispatch(request)
                known = route or request.known_route
                if known is not None and plan_of(known).live != self.live:
                    got = "one made while other ranks were masked"
                    raise HandleError("handle", got, "a new dispatch")
            except ArgumentError as problem:
                self.refuse(Operation.DISPATCH, problem, schedule)
            if request.num_experts and (self.domains is not None or request.x.shape[0] > MAX_COUNTED_TOKENS):
                request, schedule = self.with_layout(request, schedule)
            capturing = torch.cuda.is_current_stream_capturing()
            if self.unsettled or self.has_fault():
                self._settle(Operation.DISPATCH, capturing)
            if route is not None:
                return cached(self, request, route, schedule, capturing)
            return dispatch.fresh(self, request, schedule, capturing)

    def combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        with self.issuing:
            try:
                if not combine.is_usual(self, request):
                    checks.check_own(request.route, self)
                    checks.check_combine(request, self.info.device_type)
                    cuda_checks.check_combine(request, self.device)
                plan = plan_of(request.route)
                combine.check_staging(self, request, plan)
                if self.domains is not None:
                    self.domains.check_combine(request, plan)
            except ArgumentError as problem:
                self.refuse(Operation.COMBINE, problem, schedule)
            if self.unsettled or self.has_fault():
                self._settle(Operation.COMBINE, torch.cuda.is_current_stream_capturing())
            return combine.combine(self, request, plan, schedule)

    def sums_expanded(self, x: Tensor, num_sms: int = 0) -> bool:
        return self.domains is None and combine.sums_expanded(x, num_sms)

    def spreads_rows(self, num_experts: int, num_topk: int, num_max_tokens: int, num_sms: int = 0) -> bool:
        return self.domains is None and spread.spreads_rows(num_experts, num_topk, num_max_tokens, num_sms)

    def low_latency_dispatch(
        self, request: LowLatencyDispatchRequest, schedule: Schedule
    ) -> LowLatencyDispatched:
        return self._low_latency.dispatch(self, request, schedule)

    def low_latency_combine(
        self, request: LowLatencyCombineRequest, schedule: Schedule
    ) -> LowLatencyCombined:
        return self._low_latency.combine(self, request, schedule)

    def low_latency_combine_buffer(self, route: LowLatencyRoute) -> Tensor:
        return self._low_latency.combine_buffer(route)

    def barrier(self, schedule: Schedule, arguments: dict[str, int] | None = None) -> None:
        self._control.barrier(schedule, arguments)

    def stream_barrier(self) -> None:
        with self.issuing:
            if self.domains is not None:
                self._control.barrier(Schedule())
                return
            if self.unsettled:
                self._settle(Operation.BARRIER, torch.cuda.is_current_stream_capturing())
            self.symmetric.endpoint.barrier(streams.current_address(self.index))

    def locally(
        self,
        make: Callable[[], Made],
        fill: Callable[[Made], None],
        given: Sequence[Tensor | None],
        schedule: Schedule,
    ) -> tuple[Made, Completion | None]:
        with self.issuing:
            if schedule.after is None and not schedule.asynchronous:
                made = make()
                fill(made)
                return made, None
            with CommStream(self.comm, self._layout_kernel.domain, schedule.after):
                made = make()
                fill(made)
            return made, hand_out(self.comm, None, schedule, tuple(given), tuple(made))

    # refusals, faults, memory

    def _check_dispatch(self, request: DispatchRequest) -> None:
        if request.route is not None:
            checks.check_own(request.route, self)
        checks.check_dispatch(request, self.info.device_type, self.info.num_ranks)
        cuda_checks.check_dispatch(request, self.device, self.info.num_ranks)

    def refuse(self, operation: Operation, problem: ArgumentError, schedule: Schedule) -> NoReturn:
        """Refuses an operation: the kernels of the others learn it in their own call, and they raise
        MismatchError, at the latest in their next.
        """
        if operation in (Operation.LOW_LATENCY_DISPATCH, Operation.LOW_LATENCY_COMBINE):
            with self.issuing:
                self._low_latency.state.refuse(operation, problem, schedule)
        if operation not in (Operation.DISPATCH, Operation.COMBINE):
            self._control.refuse(operation, problem, schedule)
        if self.unsettled or self.has_fault():
            self._settle(operation, torch.cuda.is_current_stream_capturing())
        self._launch_refusal(operation)
        self.symmetric.endpoint.wait()
        with contextlib.suppress(MismatchError):  # that is this rank's own doing
            self._raise_fault()
        raise problem.at(self.info.rank)

    def _launch_refusal(self, operation: Operation) -> None:
        stream = streams.current_address(self.index)
        if operation is Operation.DISPATCH:
            self.symmetric.endpoint.refuse_dispatch(stream)
        else:
            self.symmetric.endpoint.refuse_combine(stream)

    def _settle(self, operation: Operation, capturing: bool) -> None:
        """Before an operation is issued: raises what stands in its way; builds memory if there is none, or if
        the ranks have changed. While a graph is captured nothing of this can be done.

        After a time-out the ranks' kernels no longer count alike, and a rank that comes late may still write
        to this one's memory. So nothing runs until the missing ranks are masked; and then on other memory:
        when the old is freed, memory/generations.py decides.
        """
        if capturing:
            if not self._is_built:
                allowed = "after one outside of a graph, which makes symmetric memory"
                raise ArgumentError(operation.label, "captured, the first of its buffer", allowed)
            return
        if self._fault is not None:
            raise PeerTimeoutError(self._fault)
        if self._must_build:
            self._build()
        if self._refused:  # what this rank refused, all ranks disagree about: it knows
            self.symmetric.endpoint.wait()
            self._refused = self.unsettled = False
            with contextlib.suppress(MismatchError):
                self._raise_fault()
        if not self.has_fault():
            return
        try:
            self._raise_fault()
        except ArgumentError:
            # The call is not made here, so it must not be made anywhere: the ranks stay in step.
            self._launch_refusal(operation)
            self._refused = self.unsettled = True
            raise

    def _build(self) -> None:
        """Symmetric memory over the ranks that take part; collective."""
        membership, timeout, live = self._control.membership, self.info.options.timeout, self.live

        self._control.check_alive()
        self._is_built, self.unsettled = False, True
        try:
            with torch.cuda.device(self.index):
                make = functools.partial(_memory_of_one_domain, membership.rank, live, timeout, self._turns)
                if self.domains is not None:
                    part = self.domains.part(membership)
                    make = functools.partial(self.domains.memory, part, live, timeout, self._turns)
                self.symmetric = self._generations.build(self._num_bytes, make)
        except PeerTimeoutError as error:
            self._fault = error.record
            raise
        self.has_fault = self.symmetric.endpoint.domain.has_fault
        self._is_built = True
        self._measure()
        self._must_build = self._refused = self.unsettled = False

    def wait_counts(self, num_local: int) -> Counts:
        """The counts of the dispatch launched last. Raises what kernels have reported."""
        counts = self.symmetric.endpoint.wait_counts(num_local)
        if counts is not None and counts.phase in (0, Phase.TOO_MANY_ROWS):
            return counts
        self.symmetric.endpoint.wait()
        self._raise_fault()
        raise RuntimeError("deepep: a dispatch neither finished nor left a fault record")

    def _raise_fault(self) -> None:
        """Raises what a kernel has reported since the last look."""
        fault = self.symmetric.endpoint.take_fault(streams.current_address(self.index))
        if fault is None:
            return
        if fault.phase == "disagreement":
            ranks = ", ".join(map(str, fault.waited_on))
            raise MismatchError(
                fault.operation,
                f"other shapes, options, masks or handles than on rank {ranks}, or a refusal there",
                "the same on all ranks",
                self.info.rank,
            )
        if fault.phase == "too_many_rows":
            got = f"{fault.seen} rows for rank {', '.join(map(str, fault.waited_on))}"
            raise CapacityError("num_worst_tokens", str(fault.expected), f"at least {got}", self.info.rank)
        self._fault, self.unsettled = fault, True
        raise PeerTimeoutError(fault)

    def gather(self, values: Tensor, agreed: Mapping[str, int]) -> dict[int, Tensor]:
        return self._control.gather(values, agreed)

    def release_memory(self) -> None:
        with self.issuing:
            self._check_not_captured(Operation.RELEASE_MEMORY)
            fault = self._fault or self._low_latency.state.fault
            if fault is not None:
                raise PeerTimeoutError(fault)
            self._take_over_masks()
            self._control.barrier(Schedule(), operation=Operation.RELEASE_MEMORY)
            reported = self._reported() if self._is_built else None  # it is lost with the memory
            self.last_layout = None
            self._is_built, self._must_build, self.unsettled = False, True, True
            try:
                with torch.cuda.device(self.index):
                    self._generations.release()
                    self._sessions.release()
                    reported = self._low_latency.release() or reported
            except PeerTimeoutError as error:
                self._fault = error.record
                raise
            if reported is not None:
                raise reported

    def _reported(self) -> DeepEPError | None:
        """The fault that kernels had reported when all have ended."""
        self.symmetric.endpoint.wait()
        try:
            self._raise_fault()
        except DeepEPError as reported:
            return reported
        return None

    # the end, the rest

    def memory(self) -> dict[str, int]:
        symmetric = self._num_bytes if self._is_built else 0
        return {
            "symmetric memory": symmetric,
            "low-latency memory": self._low_latency.state.num_bytes,
            "session memory": self._sessions.memory(),
            "tensors on their way around the ring": self._ring.memory(),
            "Engram storage": self._engram.memory(),
            "kept memory": sum(generations.num_kept_bytes for generations in self._all_generations()),
            "staged rows": self._low_latency.staged_bytes,
            **({} if self.domains is None else {"memory for puts": self.domains.num_bytes}),
        }

    def endpoint(self) -> Endpoint:
        """The kernels' launcher, for measurements. Collective if there is no memory yet."""
        with self.issuing:
            if self._must_build:
                self._build()
            return self.symmetric.endpoint

    def comm_stream(self) -> torch.cuda.Stream | None:
        return self.comm

    def observe(self, observer: Observer | None) -> None:
        self._control.observer = observer

    def waits(self) -> WaitRecorder:
        return self._control.waits

    def _measure(self) -> None:
        """Has kernels measure what they wait for, or no longer, as the recorder says."""
        with self.issuing:
            if self._is_built:
                recorder = self._control.waits
                sums = recorder.of_throughput_kernels(self.device) if recorder.asks else None
                self.symmetric.endpoint.measure_waits(sums)

    def leave(self) -> None:
        with self.issuing:
            is_quiet = self._retire(wait=True)
            came = self._control.leave(is_quiet)
            self._close_memory(came)

    def abandon(self) -> None:
        with self.issuing:
            self._await_last()
            self._control.abandon(self._retire(wait=False))
            self._close_memory(())

    def close(self) -> None:
        with self.issuing:
            self._await_last()
            self._control.close(self.info.options.timeout, self._retire(wait=False))
            self._close_memory(())

    def _await_last(self) -> None:
        """Gives what was launched last a moment to end: who departs with kernels under way keeps the heaps of
        its peers until its process is gone.
        """
        deadline = time.monotonic() + LAST_MOMENT
        while not self._turns.is_idle() and time.monotonic() < deadline:
            time.sleep(0.001)

    def _retire(self, *, wait: bool) -> bool:
        """Launches nothing more; `Generations.retire`."""
        self._is_built, self._must_build, self.unsettled = False, True, True
        are_quiet = [self._generations.retire(wait=wait)]
        are_quiet += [area.retire(wait=wait) for area in self._areas()]
        return self._low_latency.state.retire(wait=wait) and all(are_quiet)

    def _close_memory(self, came: Collection[int]) -> None:
        for generations in self._all_generations():
            generations.close(came)
        if self.domains is not None and came:
            self.domains.close()
