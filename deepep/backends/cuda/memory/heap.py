"""A rank's symmetric memory: what lies on the heap of one generation (generations.py)."""

from __future__ import annotations

import os
import time

import torch

from deepep.backends.cuda.launch import Endpoint
from deepep.backends.cuda.memory.arrays import ReceiveArrays, ReceiveSpec
from deepep.backends.cuda.memory.overflow import OverflowArea
from deepep.backends.cuda.memory.pool import SEGMENT, ReceivePool
from deepep.config import DEFAULT_SYMMETRIC_BYTES

#: rows to receive if all else fails, until the rows are counted
LEAST_ROWS = 64
#: seconds that a copy engine has for its last rows once the kernels have ended; else it keeps the heaps
LAST_COPIES = 1.0


def symmetric_bytes(given: int = 0) -> int:
    """Bytes of symmetric memory per rank: as given, else DEEPEP_SYMMETRIC_BYTES, else 3 GiB."""
    return given or int(os.environ.get("DEEPEP_SYMMETRIC_BYTES", DEFAULT_SYMMETRIC_BYTES))


class SymmetricMemory:
    """On one rank's heap, mapped by its peers: what signals and returning rows take, and the receive pool."""

    def __init__(self, endpoint: Endpoint) -> None:
        own = endpoint.heap
        self.endpoint = endpoint
        self.pool = ReceivePool(own, self.endpoint.pool_begin)
        self.overflow = OverflowArea(self.pool)
        self.num_bytes = own.numel()
        self._device = own.device
        self._captured: torch.Tensor | None = None

    def acquire(self, spec: ReceiveSpec, capacity: int, is_guess: bool, stream: int) -> ReceiveArrays | None:
        """Arrays for `capacity` rows, for a dispatch on the current stream, `stream`. None if no place can be
        made for them.

        is_guess: fewer will do, for if more rows come the call is made again.
        """
        size = spec.num_bytes(capacity)
        fits = size <= self.overflow.num_bytes or self.overflow.grow(size, stream, needed=False)
        made = self.pool.acquire(spec.templates(capacity, self._device), stream)
        if made is not None:
            return spec.of(made)
        if not fits and is_guess:  # as many as have room, or a few, to learn how many come
            capacity = max(spec.rows_in(self.overflow.num_bytes), LEAST_ROWS)
            size = spec.num_bytes(capacity)
            fits = size <= self.overflow.num_bytes
        if not fits and not self.overflow.grow(size, stream, needed=True):
            return None
        stretch, on = self.overflow.acquire()
        received = spec.carve(stretch, capacity)
        received.overflow_stream = on
        return received

    def acquire_for_graph(self, spec: ReceiveSpec, capacity: int) -> ReceiveArrays | None:
        """The same for captured dispatches: one place, never freed: nobody says when the last replay was.

        The rows are copied out of it at once, into the graph's own memory.
        """
        size = spec.num_bytes(capacity)
        if self._captured is None or self._captured.numel() < size:
            self._captured = self.pool.reserve(size)
        if self._captured is None:
            return None
        return spec.carve(self._captured, capacity)

    def copy_out(self, received: ReceiveArrays, rows: int) -> ReceiveArrays:
        """The first `rows` rows in ordinary memory: of an overflowed dispatch on the stream that it runs
        on, of a captured one on the current stream.
        """
        on = received.overflow_stream
        return received.copy(rows) if on is None else self.overflow.copy_out(received, rows, on)

    def shortage(self, num_bytes: int, capturing: bool) -> str:
        """The text for a request of so many bytes that failed: its shortage, and the remedy."""
        missing = num_bytes - self.pool.num_bytes
        remedy = ""
        if missing <= 0:
            missing = num_bytes - (0 if capturing else self.overflow.num_bytes)
            remedy = ", or free outputs of earlier calls, which are in the way"
        more = -(-missing * 4 // (3 * SEGMENT)) * SEGMENT + SEGMENT  # a quarter of it is not for the pool
        total = self.num_bytes
        return f"room for them: raise DEEPEP_SYMMETRIC_BYTES ({total}) by {more}, to {total + more}{remedy}"

    # its end: memory/generations.py: HeapContents

    def wait(self) -> None:
        """Blocks the host until this rank's operations have ended, and its copies, or nearly so."""
        self.endpoint.wait()
        domain, deadline = self.endpoint.domain, time.monotonic() + LAST_COPIES
        while domain.has_copies_under_way() and time.monotonic() < deadline:
            time.sleep(0.001)

    def is_idle(self) -> bool:
        """True if this rank's operations have ended, and this is no time of capturing a graph."""
        return not torch.cuda.is_current_stream_capturing() and self.endpoint.domain.is_idle()

    def may_write(self) -> bool:
        """True if graphs or the copy engine may still write: to heaps, or to the endpoint's words."""
        return self.endpoint.domain.was_captured() or self.endpoint.domain.has_copies_under_way()

    def is_held(self) -> bool:
        """True if tensors in the heap are held."""
        return self.pool.is_held()

    def is_in_use(self) -> bool:
        """True if they are, or streams that used it have not done what they hold."""
        return self.pool.is_in_use()

    def mark_read(self) -> None:
        """Notes that the whole device was idle after nothing was held any more."""
        self.pool.mark_read()

    def free(self) -> None:
        """Lets go of the heap."""
        self.pool.close()
        self.overflow.close()
        self.endpoint.close()
        self._captured = None
