"""Session: what all that works on one process group in this process has in common, owned once.

`Session.of(group, device)` gives every Buffer of a group and device (and whatever else communicates there)
the same object, which lives as long as its last user. It has the facts of the group (ranks, device, store),
the stream that communication runs on. `membership_of` makes the group's memberships.

Not shared, because Buffers on one group promise to be independent of each other:
- the membership. Masks are a Buffer's own, as in V1, and so is the fault that a mask settles: a Buffer whose
  rank is missing says so until it is masked there, and the end of one Buffer is nothing to another.
- links and queues. Two Buffers may be used by two threads, in another order on every rank; operations on one
  link have one order. For the same reason a link that is being built has a store connection to itself,
  besides the one that all share: it blocks it until the peers come.
- symmetric memory. Its control words count the calls of one engine. It is built by the first dispatch or
  combine, so a Buffer that only does other things takes none.

Operations with events of all Buffers of a group do share the communication stream: all ranks issue those in
the same order, as for any communicator.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepep.runtime.control.meeting import ControlStore
from deepep.runtime.control.membership import Membership
from deepep.runtime.control.transport import Connections, store_of


class Session:
    """One process's part in a process group. `of` makes it, or finds the one there is.

    device: where the tensors lie that are sent; the group need not serve it, for it exchanges words alone.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, num_ranks: int = 0) -> None:
        self.group = group  # kept: while it is, nothing else has its id
        self.rank, self.num_ranks = group.rank(), num_ranks or group.size()
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup, device: torch.device, num_ranks: int = 0) -> Session:
        """The session of a group on a device; not collective.

        num_ranks: with those that may join; 0: the group's.
        """
        size = num_ranks or group.size()
        with _opening:
            session = _open.get((id(group), device, size))
            if session is None:
                session = _open[id(group), device, size] = cls(group, device, size)
            return session

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The communication stream, of high priority; made when first needed. None on CPU."""
        if self._stream is None and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(device=self.device, priority=-1)
        return self._stream


class MeetingPlace(NamedTuple):
    """Store in which the ranks of a group meet. vacant: those that no process has."""

    store: ControlStore
    connections: Connections
    vacant: frozenset[int] = frozenset()


def membership_of(group: dist.ProcessGroup, timeout: float, num_ranks: int = 0) -> Membership:
    """A membership of all ranks; every rank makes its memberships of a group in the same order.

    num_ranks: with those that may join; 0: the group's.
    """
    with _opening:
        found = _places.get(group)
        if found is None:
            store = store_of(group)
            found = _places[group] = MeetingPlace(ControlStore(store, run_prefix()), Connections(store))
    size = num_ranks or group.size()
    vacant = found.vacant | set(range(group.size(), size))
    return Membership(found.store, found.connections, group.rank(), size, timeout, vacant)


def run_prefix() -> str:
    """The prefix of all keys; under torchrun, whose store outlives them, of this run and attempt of it."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(["deepep", *(os.environ[name] for name in names if name in os.environ)])


def meets_at(group: dist.ProcessGroup, place: MeetingPlace) -> None:
    """Has the memberships of a group, which was made for this, meet at a place of their own."""
    with _opening:
        _places[group] = place


_open: weakref.WeakValueDictionary[tuple[int, torch.device, int], Session] = weakref.WeakValueDictionary()
_places: weakref.WeakKeyDictionary[dist.ProcessGroup, MeetingPlace] = weakref.WeakKeyDictionary()
_opening = threading.Lock()
