"""Revision of a placement: from the one in force towards what new loads ask for, as far as moving pays.

A full search (search.py) may move every expert for a gain of a per mille. So beside its result stand the
placement in force, and those on a path of single moves from it, each of which takes from the busiest rank:
two experts change places, or a replica gives its place to another expert. Of all these the best is taken,
what has to be brought being counted. The path does not depend on the price: the higher that is, the fewer
experts move.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from deepep.errors import ArgumentTypeError, RangeError
from deepep.placement.experts import EMPTY, ExpertPlacement, load_values
from deepep.runtime.checks import check_int

_LEAST_GAIN = 1e-3
"""Part of a rank's mean load that a move has to take from the busiest rank, to be a step of the path."""


def revise(
    previous: ExpertPlacement,
    wanted: ExpertPlacement,
    loads: Tensor | Sequence[float],
    moving_cost: float,
    *,
    num_domains: int = 1,
) -> ExpertPlacement:
    """The placement to go on with after `previous`, for loads [E]; `wanted`: what `place` makes of them.

    It has the least of imbalance + moving_cost * n among those that are looked at, `previous` and `wanted`
    (renumbered) among them; n is how many experts are brought to a rank, on average. So moving_cost is what
    bringing each rank one expert has to gain, in parts of a rank's mean load: 0.01 is one per cent. 0: only
    the imbalance counts. Of several as good, the one that moves least.

    num_domains: as `place` had it; experts move between ranks of a domain alone, but by `wanted`. Where
    `previous` has another number of places, or empty ones, only `wanted` is looked at. The same arguments,
    the same placement, on every rank. Raises ArgumentTypeError, ShapeError or RangeError.
    """
    if not isinstance(wanted, ExpertPlacement):
        raise ArgumentTypeError("wanted", type(wanted).__name__, "an ExpertPlacement")
    if isinstance(moving_cost, bool) or not isinstance(moving_cost, int | float):
        raise ArgumentTypeError("moving_cost", type(moving_cost).__name__, "a number")
    if not 0 <= moving_cost < math.inf:
        raise RangeError("moving_cost", f"{moving_cost}", "a finite number from 0")
    values = load_values(loads, wanted.num_experts)
    full = wanted.renumbered(previous, num_domains)
    if previous.num_physical != full.num_physical or EMPTY in previous.experts:
        return full

    def price(placement: ExpertPlacement) -> tuple[float, int]:
        moved = placement.num_moved(previous)
        return placement.imbalance(values) + moving_cost * moved / placement.num_ranks, moved

    return min((previous, *_path(previous, values, num_domains), full), key=price)


@dataclass(frozen=True)
class _Step:
    """Experts that take places: at (rank, local index), in order. loads: of the ranks that it touches."""

    places: tuple[tuple[int, int, int], ...]
    loads: dict[int, float]

    def gain(self, top: float) -> float:
        """Load taken from a busiest rank with load `top`, for each expert that is brought."""
        return (top - max(self.loads.values())) / len(self.places)


def _path(previous: ExpertPlacement, values: list[float], num_domains: int) -> Iterator[ExpertPlacement]:
    """Placements, each a step from the one before, until no step takes much from the busiest rank."""
    at = _Ranks(previous, values, check_int("num_domains", num_domains, 1, previous.num_ranks))
    least = _LEAST_GAIN * math.fsum(values) / previous.num_ranks
    for _ in range(2 * previous.num_physical):
        top = max(range(previous.num_ranks), key=lambda r: (at.loads[r], -r))
        best = max(at.steps(top), key=lambda step: step.gain(at.loads[top]), default=None)
        if best is None or best.gain(at.loads[top]) <= least:
            return
        at.take(best)
        experts = tuple(expert for rank in at.ranks for expert in rank)
        yield ExpertPlacement(previous.num_experts, previous.num_ranks, experts)


class _Ranks:
    """Experts of each rank, by local index, and what each rank has to do."""

    def __init__(self, placement: ExpertPlacement, values: list[float], num_domains: int) -> None:
        self.ranks = [list(placement.of_rank(rank)) for rank in range(placement.num_ranks)]
        self._values, self._size = values, placement.num_ranks // num_domains
        self._holders: list[list[int]] = [[] for _ in values]
        """By expert: the ranks of its replicas."""
        for rank, experts in enumerate(self.ranks):
            for expert in experts:
                self._holders[expert].append(rank)
        self.loads = [self._load(rank, {}) for rank in range(placement.num_ranks)]

    def _load(self, rank: int, changed: dict[int, int], experts: Sequence[int] | None = None) -> float:
        """Load of a rank with `experts` (None: its own). changed: by expert, how many replicas to assume."""
        experts = self.ranks[rank] if experts is None else experts
        return math.fsum(self._values[e] / changed.get(e, len(self._holders[e])) for e in experts)

    def steps(self, top: int) -> Iterator[_Step]:
        """Steps that may take from rank `top`, inside its domain."""
        first = top // self._size * self._size
        domain = range(first, first + self._size)
        for rank in domain:
            if rank != top:
                yield from self._swaps(top, rank)
                for local, given in enumerate(self.ranks[rank]):
                    if len(self._holders[given]) > 1:
                        for expert in set(self.ranks[top]) - set(self.ranks[rank]):
                            yield self._replacement(rank, local, expert)
        for local, given in enumerate(self.ranks[top]):
            if len(self._holders[given]) > 1:
                others = {expert for rank in domain for expert in self.ranks[rank]}
                for expert in sorted(others - set(self.ranks[top])):
                    yield self._replacement(top, local, expert)

    def _swaps(self, top: int, other: int) -> Iterator[_Step]:
        here, there = self.ranks[top], self.ranks[other]
        for i, given in enumerate(here):
            for j, taken in enumerate(there):
                if given in there or taken in here:
                    continue
                less = self._values[given] / len(self._holders[given])
                less -= self._values[taken] / len(self._holders[taken])
                if 0 < less < self.loads[top] - self.loads[other]:
                    yield _Step(
                        ((top, i, taken), (other, j, given)),
                        {
                            top: self._load(top, {}, [*here[:i], taken, *here[i + 1 :]]),
                            other: self._load(other, {}, [*there[:j], given, *there[j + 1 :]]),
                        },
                    )

    def _replacement(self, rank: int, local: int, expert: int) -> _Step:
        """`expert` gets one replica more, in place of one of an expert that has several."""
        given = self.ranks[rank][local]
        changed = {expert: len(self._holders[expert]) + 1, given: len(self._holders[given]) - 1}
        loads = {r: self._load(r, changed) for r in {*self._holders[expert], *self._holders[given]}}
        own = self.ranks[rank]
        loads[rank] = self._load(rank, changed, [*own[:local], expert, *own[local + 1 :]])
        return _Step(((rank, local, expert),), loads)

    def take(self, step: _Step) -> None:
        """Goes on from there."""
        for rank, local, expert in step.places:
            self._holders[self.ranks[rank][local]].remove(rank)
            self.ranks[rank][local] = expert
            self._holders[expert].append(rank)
        for rank, load in step.loads.items():
            self.loads[rank] = load
