"""The arena that torch takes the slots' segments from, and who may have what came back; no GPU is needed.

The model is one letter for each unit of memory. The arena is reached as torch reaches it, through the two C
functions, at addresses where nothing is: it touches no memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_cuda = pytest.importorskip("deepep._cuda", reason="deepep._cuda is not built")

UNIT = 512
UNITS = 16
BASE = 1 << 44


class Arena:
    """`num_units` units at BASE; addresses as numbers of units from there."""

    def __init__(self, num_units: int = UNITS) -> None:
        self.id = _cuda.arena_open(BASE, num_units * UNIT + 100)  # what is not a whole unit is left
        functions = ctypes.CDLL(_cuda.__file__)
        self._take = functions.deepep_arena_take
        self._take.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._take.restype = ctypes.c_void_p
        self._give_back = functions.deepep_arena_give_back
        self._give_back.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._give_back.restype = None

    def take(self, units: int) -> int | None:
        _cuda.arena_select(self.id)
        address = self._take(units * UNIT - 7, 0, None)
        _cuda.arena_select(0)
        return None if address is None else self._unit(address)

    def reserve(self, units: int) -> int | None:
        return self._unit(_cuda.arena_reserve(self.id, units * UNIT))

    def give_back(self, unit: int, units: int) -> None:
        self._give_back(BASE + unit * UNIT, units * UNIT - 7, 0, None)

    def reserve_tail(self, units: int) -> int | None:
        return self._unit(_cuda.arena_reserve_tail(self.id, units * UNIT - 7))

    def free_returned(self) -> None:
        _cuda.arena_free_returned(self.id, _cuda.arena_returned(self.id))

    @staticmethod
    def _unit(address: int) -> int | None:
        assert address % UNIT == 0
        return None if address == 0 else (address - BASE) // UNIT


@contextmanager
def opened(num_units: int = UNITS) -> Iterator[Arena]:
    arena = Arena(num_units)
    try:
        yield arena
    finally:
        _cuda.arena_close(arena.id)


OPERATIONS = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 8)),
    st.tuples(st.just("take"), st.integers(1, 4)),
    st.tuples(st.just("give back"), st.integers(0, 30)),
    st.tuples(st.just("settle"), st.integers(0, 5)),
    st.tuples(st.just("set aside"), st.integers(1, 8)),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(OPERATIONS, max_size=60))
def test_every_operation_does_what_the_model_does(operations: list[tuple[str, int]]) -> None:
    """First fit from below; what came back rests until it is settled, and then joins its neighbours; what is
    set aside grows from above, over free memory alone.
    """
    memory = ["free"] * UNITS
    held: list[tuple[int, int]] = []
    resting: list[tuple[int, int]] = []
    came_back = aside = 0

    def mark(unit: int, units: int, what: str, before: str) -> None:
        assert memory[unit : unit + units] == [before] * units
        memory[unit : unit + units] = [what] * units

    with opened() as arena:
        for name, number in operations:
            if name == "take":
                starts = (u for u in range(UNITS) if memory[u : u + number] == ["free"] * number)
                want = next(starts, None)
                assert arena.take(number) == want
                if want is not None:
                    mark(want, number, "held", "free")
                    held.append((want, number))
            elif name == "give back" and held:
                block = held.pop(number % len(held))
                arena.give_back(*block)
                mark(*block, "resting", "held")
                resting.append(block)
                came_back += 1
            elif name == "settle":
                freed = came_back - len(resting)
                _cuda.arena_free_returned(arena.id, freed + number)
                for block in resting[:number]:
                    mark(*block, "free", "resting")
                del resting[:number]
            elif name == "set aside":
                more = max(0, number - aside)
                begin = UNITS - aside - more
                fits = memory[begin : begin + more] == ["free"] * more
                assert arena.reserve_tail(number) == (UNITS - number if fits else None)
                if fits:
                    mark(begin, more, "aside", "free")
                    aside += more
            assert _cuda.arena_used(arena.id) == UNIT * memory.count("held")
            assert _cuda.arena_returned(arena.id) == came_back
        # Nothing is lost: all but what was set aside is one stretch again.
        for block in held:
            arena.give_back(*block)
        arena.free_returned()
        if aside < UNITS:
            assert arena.take(UNITS - aside) == 0
        assert arena.take(1) is None


def test_what_came_back_rests_until_it_is_settled() -> None:
    with opened(4) as arena:
        assert arena.take(4) == 0
        arena.give_back(0, 4)
        assert _cuda.arena_used(arena.id) == 0
        assert arena.take(1) is None
        assert arena.reserve_tail(1) is None
        seen = _cuda.arena_returned(arena.id)
        _cuda.arena_free_returned(arena.id, seen)
        assert arena.take(2) == 0
        arena.give_back(0, 2)
        _cuda.arena_free_returned(arena.id, seen)  # later than was looked: not freed
        assert arena.take(3) is None
        arena.free_returned()
        assert arena.take(4) == 0


def test_what_is_set_aside_stays_so() -> None:
    with opened(10) as arena:
        assert arena.reserve_tail(3) == 7
        assert arena.reserve_tail(2) == 8  # was there before
        assert arena.take(8) is None
        assert arena.take(7) == 0
        assert arena.reserve_tail(4) is None
        assert arena.reserve_tail(3) == 7
        arena.give_back(0, 7)
        arena.free_returned()
        assert arena.reserve_tail(11) is None
        assert arena.reserve_tail(10) == 0
        assert arena.take(1) is None


def test_a_graphs_slot_lies_below() -> None:
    """A captured graph's slot is taken as any block is, and never given back."""
    with opened(10) as arena:
        assert arena.reserve_tail(4) == 6
        assert arena.reserve(3) == 0
        assert arena.reserve(4) is None
        assert arena.reserve(3) == 3
        assert arena.reserve_tail(5) is None


def test_a_closed_arena_has_nothing() -> None:
    with opened(10) as arena:
        pass
    assert arena.take(1) is None
    assert arena.reserve_tail(1) is None
    assert _cuda.arena_used(arena.id) == 0
    assert _cuda.arena_returned(arena.id) == 0
