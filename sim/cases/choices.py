"""Sources of a drawn case's decisions: a seeded generator, or hypothesis.

Cases are drawn by one piece of code (deepep.sim.cases.case). Every decision is taken by a `Choices`, so the
fuzz loop draws thousands of cases a second from a seed, and hypothesis draws, and shrinks, the very same
ones. By convention the first or smallest alternative is the simplest: that is where shrinking goes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Choices(Protocol):
    """A source of decisions."""

    #: Draw routing matrices up to this many entries one entry at a time, so that each can shrink by itself.
    entries_one_by_one: int

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""

    def flag(self, probability: float = 0.5) -> bool:
        """True with about this probability, where the source knows probabilities."""

    def seed(self) -> int:
        """A seed for values that need no shrinking, below 2^32."""


class RandomChoices:
    """Decisions from a seed: the same seed, the same case, on every platform and Python version."""

    entries_one_by_one = 0

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        # Not randint: its algorithm is not promised to stay the same across Python versions, random()'s is.
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.integer(0, len(items) - 1)]

    def flag(self, probability: float = 0.5) -> bool:
        return self._random.random() < probability

    def seed(self) -> int:
        return self.integer(0, 2**32 - 1)
