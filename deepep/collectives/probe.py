"""Probes: latencies and rates of the links between ranks, measured by sending."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepep.collectives.cost import LinkSpeeds, find_groups
from deepep.collectives.transport import PointToPoint, Steps, drive, empty_message

PINGS, TRIES = 5, 3
"""Of several exchanges alike the fastest counts."""
FIRST_BYTES, MOST_BYTES, LONG = 64 << 10, 4 << 20, 0.02
"""A stream begins with so many bytes, and has so many at most, or as many as take so many seconds."""
SHARED = 0.75
"""Of the sum of what a group's ranks send one by one: less, all at once, says that they share a link."""
Gather = Callable[[list[float]], list[list[float]]]
"""Every rank's numbers, by rank."""


def pairings(ranks: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds in which every rank meets one other, or nobody, until each has met all: a round-robin."""
    seats = [*range(ranks), *([-1] if ranks % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def probe(net: PointToPoint, gather: Gather) -> LinkSpeeds:
    """Speeds of the links between all ranks, the same on each of them. Collective.

    All pairs of a round at once: a pair's ports are its own, but pairs may share a link between groups. So
    once the groups are known, one pair between each two of them has the link to itself, and then all have it.
    """
    ranks = net.num_ranks
    latency, rate = [0.0] * ranks, [0.0] * ranks
    for one in pairings(ranks):
        peer = _peer(net.rank, one)
        if peer is not None:
            latency[peer] = min(_timed(net, peer, 8) for _ in range(PINGS))
        gather([0.0])
    for one in pairings(ranks):
        peer = _peer(net.rank, one)
        if peer is not None:
            rate[peer] = _rate(net, peer, latency[peer])
        gather([0.0])
    found = gather([*latency, *rate])
    latencies = tuple(tuple(row[:ranks]) for row in found)
    rates = tuple(tuple(row[ranks:]) for row in found)
    groups = find_groups(latencies, rates)
    if not 1 < len(groups) < ranks:
        return LinkSpeeds(latencies, rates, groups)
    pairs = [[(a[0], b[0])] for number, a in enumerate(groups) for b in groups[number + 1 :]]
    alone = _together(net, gather, latencies, pairs)
    single = {frozenset((a, b)): value for ((a, b),), (value,) in zip(pairs, alone, strict=True)}
    group_of = {rank: group for group in groups for rank in group}
    rates = tuple(
        tuple(
            value if group_of[i] == group_of[j] else single[frozenset((group_of[i][0], group_of[j][0]))]
            for j, value in enumerate(row)
        )
        for i, row in enumerate(rates)
    )
    width = min(map(len, groups))
    ahead = [list(zip(a[:width], b[:width], strict=True)) for a, b in itertools.pairwise(groups)]
    totals = [sum(values) for values in _together(net, gather, latencies, ahead)]
    singles = [sum(rates[i][j] for i, j in pairs) for pairs in ahead]
    is_shared = min(t / s for t, s in zip(totals, singles, strict=True)) < SHARED
    return LinkSpeeds(latencies, rates, groups, min(totals) if is_shared else 0.0)


def _together(
    net: PointToPoint,
    gather: Gather,
    latencies: tuple[tuple[float, ...], ...],
    steps: list[list[tuple[int, int]]],
) -> list[list[float]]:
    """Rates of pairs, those of one step at a time."""
    found = []
    for pairs in steps:
        peer = _peer(net.rank, pairs)
        mine = 0.0 if peer is None else _rate(net, peer, latencies[net.rank][peer])
        everyone = gather([mine])
        found.append([min(everyone[i][0], everyone[j][0]) for i, j in pairs])
    return found


def _peer(rank: int, pairs: list[tuple[int, int]]) -> int | None:
    """Whom a rank meets."""
    for first, second in pairs:
        if rank in (first, second):
            return second if rank == first else first
    return None


def _timed(net: PointToPoint, peer: int, size: int) -> float:
    """Seconds of an exchange of `size` bytes each way."""
    going = torch.zeros(size, dtype=torch.uint8, device="cpu")
    coming = empty_message(size, going.device)
    started = time.perf_counter()
    _wait(net, going, coming, peer)
    return time.perf_counter() - started


def _rate(net: PointToPoint, peer: int, latency: float) -> float:
    """Bytes a second each way: of ever longer messages, up to one that takes long enough."""
    size = FIRST_BYTES
    while True:
        seconds = min(_timed(net, peer, size) for _ in range(TRIES))
        # Both have to go on, or neither: the slower one's time counts.
        mine = torch.tensor([seconds], dtype=torch.float64, device="cpu").view(torch.uint8)
        theirs = torch.empty_like(mine)
        _wait(net, mine, theirs, peer)
        seconds = max(seconds, float(theirs.view(torch.float64)))
        if seconds >= LONG or size >= MOST_BYTES:
            return size / max(seconds - latency, 0.1 * seconds)
        size *= 4


def _wait(net: PointToPoint, going: Tensor, coming: Tensor, peer: int) -> None:
    """Exchanges one message each way."""

    def steps() -> Steps:
        yield net.exchange([(going, peer)], [(coming, peer)], 0)

    drive([steps()])
