"""The landing area: where a dispatch receives when the pool has no room, to be copied out of at once.

It is the last stretch of the slots' arena, and it is to be as long as a request before anything is lent for
that: so whatever slots are held, a call no larger than those for which it could grow has a place. That it
grows only where no slot lies is the one way in which held slots can refuse a call.
"""

from __future__ import annotations

import torch

from deepep.backends.cuda.memory.arrays import Received
from deepep.backends.cuda.memory.pool import SEGMENT, SlotPool
from deepep.runtime import streams


class Landing:
    """One place for one call after the other, on whatever streams they run.

    A rank's operations run one after the other (Turns, csrc/bindings/cuda.cpp), but the copies behind a
    dispatch do not hold back a dispatch on another stream. So that one's stream waits for them: peers write
    only what its kernel has told them.
    """

    def __init__(self, slots: SlotPool) -> None:
        self._slots = slots
        self._stretch: torch.Tensor | None = None
        self._copied = torch.cuda.Event()
        self.num_bytes = 0

    def grow(self, num_bytes: int, stream: int, needed: bool) -> bool:
        """Makes it at least so long, for a call on the current stream, `stream`; whether it could.

        needed: else the call is refused. So if nothing else helps it waits for the device, and is not safe
        from a deadlock with work of the user's that waits for peers.
        """
        slots = self._slots
        if num_bytes > slots.num_bytes:
            return False
        begin = (slots.num_bytes - num_bytes) // SEGMENT * SEGMENT
        wanted = slots.num_bytes - begin
        stretch = slots.set_aside(wanted)
        if stretch is None and needed:
            slots.regain(stream)
            stretch = slots.set_aside(wanted)
        if stretch is None and needed:
            slots.regain_by_waiting()
            stretch = slots.set_aside(wanted)
        if stretch is None:
            return False
        self._stretch, self.num_bytes = stretch, wanted
        return True

    def lend(self) -> tuple[torch.Tensor, torch.cuda.Stream]:
        """All of it, for a dispatch on the current stream, and that stream.

        If the dispatch brings rows, `copy_out` is to follow before the next call. One that stopped before its
        rows leaves nothing to wait for: nobody has written here.
        """
        assert self._stretch is not None
        stream = streams.current(self._stretch.get_device())
        stream.wait_event(self._copied)
        return self._stretch, stream

    def copy_out(self, received: Received, rows: int, stream: torch.cuda.Stream) -> Received:
        """The first `rows` rows in ordinary memory of `stream`, the one that the dispatch runs on."""
        with streams.switched(stream):
            try:
                return received.copy(rows)
            finally:  # some may have been copied before memory ran out
                self._copied.record(stream)
