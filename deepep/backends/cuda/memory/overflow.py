"""The overflow area: where a dispatch receives when the pool has no room, to be copied out of at once.

It is the tail of the pool's arena, and it is to be as long as a request before anything is acquired for that:
so whatever tensors are held, a call no larger than those for which it could grow has a place. That it grows
only where no tensor lies is the one way in which held tensors can refuse a call.
"""

from __future__ import annotations

import torch

from deepep.backends.cuda.memory.arrays import ReceiveArrays
from deepep.backends.cuda.memory.pool import SEGMENT, ReceivePool
from deepep.runtime import streams


class OverflowArea:
    """One place for one call after the other, on whatever streams they run.

    A rank's operations run one after the other (csrc/host/turns.hpp), but the copies behind a
    dispatch do not hold back a dispatch on another stream. So that one's stream waits for them: peers write
    only to memory that its kernel has granted them.
    """

    def __init__(self, pool: ReceivePool) -> None:
        self._pool = pool
        self._stretch: torch.Tensor | None = None
        self._copied = torch.cuda.Event()
        self.num_bytes = 0

    def grow(self, num_bytes: int, stream: int, needed: bool) -> bool:
        """Makes it at least so long, for a call on the current stream, `stream`; whether it could.

        needed: else the call is refused. So if nothing else helps it waits for the device, and is not safe
        from a deadlock with work of the user's that waits for peers.
        """
        pool = self._pool
        if num_bytes > pool.num_bytes:
            return False
        begin = (pool.num_bytes - num_bytes) // SEGMENT * SEGMENT
        wanted = pool.num_bytes - begin
        stretch = pool.reserve_tail(wanted)
        if stretch is None and needed:
            pool.reclaim(stream)
            stretch = pool.reserve_tail(wanted)
        if stretch is None and needed:
            pool.reclaim_by_waiting()
            stretch = pool.reserve_tail(wanted)
        if stretch is None:
            return False
        self._stretch, self.num_bytes = stretch, wanted
        return True

    def acquire(self) -> tuple[torch.Tensor, torch.cuda.Stream]:
        """All of it, for a dispatch on the current stream, and that stream.

        If the dispatch brings rows, `copy_out` is to follow before the next call. One that stopped before its
        rows leaves nothing to wait for: nobody has written here.
        """
        assert self._stretch is not None
        stream = streams.current(self._stretch.get_device())
        stream.wait_event(self._copied)
        return self._stretch, stream

    def copy_out(self, received: ReceiveArrays, rows: int, stream: torch.cuda.Stream) -> ReceiveArrays:
        """The first `rows` rows in ordinary memory of `stream`, the one that the dispatch runs on."""
        with streams.switched(stream):
            try:
                return received.copy(rows)
            finally:  # some may have been copied before memory ran out
                self._copied.record(stream)

    def close(self) -> None:
        """Lets go of the heap."""
        self._stretch, self.num_bytes = None, 0
