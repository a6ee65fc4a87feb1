"""Generations of symmetric memory: a rank's heaps, each from one change of the members to the next, and when
they are freed.

A peer writes to a heap of this rank through a mapping of its own, which nobody can take from it. So a heap is
freed when each peer that had mapped it is known to write no more, because
- it has come to build a later generation, or to the end: before that it has waited for its own kernels and
  copies, and let go of its mappings;
- it has departed by itself, its kernels ended, and said so;
- or its process is gone.
All other heaps are kept. A peer that lives and is silent keeps one: to be waited for in another it would have
had to come and build that, and so is waited for in none before. None is used again while it is kept: flags
carry epochs, but rows carry nothing by which one written late differs from one of the call that reads them.

A rank whose graphs may replay old calls, or whose copy engine still has rows to write, names those
generations when it comes; they are kept, here and there. So are heaps in which somebody holds tensors, until
all are freed.

A rank may get another process. What that one says holds for it alone: the one before may write to what it had
mapped until it is gone, or has departed by itself. The newcomer maps nothing of before.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Container
from typing import NamedTuple, Protocol, TypeVar
from uuid import uuid4

import torch

from deepep.backends.cuda.memory.ipc import Gather, SymmetricHeap, export_heap, map_heaps
from deepep.runtime.control.membership import Membership


class HeapContents(Protocol):
    """Whatever is made on a heap: this rank's launches of operations, and the tensors they receive in."""

    def wait(self) -> None:
        """Blocks the host until this rank's operations have ended."""

    def is_idle(self) -> bool:
        """True if they have, and peers' heaps can be let go of now. Waits for nothing."""

    def may_write(self) -> bool:
        """True if graphs or copies of this rank may write to peers' heaps behind its operations."""

    def is_held(self) -> bool:
        """True if tensors in the heap are held."""

    def is_in_use(self) -> bool:
        """True if they are, or streams may still read there. Waits for nothing."""

    def mark_read(self) -> None:
        """Notes that the whole device was idle after nothing was held any more."""

    def free(self) -> None:
        """Lets go of the heap."""


_Contents = TypeVar("_Contents", bound=HeapContents)


class Arrival(NamedTuple):
    """The words with which a rank comes to build a generation: a name for it, which nobody has used, and the
    names of those that something of its own may still write to.
    """

    name: str
    writes: tuple[str, ...]

    def encode(self) -> bytes:
        """The words as text."""
        return json.dumps(self).encode()

    @classmethod
    def decode(cls, raw: bytes) -> Arrival:
        """The words that `encode` made a text of. Raises ValueError for anything else."""
        try:
            name, writes = json.loads(raw)
        except (TypeError, ValueError):
            raise ValueError(f"arrival: got {raw[:200]!r}; allowed: a name and names") from None
        if type(name) is not str or not isinstance(writes, list) or not all(type(w) is str for w in writes):
            raise ValueError(f"arrival: got {raw[:200]!r}; allowed: a name and names")
        return cls(name, tuple(writes))


class Generation:
    """One heap of this rank, and who else may write to it.

    name: the same on all ranks. writers: the peers that may. gone: those of earlier memberships that may, as
    (membership, rank). contents: None until they are made. mapped: all ranks' heaps of the generation, until
    this rank has left it.
    """

    def __init__(self, name: str, num_bytes: int, device: torch.device, membership: Membership) -> None:
        self.name, self.num_bytes, self.device = name, num_bytes, device
        self.writers = {rank for rank in membership.members if rank != membership.rank}
        self.gone: list[tuple[Membership, int]] = []
        self.contents: HeapContents | None = None
        self.mapped: list[torch.Tensor] = []
        self._own: torch.Tensor | None = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._membership = membership
        self._is_left = False

    def export(self) -> bytes:
        """This rank's heap, for its peers."""
        assert self._own is not None
        return export_heap(self._own)

    def map(self, exported: list[bytes | None], reach: Container[int]) -> SymmetricHeap:
        """The heaps that all have exported, those of `reach` mapped."""
        assert self._own is not None
        near = [raw if rank in reach else None for rank, raw in enumerate(exported)]
        heap = map_heaps(self._own, self._membership.rank, near)
        self.mapped = heap.mapped
        return heap

    def may_write(self) -> bool:
        """True if something of this rank may still write to the peers' heaps."""
        return self.contents is not None and (not self._is_left or self.contents.may_write())

    def leave(self, *, wait: bool) -> bool:
        """This rank launches nothing here any more: waits for its operations, or looks if they have ended,
        and lets go of the peers' heaps. True if it has left.
        """
        if self.contents is not None and not self._is_left:
            if wait:
                self.contents.wait()
            elif not self.contents.is_idle():
                return False
        self._is_left = True
        if self.may_write():
            return False
        self.mapped.clear()
        return True

    def strike(self, arrivals: dict[int, Arrival]) -> None:
        """Those who have come, and do not name this generation, write here no more."""
        self.writers -= {rank for rank, arrival in arrivals.items() if self.name not in arrival.writes}

    def go_on_with(self, membership: Membership, stayed: Collection[int]) -> None:
        """Another membership: of its ranks, only `stayed` are the processes that they were."""
        self.gone += [(self._membership, rank) for rank in self.writers - set(stayed)]
        self.writers &= set(stayed)
        self._membership = membership

    def free(self) -> bool:
        """Frees the heap if that can be done; True if it was."""
        if not self.leave(wait=False):
            return False
        self.writers = {rank for rank in self.writers if not self._membership.is_over(rank)}
        self.gone = [(before, rank) for before, rank in self.gone if not before.is_over(rank)]
        if self.writers or self.gone or (self.contents is not None and self.contents.is_in_use()):
            return False
        if self.contents is not None:
            self.contents.free()
        self.contents = self._own = None
        return True


_left: list[Generation] = []
"""Of buffers that are no more: heaps that could not be freed with them."""
_left_lock = threading.RLock()


class Generations:
    """The generations of one kind of symmetric memory of one buffer. Under the engine's lock."""

    def __init__(
        self, membership: Membership, device: torch.device, what: str, reach: range | None = None
    ) -> None:
        """what: the name of what is built. reach: the ranks whose heaps this one maps; None: all."""
        self._membership, self._device, self._what = membership, device, what
        self._reach = range(membership.num_ranks) if reach is None else reach
        self._present: Generation | None = None
        self._kept: list[Generation] = []

    @property
    def num_kept_bytes(self) -> int:
        """Bytes of the heaps that are no longer used and cannot be freed yet."""
        return sum(generation.num_bytes for generation in self._kept)

    def build(self, num_bytes: int, make: Callable[[SymmetricHeap], _Contents]) -> _Contents:
        """Ends the present generation, frees what can be freed, and builds the next: a heap of so many bytes
        that its members have mapped, and `make(heap)` on it. Collective over the members.
        """
        gather = gathering(self._membership, self._what)
        arrivals = self._end_present(gather("leave"))
        made = Generation(arrivals[min(arrivals)].name, num_bytes, self._device, self._membership)
        self._kept.append(made)  # whatever happens from here on, peers may have mapped it
        heap = made.map(gather("share")(made.export()), self._reach)
        made.contents = contents = make(heap)
        del heap  # an error's traceback may be held for long
        gather("ready")(b"")  # no rank sends before all heaps are zeroed
        self._kept.remove(made)
        self._present = made
        return contents

    def release(self) -> None:
        """Ends the present generation and frees what can be freed, as `build` does first. Collective."""
        self._end_present(gathering(self._membership, self._what)("leave"))

    def _end_present(self, gather: Gather) -> dict[int, Arrival]:
        """The words of all members, each of which has left its present generation."""
        self.retire(wait=True)
        names = tuple(generation.name for generation in self._kept if generation.may_write())
        came = gather(Arrival(uuid4().hex, names).encode())
        arrivals = {r: Arrival.decode(raw) for r, raw in enumerate(came) if raw is not None}
        for generation in self._kept:
            generation.strike(arrivals)
        self._wait_for_readers()
        self.free()
        return arrivals

    def _wait_for_readers(self) -> None:
        """Waits for the device, as mapping does later: what was read of freed tensors has been read then."""
        retired = [
            generation.contents
            for generation in (*self._kept, *_left)
            if generation.contents is not None and generation.device == self._device
        ]
        torch.cuda.synchronize(self._device)  # tensors whose streams have not caught up are held until then
        freed = [contents for contents in retired if not contents.is_held()]
        torch.cuda.synchronize(self._device)
        for contents in freed:
            contents.mark_read()

    def retire(self, *, wait: bool) -> bool:
        """Ends the present generation: nothing is launched on it any more. With `wait` what was launched has
        ended then. True if nothing of this rank writes to any peer's heap any more.
        """
        if self._present is not None:
            self._kept.append(self._present)
            self._present = None
        unfinished = [generation for generation in self._kept if not generation.leave(wait=wait)]
        return not unfinished

    def free(self) -> None:
        """Frees what can be freed, also of buffers that are no more."""
        with _left_lock:
            for generations in (self._kept, _left):
                for generation in list(generations):  # a buffer may end meanwhile, and leave its own
                    if generation.free() and generation in generations:
                        generations.remove(generation)

    def go_on_with(self, membership: Membership, stayed: Collection[int]) -> None:
        """Builds among the ranks of another membership from now on, of whom only `stayed` were here."""
        present = [] if self._present is None else [self._present]
        for generation in (*self._kept, *present):
            generation.go_on_with(membership, stayed)
        self._membership = membership

    def close(self, came: Collection[int]) -> None:
        """Ends all generations, after `retire`. Idempotent.

        came: ranks that have retired theirs, too, and have come to the end.
        """
        for generation in self._kept:
            generation.strike(dict.fromkeys(came, Arrival("", ())))
        with _left_lock:
            _left.extend(self._kept)
            self._kept = []
            self.free()


def gathering(membership: Membership, what: str) -> Callable[[str], Gather]:
    """A `Gather` over the members for each purpose, through the store. what: the name of what is built."""
    membership.begin(what)
    exchange = membership.gathering(what)

    def gather_as(purpose: str) -> Gather:
        def gather(mine: bytes) -> list[bytes | None]:
            met = exchange(purpose, mine.decode())
            return [met.get(rank) for rank in range(membership.num_ranks)]

        return gather

    return gather_as
