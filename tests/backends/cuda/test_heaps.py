"""Old heaps: freed as soon as nobody can write to them any more, and not before. Ranks are threads, heaps are
small tensors on the CPU; what each rank has mapped is counted. No GPU is needed.
"""

from __future__ import annotations

import os
import random
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepep.backends.cuda.memory import generations
from deepep.backends.cuda.memory.generations import Arrival, Generations
from deepep.backends.cuda.memory.ipc import SymmetricHeap
from deepep.errors import PeerTimeoutError
from deepep.runtime.control import liveness
from deepep.runtime.control.meeting import ControlStore
from deepep.runtime.control.membership import Membership
from deepep.runtime.control.transport import Connections

SEED = int(os.environ.get("DEEPEP_TEST_SEED", "3"))
BYTES = 64


class Contents:
    """On a heap: operations that may still run, and whatever else keeps the heap."""

    def __init__(self) -> None:
        self.runs = self.is_captured = self.has_tensors = self.is_read = False

    def wait(self) -> None:
        self.runs = False

    def is_idle(self) -> bool:
        return not self.runs

    def may_write(self) -> bool:
        return self.is_captured

    def is_in_use(self) -> bool:
        return self.has_tensors or self.is_read

    def is_held(self) -> bool:
        return self.has_tensors

    def mark_read(self) -> None:
        self.is_read = False

    def free(self) -> None: ...


class Machine:
    """Ranks whose heaps and mappings are counted. heaps: the ids of each process'; mapped: by id, by whom.

    process: of each rank, a number: its own until another takes its place. dead: processes that are gone.
    unsafe: heaps that were freed while a living process could write to them. present: ranks that have one.
    """

    def __init__(self, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_ranks = num_ranks
        self.process = list(range(num_ranks))
        self.present = set(range(num_ranks))
        self.dead: set[int] = set()
        self.heaps: dict[int, set[int]] = {rank: set() for rank in range(num_ranks)}
        self.mapped: dict[int, set[int]] = {}
        self.unsafe: list[int] = []
        self.before_sharing: Callable[[int], None] = lambda rank: None
        self._last = 0
        self._replaced: list[Any] = []
        self._here: ContextVar[int] = ContextVar("process")
        monkeypatch.setattr(generations, "export_heap", self._export)
        monkeypatch.setattr(generations, "map_heaps", self._map)
        monkeypatch.setattr(generations, "_left", [])
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(liveness, "is_gone", lambda theirs, mine: int(theirs) in self.dead)
        monkeypatch.setattr(liveness, "is_dead", lambda theirs, mine: int(theirs) in self.dead)
        self.store = store = dist.HashStore()
        self.memberships = [
            Membership(ControlStore(store, "test"), Connections(store), rank, num_ranks, 20.0)
            for rank in range(num_ranks)
        ]
        for membership in self.memberships:
            membership.introduce({rank: str(rank) for rank in range(num_ranks)})
        self.generations = [Generations(m, torch.device("cpu"), "build") for m in self.memberships]
        self.contents: dict[int, Contents] = {}
        self._pool = ThreadPoolExecutor(num_ranks)
        self._naming = threading.Lock()

    def _export(self, own: torch.Tensor) -> bytes:
        here = self._here.get()
        with self._naming:
            self._last += 1
            name = self._last
        self.heaps[here].add(name)
        self.mapped[name] = set()
        weakref.finalize(own, self._freed, here, name)
        self.before_sharing(here)
        return str(name).encode()

    def _map(self, own: torch.Tensor, rank: int, exported: list[bytes | None]) -> SymmetricHeap:
        mapped = [own]
        for peer, raw in enumerate(exported):
            if raw is not None and peer != rank:
                theirs = torch.empty(0)
                self.mapped[int(raw)].add(self._here.get())
                weakref.finalize(theirs, self.mapped[int(raw)].discard, self._here.get())
                mapped.append(theirs)
        return SymmetricHeap(own, mapped)

    def _freed(self, process: int, name: int) -> None:
        self.heaps[process].remove(name)
        if self.mapped[name] - self.dead and process not in self.dead:
            self.unsafe.append(name)

    def each(self, ranks: Collection[int], part: Callable[[int], Any]) -> list[Any]:
        """Calls `part(rank)` as each of `ranks`. What it returned or raised."""

        def call(rank: int) -> Any:
            self._here.set(self.process[rank])
            try:
                return part(rank)
            except Exception as error:  # it is what the test asks for
                return error

        return list(self._pool.map(call, ranks))

    def set_members(self, ranks: Collection[int]) -> None:
        """Has `ranks` leave out all others."""
        for rank in ranks:
            for other in self.present:
                change = self.memberships[rank].unmask if other in ranks else self.memberships[rank].mask
                change(other)

    def build(self, *ranks: int) -> None:
        """Has `ranks` build memory between them."""
        self.set_members(ranks)

        def part(rank: int) -> None:
            self.contents[rank] = self.generations[rank].build(BYTES, lambda heap: Contents())

        assert self.each(ranks, part) == [None] * len(ranks)

    def counts(self, *ranks: int) -> list[int]:
        """The number of heaps of each."""
        return [len(self.heaps[self.process[rank]]) for rank in ranks]

    def die(self, rank: int) -> int:
        """The process of a rank is gone, with its mappings. Its number."""
        self.dead.add(self.process[rank])
        return self.process[rank]

    def admit(self, members: Collection[int], rank: int) -> int:
        """Has the members go on with a new process as `rank`; the process that was it before."""
        before, number = self.process[rank], len(self.heaps)
        self._replaced.append((self.generations[rank], self.contents.pop(rank, None)))  # it may live on
        self.process[rank], self.heaps[number] = number, set()
        self.present = {*members, rank}
        vacant = set(range(self.num_ranks)) - self.present
        for r in self.present:
            place = ControlStore(self.store, f"test-{number}"), Connections(self.store)
            self.memberships[r] = Membership(*place, r, self.num_ranks, 20.0, vacant)
            self.memberships[r].introduce({other: str(self.process[other]) for other in self.present})
            if r == rank:
                self.generations[r] = Generations(self.memberships[r], torch.device("cpu"), "build")
            else:
                self.generations[r].go_on_with(self.memberships[r], members)
        return before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Machine]]:
    made: list[Machine] = []

    def make(num_ranks: int) -> Machine:
        made.append(Machine(num_ranks, monkeypatch))
        return made[-1]

    yield make
    for each in made:
        assert not each.unsafe


def test_memory_is_flat_while_all_come_and_go(machine: Callable[[int], Machine]) -> None:
    m = machine(3)
    for _ in range(30):
        m.build(0, 1, 2)
        assert m.counts(0, 1, 2) == [1, 1, 1]
        m.build(0, 1)
        assert m.counts(0, 1, 2) == [2, 2, 1], "rank 2 lives, and may write to one of them"


def test_the_store_keeps_a_bounded_number_of_keys(machine: Callable[[int], Machine]) -> None:
    m = machine(3)
    seen = []
    for _ in range(12):
        m.build(0, 1, 2)
        m.build(0, 1)
        seen.append(m.store.num_keys())
    assert seen[-1] == seen[3], seen


def test_what_a_silent_rank_may_write_to_is_one_heap(machine: Callable[[int], Machine]) -> None:
    m = machine(4)
    m.build(0, 1, 2, 3)
    for _ in range(10):
        m.build(0, 1, 2)
        assert m.counts(0, 1, 2) == [2, 2, 2]
    for _ in range(10):
        m.build(0, 1)
        assert m.counts(0, 1) == [3, 3], "one for rank 3, one for rank 2"
    m.build(0, 1, 2, 3)
    assert m.counts(0, 1, 2, 3) == [1, 1, 1, 1]


def test_a_heap_is_freed_when_the_process_is_gone(machine: Callable[[int], Machine]) -> None:
    m = machine(3)
    m.build(0, 1, 2)
    m.build(0, 1)
    assert m.generations[0].num_kept_bytes == BYTES
    m.die(2)
    m.build(0, 1)
    assert m.counts(0, 1) == [1, 1]
    assert m.generations[0].num_kept_bytes == 0


def test_the_word_of_a_successor_is_its_own(machine: Callable[[int], Machine]) -> None:
    """The process before it lives, and may write to a heap of old until it is gone, or departs by itself.
    It is the lowest rank, after which generations are named.
    """
    m = machine(3)
    m.build(0, 1, 2)
    m.build(1, 2)
    assert m.counts(1, 2) == [2, 2]
    first = m.admit((1, 2), 0)
    for _ in range(3):
        m.build(0, 1, 2)
        assert m.counts(0, 1, 2) == [1, 2, 2]
    departed = m.memberships[0]
    m.memberships[1].mask(0), m.memberships[2].mask(0)
    departed.depart(m.generations[0].retire(wait=True))  # the second one
    m.admit((1, 2), 0)
    m.build(0, 1, 2)
    assert m.counts(0, 1, 2) == [1, 2, 2]
    m.dead.add(first)
    m.build(0, 1, 2)
    assert m.counts(0, 1, 2) == [1, 1, 1]


def test_captured_graphs_keep_their_memory_over_admissions(machine: Callable[[int], Machine]) -> None:
    m = machine(3)
    m.build(0, 1, 2)
    m.contents[1].is_captured = True
    m.die(2)
    m.admit((0, 1), 2)
    for _ in range(3):
        m.build(0, 1, 2)
        assert m.counts(0, 1, 2) == [2, 2, 1]
    m.contents[0].is_captured = True
    m.build(0, 1, 2)
    assert m.counts(0, 1, 2) == [3, 3, 2]


def test_a_rank_waits_for_its_own_kernels_before_it_comes(machine: Callable[[int], Machine]) -> None:
    m = machine(2)
    m.build(0, 1)
    old = dict(m.contents)
    for contents in old.values():
        contents.runs = True
    m.build(0, 1)
    assert not any(contents.runs for contents in old.values())
    assert m.counts(0, 1) == [1, 1]


def test_captured_graphs_keep_their_memory_for_good(machine: Callable[[int], Machine]) -> None:
    """One rank has captured: the heaps that its graphs write to stay, here and at its peers; none later."""
    m = machine(3)
    m.build(0, 1, 2)
    m.contents[1].is_captured = True
    for _ in range(5):
        m.build(0, 1, 2)
        assert m.counts(0, 1, 2) == [2, 2, 2]
    m.die(1)
    m.build(0, 2)
    assert m.counts(0, 2) == [1, 1]


def test_held_tensors_keep_a_heap_until_they_are_freed(machine: Callable[[int], Machine]) -> None:
    m = machine(2)
    m.build(0, 1)
    held = m.contents[0]
    held.has_tensors = True
    m.build(0, 1)
    assert m.counts(0, 1) == [2, 1]
    held.has_tensors = False
    m.build(0, 1)
    assert m.counts(0, 1) == [1, 1]


def test_readers_under_way_keep_no_heap(machine: Callable[[int], Machine]) -> None:
    """Streams are busy whenever ranks begin anew: that waits for the device. An end does not."""
    m = machine(2)
    for _ in range(3):
        m.build(0, 1)
        for contents in m.contents.values():
            contents.is_read = True
        assert m.counts(0, 1) == [1, 1]
    m.each((0, 1), lambda rank: m.generations[rank].retire(wait=True))
    m.generations[0].close((0, 1))
    assert m.counts(0) == [1]


@pytest.mark.parametrize("before_sharing", [True, False])
def test_a_construction_that_fails_keeps_what_peers_may_have_mapped(
    machine: Callable[[int], Machine], before_sharing: bool
) -> None:
    """Rank 2 stops after it has come, and the others give it up. All is freed when all have come again."""
    m = machine(3)
    m.build(0, 1, 2)

    def stop(rank: int) -> None:
        if rank == 2:
            raise KeyboardInterrupt

    def make(rank: int) -> Contents:
        stop(rank)
        return Contents()

    if before_sharing:
        m.before_sharing = stop
    for membership in m.memberships:
        membership.timeout = 1.0

    def part(rank: int) -> Any:
        try:
            m.generations[rank].build(BYTES, lambda heap: make(rank))
        except KeyboardInterrupt:
            return "stopped"

    outcomes = m.each((0, 1, 2), part)
    assert [type(outcome) for outcome in outcomes] == [PeerTimeoutError, PeerTimeoutError, str]
    m.before_sharing = lambda rank: None
    for membership in m.memberships:
        membership.timeout = 20.0
    m.build(0, 1)
    assert m.counts(0, 1) == [2, 2]
    m.build(0, 1, 2)
    assert m.counts(0, 1, 2) == [1, 1, 1]


def test_the_end_frees_what_all_have_left(machine: Callable[[int], Machine]) -> None:
    m = machine(2)
    m.build(0, 1)
    assert m.each((0, 1), lambda rank: m.generations[rank].retire(wait=True)) == [True, True]
    for rank in range(2):
        m.generations[rank].close((0, 1))
    m.contents.clear()
    assert m.counts(0, 1) == [0, 0]


def test_an_end_alone_frees_when_the_others_have_ended_too(machine: Callable[[int], Machine]) -> None:
    """After a time-out, or when a buffer is only dropped: kept until the peers say that they are quiet."""
    m = machine(3)
    m.build(0, 1, 2)
    m.contents.clear()
    m.generations[0].retire(wait=True)
    m.generations[0].close(())
    assert m.counts(0) == [1]
    m.memberships[1].depart(False)
    m.memberships[2].depart(m.generations[2].retire(wait=True))
    m.generations[0].free()
    assert m.counts(0) == [1], "rank 1 has departed with operations under way"
    m.die(1)
    m.set_members((0,))
    another = Generations(m.memberships[0], torch.device("cpu"), "another buffer's")
    m.each((0,), lambda rank: another.build(BYTES, lambda heap: Contents()))
    assert m.counts(0) == [1], "its own"


def test_operations_under_way_keep_heaps_of_a_dropped_buffer(machine: Callable[[int], Machine]) -> None:
    m = machine(1)
    m.build(0)
    contents = m.contents.pop(0)
    contents.runs = True
    assert not m.generations[0].retire(wait=False)
    m.generations[0].close(())
    assert m.counts(0) == [1]
    contents.runs = False
    m.generations[0].free()
    assert m.counts(0) == [0]


def test_drawn_histories(machine: Callable[[int], Machine]) -> None:
    """Ranks fall silent, come back, die and are replaced, in drawn order. No heap is freed that a living
    process has mapped; a rank keeps one for each that is silent and alive, at most.
    """
    print(f"seed {SEED} (DEEPEP_TEST_SEED)")
    choices = random.Random(SEED)
    for _ in range(6):
        m = machine(5)
        m.build(*range(5))
        for _ in range(25):
            living = [rank for rank in sorted(m.present) if m.process[rank] not in m.dead]
            if len(living) > 2 and choices.random() < 0.06:
                m.die(choices.choice(living))
                continue
            members = sorted(choices.sample(living, choices.randint(1, len(living))))
            others = sorted(set(range(5)) - set(members))
            if others and choices.random() < 0.3:
                m.set_members(members)
                m.admit(members, choices.choice(others))
                continue
            m.build(*members)
            silent = set(m.heaps) - m.dead - {m.process[rank] for rank in members}
            assert max(m.counts(*members)) <= 1 + len(silent)
            assert not m.unsafe


@pytest.mark.parametrize(
    "raw", [b"", b"1", b"{}", b"[1, []]", b'["1", [2]]', b'["1", "a"]', b'["1", [], 2]', b"\xff"]
)
def test_words_of_another_kind_are_refused(raw: bytes) -> None:
    assert Arrival.decode(Arrival("c", ("a", "b")).encode()) == Arrival("c", ("a", "b"))
    with pytest.raises(ValueError, match="arrival: got"):
        Arrival.decode(raw)
