"""A buffer's memory for puts to other domains: parts of this process's NVSHMEM slab, one a generation of each
of its modes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from torch.distributed.distributed_c10d import Store

from deepep.backends.cuda.memory.ipc import Gather
from deepep.backends.cuda.memory.nvshmem import THIS_PROCESS, NvshmemProcess, SymmetricPart
from deepep.backends.cuda.memory.nvshmem4py import missing
from deepep.backends.cuda.memory.ranges import rounded
from deepep.backends.cuda.memory.store_exchange import StoreExchange
from deepep.runtime.traffic_lanes import TrafficLanes

#: Parts of a mode whose generations may end while puts are on their way: of the generation that is built, the
#: one before, and the one before that.
PARTS = 3


def why_not() -> str:
    """Reason why this process cannot put to other domains; empty: it can. Loads no library."""
    from importlib.util import find_spec

    lacking = missing()
    if not lacking and find_spec("deepep._nvshmem") is None:
        return "built without NVSHMEM: deepep._nvshmem is missing"
    return lacking


@dataclass
class Reservation:
    """The parts of one of a buffer's modes.

    num_bytes: of each, the same on all ranks. most: parts at a time. With 3 each is used again two
    generations later: signals that are still on their way when a generation ends do not land in the words of
    the next. With 1 the next generation has the same. at_end: they lie from the slab's end on, else from its
    front.
    """

    num_bytes: int
    most: int = PARTS
    at_end: bool = False
    parts: list[SymmetricPart] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Bytes of the slab that are set aside for it."""
        return self.most * rounded(self.num_bytes)

    def make_room(self) -> None:
        """Gives back the oldest part if there are no more, unless graphs may still put from it."""
        while len(self.parts) >= self.most:
            oldest = next((part for part in self.parts if not part.is_captured()), None)
            if oldest is None:
                return
            self.parts.remove(oldest)
            oldest.release()

    def close(self) -> None:
        """Gives all parts back but those that graphs may still put from."""
        for part in self.parts:
            if not part.is_captured():
                part.release()
        self.parts.clear()


class RemoteMemory:
    """One buffer's. reservations: of each of its modes, the same on all ranks."""

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        reservations: Sequence[Reservation],
        *,
        device_index: int,
        lanes: TrafficLanes,
        timeout: float,
    ) -> None:
        self._store, self._rank, self._num_ranks = store, rank, num_ranks
        self._reservations = reservations
        self._index, self._lanes, self._timeout = device_index, lanes, timeout
        self._process: NvshmemProcess | None = None

    @property
    def serve(self) -> int:
        """The function that serves puts (csrc/put_server/service.hpp)."""
        from deepep import _nvshmem

        return _nvshmem.serve()

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts that this buffer has at present."""
        return sum(part.memory.numel() for mode in self._reservations for part in mode.parts)

    def part(self, mode: Reservation, gather_as: Callable[[str], Gather]) -> SymmetricPart:
        """The next generation's part. Collective over the members; the first time over all ranks, and NVSHMEM
        is started, or joined. Raises as `NvshmemOwner.open` and `NvshmemProcess.carve`.
        """
        if self._process is None:
            self._process = self._open(gather_as("series"))
        mode.make_room()
        made = self._process.carve(gather_as("carve"), mode.num_bytes, at_end=mode.at_end)
        mode.parts.append(made)
        return made

    def _open(self, gather: Gather) -> NvshmemProcess:
        names = gather(uuid4().hex.encode())
        series = next(name for name in names if name is not None).decode()
        process = THIS_PROCESS.open(
            StoreExchange(self._store, series, self._rank, self._num_ranks, self._timeout),
            self._rank,
            self._num_ranks,
            device_index=self._index,
            num_bytes=sum(mode.total_bytes for mode in self._reservations),
            lanes=self._lanes,
        )
        # nvshmem4py has loaded it for itself alone: found again by its name, for the module to bind to.
        ctypes.CDLL("libnvshmem_host.so.3", mode=ctypes.RTLD_GLOBAL)
        from deepep import _nvshmem

        process.attach(_nvshmem.module())
        return process

    def close(self) -> None:
        """Gives all parts back; once more has no effect. All ranks have come to the end."""
        for mode in self._reservations:
            mode.close()
