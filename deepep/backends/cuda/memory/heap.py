"""The life of a rank's symmetric memory: built over the ranks that take part, built anew when they change."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from deepep import _cuda
from deepep.backends.cuda.launch import Endpoint
from deepep.backends.cuda.memory.arrays import ReceiveArrays, ReceiveSpec
from deepep.backends.cuda.memory.ipc import Gather, share_heap
from deepep.backends.cuda.memory.overflow import OverflowArea
from deepep.backends.cuda.memory.pool import SEGMENT, ReceivePool
from deepep.runtime.control.membership import Membership

DEFAULT_SYMMETRIC_BYTES = 3 << 30
#: rows to receive if all else fails, until the rows are counted
LEAST_ROWS = 64


def symmetric_bytes(given: int = 0) -> int:
    """Bytes of symmetric memory per rank: as given, else DEEPEP_SYMMETRIC_BYTES, else 3 GiB."""
    return given or int(os.environ.get("DEEPEP_SYMMETRIC_BYTES", DEFAULT_SYMMETRIC_BYTES))


class SymmetricMemory:
    """One rank's heap, mapped by its peers: what signals and returning rows take, and the receive pool.

    Collective over the members. A quarter of the heap is for rows that combine returns.
    """

    def __init__(
        self,
        membership: Membership,
        device: torch.device,
        timeout: float,
        num_bytes: int,
        turns: _cuda.Turns,
    ) -> None:
        members = membership.members
        gather = gathering(membership)
        own = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._heap = share_heap(own, membership.rank, gather("share"))
        self.endpoint = Endpoint(
            membership.rank,
            own,
            self._heap.addresses,
            staging_bytes=own.numel() // 4,
            timeout=timeout,
            turns=turns,
        )
        self.endpoint.set_live(sum(1 << r for r in members))
        self.pool = ReceivePool(own, self.endpoint.pool_begin)
        self.overflow = OverflowArea(self.pool)
        self.num_bytes = own.numel()
        self._device = device
        self._captured: torch.Tensor | None = None
        gather("ready")(b"")  # no rank sends before all heaps are zeroed

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

    def close(self) -> None:
        """Ends the pool; what is still held stays valid."""
        self.pool.close()

    def leak(self) -> None:
        """The same, and the heap is kept for good: a peer that was given up may still write to it. So are the
        peers' heaps and this endpoint's words: a copy engine that was given up may still write to those.
        """
        self.pool.leak(self.endpoint, self._heap)


def gathering(membership: Membership, what: str = "build") -> Callable[[str], Gather]:
    """A `Gather` over the members for each purpose, through the store. what: the name of what is built."""
    membership.begin(what)
    exchange = membership.gathering(what)

    def gather_as(purpose: str) -> Gather:
        def gather(mine: bytes) -> list[bytes | None]:
            met = exchange(purpose, mine.decode())
            return [met.get(rank) for rank in range(membership.num_ranks)]

        return gather

    return gather_as
