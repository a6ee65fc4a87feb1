"""Ranges of memory that are free, and the first that is free on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

ALIGNMENT = 256
"""Of every part, in bytes."""

Range = tuple[int, int]
"""From the first byte to behind the last."""


def rounded(num_bytes: int) -> int:
    """The size of a part that holds so many bytes."""
    return -(-max(num_bytes, 1) // ALIGNMENT) * ALIGNMENT


def common(free: Sequence[Sequence[Range]]) -> list[Range]:
    """Ranges that are free on all ranks, ascending. free: of each rank, ascending and apart."""
    found: list[Range] = list(free[0])
    for other in free[1:]:
        met = ((max(a, c), min(b, d)) for a, b in found for c, d in other)
        found = sorted((begin, end) for begin, end in met if begin < end)
    return found


def first_fit(free: Sequence[Range], num_bytes: int) -> int | None:
    """Place for a part of so many bytes, in the first range that holds it; None: in none."""
    size = rounded(num_bytes)
    return next((begin for begin, end in free if end - begin >= size), None)


def last_fit(free: Sequence[Range], num_bytes: int) -> int | None:
    """The same at the end of the last range that holds it: parts of another size than those at the front do
    not lie between them."""
    size = rounded(num_bytes)
    ends = [end for begin, end in free if end - begin >= size]
    return ends[-1] - size if ends else None


class FreeRanges:
    """Ranges of one rank's memory that are free."""

    def __init__(self, num_bytes: int) -> None:
        self._end = num_bytes // ALIGNMENT * ALIGNMENT
        self.ranges: list[Range] = [(0, self._end)]

    def add(self, num_bytes: int) -> int:
        """Begin of so many more free bytes: apart from the others, so that no part has some of both."""
        begin = self._end + ALIGNMENT
        self._end = begin + num_bytes // ALIGNMENT * ALIGNMENT
        self.ranges.append((begin, self._end))
        return begin

    @property
    def largest(self) -> int:
        """Bytes of the largest part that there is room for."""
        return max((end - begin for begin, end in self.ranges), default=0)

    def take(self, begin: int, num_bytes: int) -> None:
        """Takes a part, which has to be free."""
        end = begin + rounded(num_bytes)
        for at, (first, last) in enumerate(self.ranges):
            if first <= begin and end <= last:
                left = [(first, begin), (end, last)]
                self.ranges[at : at + 1] = [part for part in left if part[0] < part[1]]
                return
        raise ValueError(f"bytes {begin} to {end} are not free")

    def give_back(self, begin: int, num_bytes: int) -> None:
        """Gives back what `take` took."""
        merged: list[Range] = []
        for first, last in sorted([*self.ranges, (begin, begin + rounded(num_bytes))]):
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        self.ranges = merged
