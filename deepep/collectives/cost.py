"""Cost model: how long a plan takes on links of measured speed, and which ranks are near each other. Pure.

Symbols: R ranks, M groups. Seconds, and bytes a second.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass

from deepep.collectives.traffic import ReductionTraffic, Round

LEAST_GAP = 2.5
"""Ranks form groups where links between them are slower than inside by at least this factor."""


@dataclass(frozen=True)
class LinkSpeeds:
    """Links between R ranks, as a probe has found them.

    latency: [R][R] seconds of an exchange of next to nothing. rate: [R][R] bytes a second from one rank to
    another while no other pair sends. groups: ranks by group, each in ascending order. uplink: bytes a second
    that a group's ranks together send to others, 0 if that is no less than what they send one by one.
    """

    latency: tuple[tuple[float, ...], ...]
    rate: tuple[tuple[float, ...], ...]
    groups: tuple[tuple[int, ...], ...] = ()
    uplink: float = 0.0

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.rate)

    def seconds(self, one: Round) -> tuple[float, float]:
        """A round's latency, and the time of the link that has most to carry.

        A rank's port is as fast as the fastest of its pairs, whichever rank sends or receives.
        """
        out: dict[int, float] = defaultdict(float)
        into: dict[int, float] = defaultdict(float)
        across_out: dict[int, float] = defaultdict(float)
        across_in: dict[int, float] = defaultdict(float)
        group_of = {rank: number for number, group in enumerate(self.groups) for rank in group}
        longest, latency = 0.0, 0.0
        for (source, target), size in one.items():
            latency = max(latency, self.latency[source][target])
            longest = max(longest, size / self.rate[source][target])
            out[source] += size
            into[target] += size
            if self.uplink and group_of[source] != group_of[target]:
                across_out[group_of[source]] += size
                across_in[group_of[target]] += size
        for rank, load in out.items():
            longest = max(longest, load / max(r for t, r in enumerate(self.rate[rank]) if t != rank))
        for rank, load in into.items():
            longest = max(longest, load / max(r[rank] for s, r in enumerate(self.rate) if s != rank))
        for across in (across_out, across_in):
            for load in across.values():
                longest = max(longest, load / self.uplink)
        return latency, longest


def predicted(traffic: ReductionTraffic, speeds: LinkSpeeds) -> float:
    """Seconds that a reduction takes: rounds follow each other, and pieces fill each other's gaps.

    Of pieces the first takes all its rounds; each further one the round that is longest. And no link carries
    more in the time than its rate.
    """
    ahead, total = sum(sum(speeds.seconds(one)) for one in traffic.ahead), 0.0
    carried: Round = {}
    for number, piece in enumerate(traffic.pieces):
        times = [speeds.seconds(one) for one in piece]
        if number == 0:
            total += sum(latency + longest for latency, longest in times)
        else:
            total += max((longest for _, longest in times), default=0.0)
        for one in piece:
            for pair, size in one.items():
                carried[pair] = carried.get(pair, 0) + size
    return ahead + max(total, sum(speeds.seconds(carried)) if carried else 0.0)


def find_groups(
    latency: tuple[tuple[float, ...], ...], rate: tuple[tuple[float, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    """Ranks by group: joined along their best links up to the largest gap, by rate or else by latency.

    One group of all where no gap is `LEAST_GAP`. Groups are in the order of their first ranks.
    """
    slowness = tuple(tuple(1 / r if r else 0.0 for r in row) for row in rate)
    for distance in (slowness, latency):
        groups = _clusters(distance)
        if len(groups) > 1 and _are_apart(groups, distance):
            return groups
    return (tuple(range(len(rate))),)


def _clusters(distance: tuple[tuple[float, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Single linkage, cut at the largest ratio between one joining distance and the next."""
    ranks = len(distance)
    # Both ends measure the same exchange, and whatever else a machine does makes it longer.
    pairs = sorted((min(distance[i][j], distance[j][i]), i, j) for i in range(ranks) for j in range(i))
    joins = _joins(ranks, pairs)
    gaps = [(b[0] / max(a[0], 1e-12), k + 1) for k, (a, b) in enumerate(itertools.pairwise(joins))]
    widest, kept = max(gaps, default=(1.0, 0))
    kept = kept if widest >= LEAST_GAP else len(joins)
    leader = list(range(ranks))
    for _, i, j in joins[:kept]:
        old, new = leader[i], leader[j]
        leader = [new if x == old else x for x in leader]
    groups: dict[int, list[int]] = {}
    for rank in range(ranks):
        groups.setdefault(leader[rank], []).append(rank)
    return tuple(map(tuple, groups.values()))


def _are_apart(groups: tuple[tuple[int, ...], ...], distance: tuple[tuple[float, ...], ...]) -> bool:
    """True if ranks of a group are nearer, in the median, than others: else it was chance."""
    inside = [distance[i][j] for group in groups for i in group for j in group if i != j]
    group_of = {rank: number for number, group in enumerate(groups) for rank in group}
    across = [d for i, row in enumerate(distance) for j, d in enumerate(row) if group_of[i] != group_of[j]]
    return LEAST_GAP * statistics.median(inside or [0.0]) <= statistics.median(across)


def _joins(ranks: int, pairs: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """The shortest pairs that join all ranks, shortest first."""
    leader = list(range(ranks))
    joins = []
    for pair in pairs:
        old, new = leader[pair[1]], leader[pair[2]]
        if old != new:
            leader = [new if x == old else x for x in leader]
            joins.append(pair)
    return joins


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
