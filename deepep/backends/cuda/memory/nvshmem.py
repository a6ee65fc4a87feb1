"""Symmetric memory between hosts: this process's NVSHMEM, and its slab, which buffers carve their parts from.

A process has one NVSHMEM, and starting it, allocating, freeing and ending are collective over all its PEs. So
- it is started once, by the first group that needs it, which has to be the largest: its ranks are the PEs.
  A slab is allocated along with it. Where the user has started it before, it is joined, and the slab made;
- groups of the same processes, smaller ones too, then carve parts out of the slab. Only their own ranks agree
  on where, for nothing is allocated any more. A buffer of all PEs that has no room there gets another slab;
- it ends with the process. It cannot be started again: it keeps its first bootstrap.

All ranks of a group look at what all of them found before any goes on (nvshmem_checks.py), because nothing
inside NVSHMEM has a deadline. Kernels that put to other domains have their memory from here (remote.py).
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch

from deepep.backends.cuda.memory.nvshmem4py import Nvshmem4py, missing
from deepep.backends.cuda.memory.nvshmem_checks import DEFAULTS, ProcessFacts, plan
from deepep.backends.cuda.memory.ranges import FreeRanges, common, first_fit, last_fit, rounded
from deepep.errors import CapacityError, DeepEPError, MismatchError, ModeError
from deepep.runtime.control.processes import only_here
from deepep.runtime.traffic_lanes import TrafficLanes

Exchange = Callable[[bytes], list[bytes]]
"""Brings every rank's bytes to every rank of one group, by rank; collective, with a deadline of its own
(store_exchange.py: StoreExchange)."""


NO_PE = -1


class SymmetricPart:
    """A group's part of the slab.

    memory: uint8 [num_bytes] of this rank. offset: the same on all ranks of the group. pes: by rank of the
    group, its PE, which puts are addressed to; NO_PE for ranks that take no part. is_captured: whether graphs
    may put from it, as its user says.
    """

    def __init__(self, owner: NvshmemProcess, offset: int, num_bytes: int, pes: tuple[int, ...]) -> None:
        self.memory, self.offset, self.pes = owner.memory_at(offset, num_bytes), offset, pes
        self._owner: NvshmemProcess | None = owner
        self.is_captured: Callable[[], bool] = _never

    def release(self) -> None:
        """Gives the part back; once, a second time has no effect. Each rank does so for itself, when nobody
        puts anything into its part any more.
        """
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.give_back(self.offset, self.memory.numel())


class NvshmemProcess:
    """NVSHMEM in this process, from its start (or since it was joined) to the process's end.

    pe, num_pes: this process's PE and their number. slab: the first. is_counted: nvshmem4py started it, here,
    and is to end it; false where the user had started it through nvshmem4py, whose memory that would free.
    """

    def __init__(
        self, binding: Nvshmem4py, slab: torch.Tensor, *, is_counted: bool, exchange: Exchange
    ) -> None:
        self.pe, self.num_pes = binding.pe()
        self.slab, self.is_counted = slab, is_counted
        self._binding, self._exchange = binding, exchange
        self._slabs = {0: slab}  # by where they begin among all parts' offsets
        self._free = FreeRanges(slab.numel())
        self._lock = threading.Lock()
        self.has_ended = False
        # Buffers that are made later are ended before it, at interpreter exit.
        self._finalizer = weakref.finalize(self, only_here(self.end))

    def memory_at(self, offset: int, num_bytes: int) -> torch.Tensor:
        """The bytes of a part: uint8 [num_bytes]."""
        begin = max(begin for begin in self._slabs if begin <= offset)
        return self._slabs[begin][offset - begin : offset - begin + num_bytes]

    def make_room(self, exchange: Exchange, num_ranks: int, num_bytes: int) -> None:
        """Another slab of so many bytes, if some rank of the group has no range of them free. Collective over
        the group. One of some PEs alone cannot allocate: what is free has to do.

        Raises ModeError on all ranks if one cannot allocate it.
        """
        if num_ranks != self.num_pes:
            return
        with self._lock:
            is_short = self._free.largest < rounded(num_bytes)
            if b"short" in exchange(b"short" if is_short else b""):
                slab = allocated(exchange, partial(self._binding.allocate, num_bytes))
                self._slabs[self._free.add(slab.numel())] = slab

    def carve(
        self, exchange: Callable[[bytes], Sequence[bytes | None]], num_bytes: int, *, at_end: bool = False
    ) -> SymmetricPart:
        """A part of the slab for the group of `exchange`, as large on all its ranks; collective over that
        group alone, or those of its ranks that take part. One at a time: ranks of several groups carve for
        them in the same order. at_end: from the slab's end on, else from its front.

        Raises MismatchError or CapacityError on all ranks of the group: for sizes that differ, and if nothing
        is free that is large enough.
        """
        with self._lock:
            came = exchange(json.dumps([self.pe, num_bytes, self._free.ranges]).encode())
            posted = {rank: _parse(raw) for rank, raw in enumerate(came) if raw is not None}
            first = min(posted)
            for rank, (_, size, _) in posted.items():
                if size != posted[first][1]:
                    raise MismatchError(
                        "num_bytes", str(size), f"{posted[first][1]}, as on rank {first}", rank
                    )
            free_everywhere = common([free for _, _, free in posted.values()])
            offset = (last_fit if at_end else first_fit)(free_everywhere, num_bytes)
            if offset is None:
                largest = max((end - begin for begin, end in free_everywhere), default=0)
                total = sum(slab.numel() for slab in self._slabs.values())
                allowed = f"at most {largest}, of {total} bytes of symmetric memory"
                raise CapacityError("num_bytes", str(num_bytes), allowed)
            self._free.take(offset, num_bytes)
            pes = tuple(posted[rank][0] if rank in posted else NO_PE for rank in range(len(came)))
            return SymmetricPart(self, offset, num_bytes, pes)

    def give_back(self, offset: int, num_bytes: int) -> None:
        """Makes a part free again, on this rank."""
        with self._lock:
            self._free.give_back(offset, num_bytes)

    def attach(self, module: int) -> None:
        """Has the kernels of a CUmodule that link NVSHMEM's device library use what runs here."""
        self._binding.attach(module)

    def end(self) -> None:
        """Ends what was begun here: frees the slab, and ends NVSHMEM if the user had not started it.

        Collective over the ranks that have started or joined it; called at the process's end if nobody has.

        If not all of them come, nothing more is done, for it would wait without end. NVSHMEM's proxy thread
        then runs into the end of the process, which IBRC may not survive.
        """
        if self.has_ended:
            return
        self.has_ended = True
        self._finalizer.detach()
        try:
            states = self._exchange(self._binding.state().encode())
        except DeepEPError:
            return
        if all(state == b"running" for state in states):  # else its user has ended it, and freed all
            for slab in self._slabs.values():
                self._binding.free(slab)
            if self.is_counted:
                self._binding.end()


def _never() -> bool:
    """There are no graphs."""
    return False


def _parse(raw: bytes) -> tuple[int, int, list[tuple[int, int]]]:
    pe, num_bytes, ranges = json.loads(raw)
    return int(pe), int(num_bytes), [(int(begin), int(end)) for begin, end in ranges]


class NvshmemOwner:
    """Whoever has this process's NVSHMEM, or none yet: there is one (`THIS_PROCESS`), and one a rank in tests
    whose ranks are threads."""

    def __init__(self) -> None:
        self.process: NvshmemProcess | None = None
        self._lock = threading.Lock()

    def open(
        self,
        exchange: Exchange,
        rank: int,
        num_ranks: int,
        *,
        device_index: int,
        num_bytes: int,
        lanes: TrafficLanes | None = None,
    ) -> NvshmemProcess:
        """NVSHMEM of this process, started, joined, or as it was opened before; collective over the group.

        num_bytes: of the slab, the same on all ranks; of another one where there is one without so much room.
        lanes: set as variables before it starts. Raises on all ranks alike: RangeError for what NVSHMEM, its
        settings or the machine do not offer, MismatchError where ranks differ, ModeError if it was ended; and
        whatever `exchange` raises for ranks that do not come.
        """
        lanes = lanes or TrafficLanes()
        with self._lock:
            binding, facts = self._look(device_index, num_bytes, lanes)
            how = plan([ProcessFacts.decode(raw) for raw in exchange(facts.encode())])
            if how == "share":
                assert self.process is not None
                self.process.make_room(exchange, num_ranks, num_bytes)
                return self.process
            assert binding is not None
            starts = how == "start"
            if starts:
                os.environ.update({**DEFAULTS, **lanes.environment()})
            uid = exchange(binding.unique_id() if starts and rank == 0 else b"")[0]

            def first_slab() -> torch.Tensor:
                if starts or binding.state() == "foreign":
                    binding.start(uid, rank, num_ranks)
                found = binding.pe()
                if starts and found != (rank, num_ranks):
                    raise _OtherPe(f"PE {found[0]} of {found[1]}, of an earlier start in this process")
                return binding.allocate(num_bytes)

            slab = allocated(exchange, first_slab)
            counted = facts.state != "running"
            self.process = NvshmemProcess(binding, slab, is_counted=counted, exchange=exchange)
            return self.process

    def _look(
        self, device_index: int, num_bytes: int, lanes: TrafficLanes
    ) -> tuple[Nvshmem4py | None, ProcessFacts]:
        """Findings of this process. Raises nothing: the others have to learn of it."""
        facts = partial(ProcessFacts.of, num_bytes=num_bytes, lanes=lanes)
        if self.process is not None:
            state = "ended" if self.process.has_ended else "ours"
            return None, facts(state, pe=self.process.pe, pes=self.process.num_pes)
        problem = missing()
        if problem:
            return None, facts("missing", problem=problem)
        try:
            binding = Nvshmem4py(device_index)
            found = binding.state()
            pe, pes = (-1, 0) if found == "stopped" else binding.pe()
            ordering = binding.write_ordering()
        except Exception as error:  # the binding's own classes; it goes to the others as a fact
            return None, facts("missing", problem=_first_line(error))
        return binding, facts(found, pe=pe, pes=pes, version=binding.version, write_ordering=ordering)


class _OtherPe(Exception):
    """NVSHMEM runs with other PEs than this start would have had."""


def allocated(exchange: Exchange, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The memory that `make` makes, if it does on all ranks; else raises ModeError on all of them."""
    slab, problem = None, ""
    try:
        slab = make()
    except _OtherPe as other:
        problem = str(other)
    except Exception as error:  # NVSHMEM's own classes; all ranks learn of it
        problem = _first_line(error)
    for at, posted in enumerate(exchange(problem.encode())):
        if posted:
            raise ModeError("NVSHMEM", posted.decode(), "a start and an allocation that succeed", at)
    assert slab is not None
    return slab


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


THIS_PROCESS = NvshmemOwner()
