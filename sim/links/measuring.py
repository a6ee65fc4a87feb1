"""Measurements inside an emulated network: whether its links have the rates and delays asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from deepep.sim.links.clusters import EmulatedCluster
from deepep.sim.links.emulated import EmulatedNetwork
from deepep.sim.worlds.world import World

MOST_RATE_OFF, MOST_DELAY_OFF = 0.15, 2e-3
"""Share by which a rate may differ from what was asked, and seconds by which a delay may."""
_FIRST, _ROUNDS = 32 << 10, 20


@dataclass(frozen=True)
class LinkMeasurement:
    """A rate (bytes a second) or a delay (seconds one way), as asked and as measured."""

    what: str
    asked: float
    got: float
    is_rate: bool

    @property
    def holds(self) -> bool:
        """True if it is within what may differ."""
        if self.is_rate:
            return abs(self.got / self.asked - 1) <= MOST_RATE_OFF
        return abs(self.got - self.asked) <= MOST_DELAY_OFF


def measure_links(cluster: EmulatedCluster) -> list[LinkMeasurement]:
    """Delays and rates of a cluster's kinds of links, as gloo gets them. Raises NetworkError."""
    near = _pair(cluster, same_group=True)
    far = _pair(cluster, same_group=False)
    found = []
    with EmulatedNetwork(cluster) as network, World(cluster.num_ranks, network=network) as world:
        for name, pair in (("in a group", near), ("between groups", far)):
            if pair is None:
                continue
            delay = min(value for value in world.run(_ping, *pair) if value is not None)
            found.append(LinkMeasurement(f"delay {name}", cluster.path(*pair)[1], delay, False))
            rate = _best_rate(world, [pair], cluster.bottleneck(*pair))
            found.append(LinkMeasurement(f"rate {name}", cluster.bottleneck(*pair), rate, True))
        if cluster.uplink_rate:
            pairs = list(zip(cluster.groups[0], cluster.groups[1], strict=False))
            rate = _best_rate(world, pairs, cluster.uplink_rate / len(pairs))
            asked = min(cluster.uplink_rate, sum(cluster.port_rates[i] for i, _ in pairs))
            what = f"rate between groups, {len(pairs)} pairs at once"
            found.append(LinkMeasurement(what, asked, rate, True))
    return found


def _best_rate(world: World, pairs: list[tuple[int, int]], rate: float) -> float:
    """The highest of three rates, all pairs' together: less says that this machine was busy."""
    length = max(_FIRST, round(rate))  # a second's
    best = 0.0
    for _ in range(3):
        spans = [span for span in world.run(_stream, pairs, length) if span is not None]
        seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
        best = max(best, len(spans) * length / seconds)
    return best


def _pair(cluster: EmulatedCluster, same_group: bool) -> tuple[int, int] | None:
    first = cluster.groups[0]
    if same_group:
        return (first[0], first[1]) if len(first) > 1 else None
    return (first[0], cluster.groups[1][0]) if len(cluster.groups) > 1 else None


def _ping(context: Any, first: int, second: int) -> float | None:
    """Half of the shortest round trip, on the ranks of the pair."""
    import torch
    import torch.distributed as dist

    if context.rank not in (first, second):
        return None
    word, best = torch.zeros(8, dtype=torch.uint8), float("inf")
    for _ in range(_ROUNDS):
        started = time.monotonic()
        if context.rank == first:
            dist.send(word, second)
            dist.recv(word, second)
        else:
            dist.recv(word, first)
            dist.send(word, first)
        best = min(best, (time.monotonic() - started) / 2)
    return best


def _stream(context: Any, pairs: list[tuple[int, int]], length: int) -> tuple[float, float] | None:
    """Receives a first message, and one of `length` after it: when it had each; None on the other ranks.

    By the machine's clock, which all ranks share: pairs that share a link end at different times, and what
    they have together is known by the last alone.
    """
    import torch
    import torch.distributed as dist

    messages = [torch.zeros(size, dtype=torch.uint8) for size in (_FIRST, length)]
    dist.barrier()
    for source, target in pairs:
        if context.rank == source:
            for work in [context.group.send([message], target, 0) for message in messages]:
                work.wait()
        elif context.rank == target:
            first, second = [context.group.recv([message], source, 0) for message in messages]
            first.wait()
            started = time.monotonic()
            second.wait()
            return started, time.monotonic()
    return None
