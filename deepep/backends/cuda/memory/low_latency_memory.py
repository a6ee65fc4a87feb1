"""Symmetric memory of the low-latency operations: apart from the heap, and of the size that calls ask for."""

from __future__ import annotations

import torch

from deepep.backends.cuda.low_latency_launch import LowLatencyEndpoint


class LowLatencyMemory:
    """On one rank's heap, mapped by its peers: the slots, and the launcher of the operations on them.

    live: the ranks that take part, as bits.
    """

    def __init__(self, endpoint: LowLatencyEndpoint, live: int) -> None:
        self.endpoint, self.room, self.num_bytes = endpoint, endpoint.room, endpoint.num_bytes
        self.endpoint.domain.set_live(live)

    # its end: memory/generations.py: HeapContents

    def wait(self) -> None:
        """Blocks the host until this rank's operations have ended."""
        self.endpoint.wait()

    def is_idle(self) -> bool:
        """True if they have, and this is no time of capturing a graph."""
        return not torch.cuda.is_current_stream_capturing() and self.endpoint.domain.is_idle()

    def may_write(self) -> bool:
        """True if graphs may replay calls that write here, and to the peers."""
        return self.endpoint.domain.was_captured()

    def is_held(self) -> bool:
        """False: no tensor lies here that a caller is given."""
        return False

    def is_in_use(self) -> bool:
        """False: nothing but operations reads here."""
        return False

    def mark_read(self) -> None:
        """Nothing waits for that."""

    def free(self) -> None:
        """Nothing: the heap is the generation's alone."""
