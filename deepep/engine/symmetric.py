"""The life of a rank's symmetric memory: built over the ranks that take part, built anew when they change."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import torch

from deepep.engine.fabric import share_heap
from deepep.engine.membership import Absent, Membership
from deepep.engine.nvlink import Endpoint
from deepep.engine.slots import SlotPool

DEFAULT_SYMMETRIC_BYTES = 3 << 30


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
        self._captured: torch.Tensor | None = None
        gather("ready")("")  # no rank sends before all heaps are zeroed

    def captured_slot(self, num_bytes: int) -> torch.Tensor | None:
        """Where captured dispatches receive: one place, never freed: nobody tells when the last replay was.

        The rows are copied out of it at once, into the graph's own memory.
        """
        if self._captured is None or self._captured.numel() < num_bytes:
            self._captured = self.slots.reserve(num_bytes)
        return None if self._captured is None else self._captured[:num_bytes]

    def close(self) -> None:
        """Lends no more slots; what is still held stays valid."""
        self.slots.close()

    def outlive(self) -> None:
        """The same, and the heap is kept for good: a peer that was given up may still write to it."""
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
