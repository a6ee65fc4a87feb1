"""The life of a rank's symmetric memory: built over the ranks that take part, built anew when they change."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import torch

from deepep.backends.cuda.launch import Endpoint
from deepep.backends.cuda.memory.arrays import Kind, Received
from deepep.backends.cuda.memory.ipc import share_heap
from deepep.backends.cuda.memory.overflow import Landing
from deepep.backends.cuda.memory.pool import SEGMENT, SlotPool
from deepep.runtime.control.membership import Absent, Membership

DEFAULT_SYMMETRIC_BYTES = 3 << 30
#: what is lent if all else fails, until the rows are counted
LEAST_ROWS = 64
_outlived: list[object] = []


def symmetric_bytes() -> int:
    """Bytes of symmetric memory per rank: DEEPEP_SYMMETRIC_BYTES, else 3 GiB."""
    return int(os.environ.get("DEEPEP_SYMMETRIC_BYTES", DEFAULT_SYMMETRIC_BYTES))


class SymmetricMemory:
    """One rank's heap, mapped by its peers: what signals and returning rows take, and slots to lend.

    Collective over the members. A quarter of the heap is for rows that combine returns.
    """

    def __init__(self, membership: Membership, device: torch.device, timeout: float) -> None:
        members = membership.members
        gather = _gathering(membership)
        own = torch.empty(symmetric_bytes(), dtype=torch.uint8, device=device)
        self._heap = share_heap(own, membership.rank, gather("share"))
        self.endpoint = Endpoint(
            membership.rank,
            own,
            self._heap.addresses,
            staging_bytes=own.numel() // 4,
            timeout=timeout,
        )
        self.endpoint.set_live(sum(1 << r for r in members))
        self.slots = SlotPool(own, self.endpoint.slots_begin)
        self.landing = Landing(self.slots)
        self._device = device
        self._num_bytes = own.numel()
        self._captured: torch.Tensor | None = None
        gather("ready")("")  # no rank sends before all heaps are zeroed

    def lend(self, kind: Kind, capacity: int, is_guess: bool, stream: int) -> Received | None:
        """Arrays for `capacity` rows, for a dispatch on the current stream, `stream`. None if no place can be
        made for them.

        is_guess: fewer will do, for if more rows come the call is made again.
        """
        size = kind.num_bytes(capacity)
        can_land = size <= self.landing.num_bytes or self.landing.grow(size, stream, needed=False)
        made = self.slots.take(kind.templates(capacity, self._device), stream)
        if made is not None:
            return kind.of(made)
        if not can_land and is_guess:  # as many as can land, or a few, to hear how many come
            capacity = max(kind.rows_in(self.landing.num_bytes), LEAST_ROWS)
            size = kind.num_bytes(capacity)
            can_land = size <= self.landing.num_bytes
        if not can_land and not self.landing.grow(size, stream, needed=True):
            return None
        stretch, on = self.landing.lend()
        received = kind.carve(stretch, capacity)
        received.landed_on = on
        return received

    def lend_to_graph(self, kind: Kind, capacity: int) -> Received | None:
        """The same for captured dispatches: one place, never freed: nobody tells when the last replay was.

        The rows are copied out of it at once, into the graph's own memory.
        """
        size = kind.num_bytes(capacity)
        if self._captured is None or self._captured.numel() < size:
            self._captured = self.slots.reserve(size)
        if self._captured is None:
            return None
        return kind.carve(self._captured, capacity)

    def copy_out(self, received: Received, rows: int) -> Received:
        """The first `rows` rows in ordinary memory: of a landed dispatch on the stream that it runs on, of a
        captured one on the current stream.
        """
        on = received.landed_on
        return received.copy(rows) if on is None else self.landing.copy_out(received, rows, on)

    def shortage(self, num_bytes: int, capturing: bool) -> str:
        """What a request of so many bytes lacks that was not lent anything."""
        missing = num_bytes - self.slots.num_bytes
        remedy = ""
        if missing <= 0:
            missing = num_bytes - (0 if capturing else self.landing.num_bytes)
            remedy = ", or free outputs of earlier calls, which are in the way"
        more = -(-missing * 4 // (3 * SEGMENT)) * SEGMENT + SEGMENT  # a quarter of it is not for slots
        total = self._num_bytes
        return f"room for them: raise DEEPEP_SYMMETRIC_BYTES ({total}) by {more}, to {total + more}{remedy}"

    def close(self) -> None:
        """Lends no more slots; what is still held stays valid."""
        self.slots.close()

    def outlive(self) -> None:
        """The same, and the heap is kept for good: a peer that was given up may still write to it. So are the
        peers' heaps and this endpoint's words: a copy engine that was given up may still write to those.
        """
        _outlived.append((self.endpoint, self._heap))
        self.slots.outlive()


def _gathering(membership: Membership) -> Callable[[str], Callable[[Any], list[Any]]]:
    """Brings every member's object to every member, by rank; None for the others."""
    membership.begin("build")
    members = membership.members
    meeting = membership.next_meeting("build")

    def gather_as(purpose: str) -> Callable[[Any], list[Any]]:
        def gather(mine: Any) -> list[Any]:
            name = f"{meeting}/{purpose}"
            try:
                met = membership.meet(name, pickle.dumps(mine).hex(), members)
            except Absent as absent:
                raise membership.blame(absent.missing, len(absent.seen), "they did not build") from None
            shared = {rank: pickle.loads(bytes.fromhex(value.decode())) for rank, value in met.items()}
            return [shared.get(rank) for rank in range(membership.num_ranks)]

        return gather

    return gather_as
