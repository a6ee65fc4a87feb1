"""The leader, where emulated machines run: ranks bring it arguments, and it gives back what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from deepep.errors import DeepEPError
from deepep.reference.wire import Wire
from deepep.sim.emulator import packing

Given = TypeVar("Given")
Made = TypeVar("Made")


class EmulatedFailure(DeepEPError):
    """The emulator found a kernel in error: a data race, a deadlock, a read of nothing; says how."""


def at_leader(wire: Wire, mine: Given, work: Callable[[dict[int, Given], int], dict[int, Made]]) -> Made:
    """Brings what every member has to the lowest one, which does the `work`, and everybody their part back.

    Raises EmulatedFailure on every member if the work did.
    """
    leader = wire.members[0]
    brought = _exchange(wire, {leader: mine})
    replies: dict[int, Any] = {}
    if wire.rank == leader:
        try:
            replies = dict(work(brought, wire.num_ranks))
        except EmulatedFailure as failure:
            replies = dict.fromkeys(wire.members, failure)
    reply = _exchange(wire, replies)[leader]
    if isinstance(reply, EmulatedFailure):
        raise reply
    return reply


def _exchange(wire: Wire, sends: dict[int, Any]) -> dict[int, Any]:
    """Objects with tensors in them, from and to whichever ranks: by destination in, by source out."""
    packed = {rank: packing.pack(thing) for rank, thing in sends.items()}
    sizes = [len(packed.get(rank, b"")) for rank in range(wire.num_ranks)]
    all_sizes = wire.all_gather(torch.tensor(sizes, dtype=torch.int64, device="cpu"))
    coming = [
        int(all_sizes[source][wire.rank]) if source in all_sizes else 0 for source in range(wire.num_ranks)
    ]
    sent = b"".join(packed.get(rank, b"") for rank in range(wire.num_ranks))
    rows = torch.empty(0, dtype=torch.uint8, device="cpu")
    if sent:
        rows = torch.frombuffer(bytearray(sent), dtype=torch.uint8)
    received = wire.all_to_all_rows(rows, sizes, coming).numpy().tobytes()
    return dict(packing.unpack(received, coming))
