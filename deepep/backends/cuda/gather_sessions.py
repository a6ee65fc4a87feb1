"""All-gathers in sessions on CUDA: copies to where the peers have mapped them, and a barrier behind each.

Every rank writes its part to every rank's memory, by cudaMemcpyAsync on the communication stream, and the
barrier kernel, of one block, says that all parts are there. The ranks' hosts meet when a session begins and
when it ends: only then are their calls compared, so what ranks gather that does not fit together is found at
its end. Behind the hosts' meeting a session begins with a barrier of the streams: what they held before, and
with it all that reads what the last session gathered, has been done.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.mapped_area import MappedArea
from deepep.backends.cuda.memory.mapped import MappedMemory
from deepep.backends.cuda.streams import CommStream, hand_out
from deepep.errors import ArgumentError, ModeError
from deepep.runtime import streams
from deepep.runtime.checks import flat_bytes
from deepep.runtime.completion import Completion
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.gather_sessions import Gathered, GatherSession, GatherSessions
from deepep.runtime.requests import Operation, Schedule

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine

_ASYNCHRONOUS = Schedule(asynchronous=True)
_REFUSED = "a refused call"


class CudaSessions(GatherSessions):
    """See `GatherSessions`. Parts of ranks that are left out are zeros.

    A time-out is raised by the next call, and by all until the sessions are configured again, or other ranks
    take part.
    """

    def __init__(self, control: ControlPlane, engine: CudaEngine, turns: _cuda.Turns) -> None:
        super().__init__(control)
        self.area = MappedArea(control, engine, turns, "session memory", Operation.ALL_GATHER)

    def _configure(self, num_bytes: int, num_gathers: int) -> None:
        self.area.check_not_captured(Operation.AGRS_SET_CONFIG)
        agreed = {"num_max_session_bytes": num_bytes, "num_max_all_gathers_per_session": num_gathers}
        self._control.barrier(Schedule(), agreed, Operation.AGRS_SET_CONFIG)
        self.area.build(num_bytes)

    def _begin(self, number: int) -> Tensor:
        self.area.check_not_captured(Operation.CREATE_AGRS_SESSION)
        self.area.raise_fault()
        self._control.barrier(Schedule(), {"session": number}, Operation.CREATE_AGRS_SESSION)
        memory, engine = self.area.memory or self.area.build(self.num_bytes), self.area.engine
        stream = streams.current_address(engine.index)
        memory.barrier(stream)
        if engine.live != (1 << self._control.num_ranks) - 1:
            memory.own.zero_()
            memory.barrier(stream)
        return memory.own[: self.num_bytes]

    def _gather(
        self, session: GatherSession, tensors: Sequence[Tensor], places: Sequence[Gathered]
    ) -> Completion:
        self.area.check_not_captured(Operation.ALL_GATHER)
        self.area.raise_fault()
        comm, memory = self.area.engine.comm, self.area.memory
        if memory is None:
            raise ModeError("all_gather", "a session from before other ranks took part", "a new session")
        with CommStream(comm, memory.endpoint, None) as stream:
            for t, place in zip(tensors, places, strict=True):
                self._push(memory, flat_bytes(t), place)
            memory.barrier(stream)
        completion = hand_out(comm, None, _ASYNCHRONOUS, tuple(tensors), ())
        assert completion is not None
        return completion

    def _push(self, memory: MappedMemory, part: Tensor, place: Gathered) -> None:
        """Copies this rank's part to every live rank's place for it: its own first, then around the ring, so
        that not all write to one at a time.
        """
        rank, num_ranks, size = self._control.rank, self._control.num_ranks, part.numel()
        begin, live = place.begin + rank * size, self.area.engine.live
        for step in range(num_ranks):
            peer = (rank + step) % num_ranks
            if not live >> peer & 1:
                continue
            there = memory.of(peer)[begin : begin + size]
            if there.data_ptr() != part.data_ptr():
                there.copy_(part, non_blocking=True)

    def _end(self, session: GatherSession) -> None:
        self.area.check_not_captured(Operation.DESTROY_AGRS_SESSION)
        self.area.raise_fault()
        agreed = {
            "session": self.number,
            "all_gathers": session.calls,
            "shapes, dtypes and places": zlib.crc32("\n".join(session.places).encode()),
        }
        self._control.barrier(Schedule(), agreed, Operation.DESTROY_AGRS_SESSION)
        self.area.raise_fault()

    def _refuse_gather(self, problem: ArgumentError) -> NoReturn:
        """The others learn when the session ends; until then this rank comes to their barriers."""
        if self.session is not None and self.area.is_whole and self.area.memory is not None:
            self.session.places.append(_REFUSED)
            with CommStream(self.area.engine.comm, self.area.memory.endpoint, None) as stream:
                self.area.memory.barrier(stream)
        raise problem.at(self._control.rank)

    def release(self) -> None:
        if self.session is None:
            self.area.release()

    def memory(self) -> int:
        return self.area.num_bytes
