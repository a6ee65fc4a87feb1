"""Clusters to emulate: the links between ranks, their rates and delays. Pure descriptions.

Symbols: R ranks, M groups (racks). Rates are bytes a second in each direction, delays seconds one way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

MB = 1e6
MS = 1e-3


@dataclass(frozen=True)
class EmulatedCluster:
    """Ranks with a port each, in groups that may share an uplink.

    groups: ranks by group, each of the R once. port_rates: [R], of the ranks' own ports. uplink_rate: of
    what a group's ranks share towards all others, 0 for none. delay: between two ranks of a group;
    far_delay: of different groups.
    """

    name: str
    groups: tuple[tuple[int, ...], ...]
    port_rates: tuple[float, ...]
    uplink_rate: float = 0.0
    delay: float = 0.0
    far_delay: float = 0.0

    def __post_init__(self) -> None:
        ranks = sorted(rank for group in self.groups for rank in group)
        if ranks != list(range(len(self.port_rates))):
            raise ValueError(f"groups: got {self.groups}; allowed: each of {len(self.port_rates)} ranks once")
        if min(self.port_rates) <= 0 or min(self.uplink_rate, self.delay, self.far_delay) < 0:
            raise ValueError("rates and delays: allowed: ports above 0, the others at least 0")

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.port_rates)

    def group_of(self, rank: int) -> int:
        """The index of a rank's group."""
        return next(number for number, group in enumerate(self.groups) if rank in group)

    @property
    def rates(self) -> list[float]:
        """By link: R ports out, R ports in, and where there are uplinks M out and M in."""
        uplinks = [self.uplink_rate] * (2 * len(self.groups)) if self.uplink_rate else []
        return [*self.port_rates, *self.port_rates, *uplinks]

    def path(self, source: int, target: int) -> tuple[list[int], float]:
        """The links that a packet crosses in their order, and its delay."""
        here, there = self.group_of(source), self.group_of(target)
        last = self.num_ranks + target
        if here == there:
            return [source, last], self.delay
        base = 2 * self.num_ranks
        between = [base + here, base + len(self.groups) + there] if self.uplink_rate else []
        return [source, *between, last], self.far_delay

    def bottleneck(self, source: int, target: int) -> float:
        """The lowest rate on the way from one rank to another."""
        return min(self.rates[link] for link in self.path(source, target)[0])

    def slowed(self, rank: int, factor: float) -> EmulatedCluster:
        """The same with one rank's port slower by a factor."""
        rates = [rate / factor if r == rank else rate for r, rate in enumerate(self.port_rates)]
        return replace(self, name=f"{self.name}, rank {rank} slowed", port_rates=tuple(rates))

    def to_json(self) -> str:
        """One line for the switch: `rates` by link, `paths` by source and target as [links, delay]."""
        everyone = range(self.num_ranks)
        paths = [[self.path(i, j) if i != j else ([], 0.0) for j in everyone] for i in everyone]
        return json.dumps({"rates": self.rates, "paths": paths})


def _flat(ranks: int) -> EmulatedCluster:
    return EmulatedCluster("flat", (tuple(range(ranks)),), (10 * MB,) * ranks, delay=0.2 * MS)


def _racks(ranks: int) -> EmulatedCluster:
    half = ranks // 2
    groups = (tuple(range(half)), tuple(range(half, ranks)))
    return EmulatedCluster("racks", groups, (25 * MB,) * ranks, 5 * MB, 0.2 * MS, 1 * MS)


def _interleaved(ranks: int) -> EmulatedCluster:
    groups = (tuple(range(0, ranks, 2)), tuple(range(1, ranks, 2)))
    return replace(_racks(ranks), name="interleaved", groups=groups)


def _slow_port(ranks: int) -> EmulatedCluster:
    rates = (10 * MB,) * (ranks - 1) + (2 * MB,)
    return EmulatedCluster("slow-port", (tuple(range(ranks)),), rates, delay=0.2 * MS)


def _far(ranks: int) -> EmulatedCluster:
    return EmulatedCluster("far", (tuple(range(ranks)),), (10 * MB,) * ranks, delay=10 * MS)


CLUSTERS = {
    "flat": _flat,
    "racks": _racks,
    "interleaved": _interleaved,
    "slow-port": _slow_port,
    "far": _far,
}
"""By name, a function of the number of ranks: one switch; two racks behind narrow uplinks, laid out in order
or round-robin, as schedulers may; one port of a fifth the rate; ten milliseconds between any two. All ports
together carry what a switch in Python moves without being the slowest part: some 100 MB/s.
"""


def cluster(name: str, ranks: int = 8) -> EmulatedCluster:
    """A named cluster. Raises ValueError for a name or number of ranks that it cannot have."""
    if name not in CLUSTERS:
        raise ValueError(f"cluster: got {name!r}; allowed: {', '.join(CLUSTERS)}")
    if not 2 <= ranks <= 128:
        raise ValueError(f"ranks: got {ranks}; allowed: 2 to 128")
    return CLUSTERS[name](ranks)
