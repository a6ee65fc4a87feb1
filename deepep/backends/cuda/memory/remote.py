"""A buffer's memory for puts to other domains: parts of this process's NVSHMEM slab, one a generation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from uuid import uuid4

from torch.distributed.distributed_c10d import Store

from deepep.backends.cuda.memory.ipc import Gather
from deepep.backends.cuda.memory.nvshmem import THIS_PROCESS, NvshmemProcess, SymmetricPart
from deepep.backends.cuda.memory.nvshmem4py import missing
from deepep.backends.cuda.memory.ranges import rounded
from deepep.backends.cuda.memory.store_exchange import StoreExchange
from deepep.runtime.traffic_lanes import TrafficLanes

#: Parts that a buffer has at most: of the generation that is built, the one before, and the one before that.
_PARTS = 3


def why_not() -> str:
    """Reason why this process cannot put to other domains; empty: it can. Loads no library."""
    from importlib.util import find_spec

    lacking = missing()
    if not lacking and find_spec("deepep._nvshmem") is None:
        return "built without NVSHMEM: deepep._nvshmem is missing"
    return lacking


class RemoteMemory:
    """One buffer's. num_bytes: of each part, the same on all ranks.

    A part is used again two generations later: signals that are still on their way when a generation ends,
    its last credit, do not land in the words of the next.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        num_bytes: int,
        *,
        device_index: int,
        lanes: TrafficLanes,
        timeout: float,
    ) -> None:
        self._store, self._rank, self._num_ranks, self._num_bytes = store, rank, num_ranks, num_bytes
        self._index, self._lanes, self._timeout = device_index, lanes, timeout
        self._process: NvshmemProcess | None = None
        self._parts: list[SymmetricPart] = []

    @property
    def serve(self) -> int:
        """The function that serves puts (csrc/put_server/service.hpp)."""
        from deepep import _nvshmem

        return _nvshmem.serve()

    def part(self, gather_as: Callable[[str], Gather]) -> SymmetricPart:
        """The next generation's part. Collective over the members; the first time over all ranks, and NVSHMEM
        is started, or joined. Raises as `NvshmemOwner.open` and `NvshmemProcess.carve`.
        """
        if self._process is None:
            self._process = self._open(gather_as("series"))
        made = self._process.carve(gather_as("carve"), self._num_bytes)
        self._parts.append(made)
        if len(self._parts) == _PARTS:
            self._parts.pop(0).release()
        return made

    def _open(self, gather: Gather) -> NvshmemProcess:
        names = gather(uuid4().hex.encode())
        series = next(name for name in names if name is not None).decode()
        process = THIS_PROCESS.open(
            StoreExchange(self._store, series, self._rank, self._num_ranks, self._timeout),
            self._rank,
            self._num_ranks,
            device_index=self._index,
            num_bytes=_PARTS * rounded(self._num_bytes),
            lanes=self._lanes,
        )
        # nvshmem4py has loaded it for itself alone: found again by its name, for the module to bind to.
        ctypes.CDLL("libnvshmem_host.so.3", mode=ctypes.RTLD_GLOBAL)
        from deepep import _nvshmem

        process.attach(_nvshmem.module())
        return process

    def close(self) -> None:
        """Gives all parts back; once more has no effect. All ranks have come to the end."""
        while self._parts:
            self._parts.pop().release()
