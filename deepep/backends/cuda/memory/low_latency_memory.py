"""Symmetric memory of the low-latency operations: apart from the heap, and of the size that calls ask for."""

from __future__ import annotations

import torch

from deepep import _cuda
from deepep.backends.cuda.low_latency_launch import LowLatencyEndpoint, LowLatencyRoom
from deepep.backends.cuda.memory.heap import gathering
from deepep.backends.cuda.memory.ipc import share_heap
from deepep.runtime.control.membership import Membership

_leaked: list[object] = []
"""Memory that peers which were given up, or graphs, may still write to."""


class LowLatencyMemory:
    """One rank's slots, mapped by its peers, and the launcher of the operations on them.

    Collective over the members.
    """

    def __init__(
        self,
        membership: Membership,
        device: torch.device,
        timeout: float,
        room: LowLatencyRoom,
        turns: _cuda.Turns,
    ) -> None:
        gather = gathering(membership, "low-latency memory")
        self.room = room
        self.num_bytes, _ = room.num_bytes(membership.num_ranks)
        own = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        self._heap = share_heap(own, membership.rank, gather("share"))
        self.endpoint = LowLatencyEndpoint(
            membership.rank, own, self._heap.addresses, room=room, timeout=timeout, turns=turns
        )
        self.endpoint.domain.set_live(sum(1 << r for r in membership.members))
        gather("ready")(b"")  # no rank sends before all flags are zeroed

    def leak(self) -> None:
        """Keeps all of it for good."""
        _leaked.append(self)
