"""State around low-latency launches: memory, what ranks have agreed on, refusals, and reported faults.

Ranks agree over the control plane, once, on sizes and formats that are new; that they still do, the digest
beside the flags says from then on. Whatever goes over the control plane is announced in the kernels' own
words, if there is memory: so a rank that launches what others must first agree on stops all at once.

What this rank finds wrong is posted to the others, and raised at once. What kernels have reported is raised
by the hook, or by the next call: that one is made nonetheless, and its results are lost, so that ranks stay
in step. After a time-out nothing is made until the missing ranks are masked; then memory is made anew, and
memory/generations.py decides when the old is freed.

With `enable_shrink` kernels mask ranks themselves, and each rank has its own mask, in its device's memory.
Hosts take it over when they have to agree on something: from then on it is the whole buffer's. Between
domains hosts alone mask.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.low_latency_checks import Key
from deepep.backends.cuda.low_latency_launch import LowLatencyEndpoint, LowLatencyFormat, LowLatencyRoom
from deepep.backends.cuda.memory.generations import Generations
from deepep.backends.cuda.memory.ipc import SymmetricHeap
from deepep.backends.cuda.memory.low_latency_memory import LowLatencyMemory
from deepep.backends.cuda.remembered import Remembered
from deepep.errors import ArgumentError, DeepEPError, FaultRecord, MismatchError, PeerTimeoutError
from deepep.runtime import streams
from deepep.runtime.control.agreement import dtype_code
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.engine import EngineOptions
from deepep.runtime.requests import Operation, Schedule

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine


class LowLatencyState:
    """One engine's, under its lock.

    memory: there if `is_ready`: made by the first call, of the size that it asks for, and made anew for a
    larger one, or when other ranks take part. agreed: the formats that all ranks know. last_dispatch,
    last_combine: that need no checks again. unsettled: it is not
    ready, or something is to be raised; has_fault: whether a kernel has reported a fault. fault: a time-out,
    until the missing ranks are masked.
    """

    memory: LowLatencyMemory

    def __init__(self, control: ControlPlane, engine: CudaEngine, turns: _cuda.Turns) -> None:
        self._control = control
        self._owner = weakref.ref(engine)  # weak, or the engine would be freed late: it owns this
        self._turns = turns
        reach = None if engine.domains is None else engine.domains.neighbours
        self.generations = Generations(control.membership, engine.device, "low-latency memory", reach)
        self._is_built = False
        self.fault: FaultRecord | None = None
        self.is_ready, self.unsettled = False, True
        self.has_fault: Callable[[], bool] = _no_fault
        self.agreed: dict[Key, LowLatencyFormat] = {}
        self._forget()

    @property
    def engine(self) -> CudaEngine:
        """The owner."""
        engine = self._owner()
        assert engine is not None
        return engine

    def agree(self, operation: Operation, form: LowLatencyFormat) -> None:
        """Settles that all ranks make calls of this format, or all raise, with the name of what differs. Then
        there is memory for such calls.
        """
        statement = {
            "num_max_dispatch_tokens_per_rank": form.num_max_tokens,
            "num_experts": form.num_local_experts * form.num_ranks,
            "hidden": form.hidden,
            "num_topk": form.num_topk,
            "topk_idx dtype": dtype_code(form.index_dtype),
            "use_fp8": form.use_fp8,
            "round_scale": form.round_scale,
            "use_ue8m0": form.use_ue8m0,
            "topk_weights given": form.with_weights,
        }
        self.announce(operation)
        while True:
            try:
                self._meet(operation, statement)
                self._make_room(form)
                return
            except PeerTimeoutError as error:
                self._leave_out(error)

    def _make_room(self, form: LowLatencyFormat) -> None:
        """Memory for calls of this format. Collective."""
        # Since members changed all ranks have agreed on the same; before, one may have been left out.
        room = form.room.joined(self.memory.room) if self.is_ready else form.room
        if self.is_ready and room == self.memory.room:
            return
        engine, membership = self.engine, self._control.membership
        if engine.domains is not None:
            engine.domains.check_low_latency(room)
        self._end()
        num_bytes, _ = room.num_bytes(membership.num_ranks)
        options, live = engine.info.options, membership.live
        make = functools.partial(_memory_of_one_domain, membership.rank, live, room, options, self._turns)
        try:
            with torch.cuda.device(engine.index):
                if engine.domains is not None:
                    part = engine.domains.low_latency_part(membership)
                    make = functools.partial(
                        engine.domains.low_latency_memory, part, live, room, options.timeout, self._turns
                    )
                self.memory = self.generations.build(num_bytes, make)
        except PeerTimeoutError as error:
            self.fault, self.unsettled = error.record, True
            raise
        self.has_fault = self.memory.endpoint.domain.has_fault
        self._is_built = self.is_ready = True
        self.unsettled = False

    def _leave_out(self, error: PeerTimeoutError) -> None:
        """Masks the ranks that were missing when hosts were to agree, as all that are left do. Raises the
        error where ranks may not be masked, and on a rank that is missing itself.
        """
        engine, missing = self.engine, error.record.waited_on
        if not engine.info.options.masks or not missing or engine.info.rank in missing:
            raise error
        for rank in missing:
            engine.mask(rank, True)

    def _meet(self, operation: Operation, statement: Mapping[str, int]) -> None:
        done = self._control.perform(operation, Schedule(), lambda link, limits: None, agreed=statement)
        done.current_stream_wait()

    def announce(self, operation: Operation) -> None:
        """Posts to the others that this call goes over the control plane, and waits until all have said so.
        So all kernels have ended then. Raises MismatchError if another rank has launched the call or refuses.
        """
        if torch.cuda.is_current_stream_capturing():
            allowed = "calls that CUDA kernels run, after one of their sizes and formats outside of a graph"
            raise ArgumentError(operation.label, "captured, and to be agreed on by hosts", allowed)
        if self.is_ready:
            self._stay_out(operation, elsewhere=True)
            self.raise_fault()
            for rank in self.masked - self._control.masked:
                self.engine.mask(rank, True)

    def refuse(self, operation: Operation, problem: ArgumentError, schedule: Schedule) -> NoReturn:
        """Refuses a call. The kernels of the others learn it in their own; the others raise MismatchError in
        their next call at the latest.
        """
        problem = problem.at(self.engine.info.rank)
        if torch.cuda.is_current_stream_capturing():
            raise problem
        if self._control.pending_hook is not None:
            # Its words would be looked for under the number of what is posted now.
            with contextlib.suppress(MismatchError):
                self._control.pending_hook()
        if not self.is_ready:
            self._control.refuse(operation, problem, schedule)
        if self.fault is not None:
            raise PeerTimeoutError(self.fault)
        self._stay_out(operation, elsewhere=False)
        with contextlib.suppress(MismatchError):  # that is this rank's own doing
            self.raise_fault()
        raise problem

    def _stay_out(self, operation: Operation, *, elsewhere: bool) -> None:
        stream = streams.current_address(self.engine.index)
        combine = operation is Operation.LOW_LATENCY_COMBINE
        self.memory.endpoint.stay_out(combine=combine, elsewhere=elsewhere, stream=stream)
        self.memory.endpoint.wait()

    def late_error(self) -> MismatchError | None:
        """A disagreement in an earlier call that kernels have reported: to be raised when the call that asks
        has been made. Raises PeerTimeoutError at once.
        """
        if self.fault is not None:
            raise PeerTimeoutError(self.fault)
        if not self.is_ready or not self.has_fault() or torch.cuda.is_current_stream_capturing():
            return None
        try:
            self.raise_fault()
        except MismatchError as error:
            return error
        return None

    def raise_fault(self) -> None:
        """Raises what a kernel has reported since the last look."""
        fault = self.memory.endpoint.take_fault(streams.current_address(self.engine.index))
        if fault is None:
            return
        if fault.phase == "disagreement":
            ranks = ", ".join(map(str, fault.waited_on))
            got = f"other sizes, formats, handles or top-k indices than on rank {ranks}, or a refusal there"
            raise MismatchError(fault.operation, got, "the same on all ranks", self.engine.info.rank)
        self.fault, self.unsettled = fault, True
        raise PeerTimeoutError(fault)

    # memory, masks, the end

    @property
    def masked(self) -> frozenset[int]:
        """The ranks that kernels have masked, as far as the host has seen."""
        if not self.is_ready:
            return frozenset()
        bits = self.memory.endpoint.masked()
        return frozenset(rank for rank in range(self.engine.info.num_ranks) if bits >> rank & 1)

    def write_masked(self, status: Tensor) -> None:
        """Adds the ranks that kernels have masked to status [R] int32, on the current stream."""
        if self.is_ready:
            ranks = torch.arange(len(status), dtype=torch.int32, device=self.engine.device)
            masked = (self.memory.endpoint.masked_word() >> ranks) & 1
            with torch.inference_mode():  # the status may have been made in it
                status.bitwise_or_(masked.to(status.device))

    @property
    def num_bytes(self) -> int:
        """Bytes of symmetric memory."""
        return self.memory.num_bytes if self._is_built else 0

    def change_members(self) -> None:
        """Other ranks take part from the next call on. Earlier faults are settled."""
        self.fault = None
        self._forget()
        self.is_ready, self.unsettled = False, True

    def release(self) -> DeepEPError | None:
        """Frees the memory, once all ranks have come to it; ranks agree on formats again, and make room.
        Returns what kernels had reported.
        """
        late: DeepEPError | None = None
        if self.is_ready:
            self.memory.endpoint.wait()
            try:
                self.raise_fault()
            except DeepEPError as reported:
                late = reported
        self._end()
        self._forget()
        self.generations.release()
        return late

    def retire(self, *, wait: bool) -> bool:
        """Ends what there is; `Generations.retire`."""
        self._end()
        return self.generations.retire(wait=wait)

    def _forget(self) -> None:
        """Ranks agree on formats again."""
        self.agreed.clear()
        self.last_dispatch, self.last_combine = Remembered(), Remembered()

    def _end(self) -> None:
        """Launches nothing more on the memory there is."""
        if self._is_built:
            self._is_built = self.is_ready = False
            self.unsettled, self.has_fault = True, _no_fault
            del self.memory


def _memory_of_one_domain(
    rank: int,
    live: int,
    room: LowLatencyRoom,
    options: EngineOptions,
    turns: _cuda.Turns,
    heap: SymmetricHeap,
) -> LowLatencyMemory:
    endpoint = LowLatencyEndpoint(
        rank,
        heap.own,
        heap.addresses,
        room=room,
        timeout=options.timeout,
        turns=turns,
        shrinks=options.masks,
    )
    return LowLatencyMemory(endpoint, live)


def _no_fault() -> bool:
    """There is no kernel yet to report one."""
    return False
