"""The judge: from all ranks' measurements to a slow rank, link or process, or to nobody.

A function of numbers alone. What it says does not depend on the ranks' order nor on the unit of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

SLOW = 3.0  # times as slow as the others
LEAST_LATE = 0.25  # of a round's work, that a rank comes late by, or a message takes longer than others
LEAST_SHARE = 0.4  # of the share of a core that the others get

Kind = Literal["process", "rank", "port", "link"]

CHECKS: dict[Kind, str] = {
    "process": "what else runs on its cores: CPU limits (cgroup cpu.max), pinning, swapping, a debugger",
    "rank": "its clocks and temperature (nvidia-smi -q -d PERFORMANCE,CLOCK), ECC errors, its tokens",
    "port": "its NIC or NVLinks: rates, errors (ibstat, perfquery, nvidia-smi nvlink -e), cables, PCIe width",
    "link": "the way between the two: switch ports, routing (NCCL_DEBUG=INFO), nvidia-smi topo -m",
}


@dataclass(frozen=True)
class Evidence:
    """Measurements of all R ranks, in one unit of time.

    late: [R][R], row i how long rank i waited for each to finish the same work, the median of all rounds.
    links: [R][R], row i how long a message took from each rank, the least of all tries; 0 on the diagonal.
    share: [R], the most of a core that each rank's process got while it asked for a whole one.
    work: how long a round's work takes. hosts: [R], which ranks share a host.
    """

    late: Sequence[Sequence[float]]
    links: Sequence[Sequence[float]]
    share: Sequence[float]
    work: float
    hosts: Sequence[int]

    @property
    def num_ranks(self) -> int:
        return len(self.share)


@dataclass(frozen=True)
class Suspect:
    """Somebody slow: a rank, or of a link (from, to). times: as slow as the others."""

    kind: Kind
    ranks: tuple[int, ...]
    times: float

    def __str__(self) -> str:
        if self.kind == "link":
            who = f"the link from rank {self.ranks[0]} to rank {self.ranks[1]}"
        elif self.kind == "port":
            who = f"all links of rank {self.ranks[0]}, one way or both,"
        else:
            who = f"{'the process of rank' if self.kind == 'process' else 'rank'} {self.ranks[0]}"
        return f"{who} {'are' if self.kind == 'port' else 'is'} {self.times:.3g} times as slow as the others"


def judge(evidence: Evidence) -> list[Suspect]:
    """Everybody who stands out, causes before what they explain: a process that does not get its core is not
    named as a rank as well, nor are its links; a rank all of whose links are slow is named once.
    """
    processes = _processes(evidence)
    known = {suspect.ranks[0] for suspect in processes}
    ranks = [suspect for suspect in _ranks(evidence) if suspect.ranks[0] not in known]
    slow = {pair: times for pair, times in _slow_links(evidence).items() if not known & set(pair)}
    ports = _ports(evidence, slow)
    explained = {suspect.ranks[0] for suspect in ports}
    links = [Suspect("link", pair, times) for pair, times in slow.items() if not explained & set(pair)]
    return [*processes, *ranks, *ports, *links]


def _processes(evidence: Evidence) -> list[Suspect]:
    """Those that get much less of a core than half of all do."""
    usual = sorted(evidence.share)[evidence.num_ranks // 2]
    return [
        Suspect("process", (rank,), usual / share if share else float("inf"))
        for rank, share in enumerate(evidence.share)
        if share < LEAST_SHARE * usual
    ]


def _ranks(evidence: Evidence) -> list[Suspect]:
    """Those that most others wait for."""
    size = evidence.num_ranks
    if size < 2:
        return []
    late = [_at([evidence.late[i][rank] for i in range(size) if i != rank], 2) for rank in range(size)]
    least = max(SLOW * _at(late, 2), LEAST_LATE * evidence.work)
    return [
        Suspect("rank", (rank,), (evidence.work + late[rank]) / evidence.work)
        for rank in range(size)
        if late[rank] > least > 0
    ]


def _slow_links(evidence: Evidence) -> dict[tuple[int, int], float]:
    """(from, to) -> times as slow as the faster ones of its kind: inside a host, or between hosts."""
    size, found = evidence.num_ranks, {}
    pairs = [(i, k) for i in range(size) for k in range(size) if i != k]
    for inside in (True, False):
        kind = [(i, k) for i, k in pairs if (evidence.hosts[i] == evidence.hosts[k]) is inside]
        if not kind:
            continue
        usual = _at([evidence.links[i][k] for i, k in kind], 1)
        for i, k in kind:
            if evidence.links[i][k] > max(SLOW * usual, usual + LEAST_LATE * evidence.work):
                found[k, i] = evidence.links[i][k] / usual if usual else float("inf")
    return found


def _ports(evidence: Evidence, slow: dict[tuple[int, int], float]) -> list[Suspect]:
    """Ranks of which every link is slow, out or in, where there are two or more."""
    found = []
    for rank in range(evidence.num_ranks):
        others = [other for other in range(evidence.num_ranks) if other != rank]
        out, into = [(rank, other) for other in others], [(other, rank) for other in others]
        for ways in (out, into):
            if len(ways) > 1 and all(way in slow for way in ways):
                found.append(Suspect("port", (rank,), min(slow[way] for way in ways)))
                break
    return found


def _at(values: Iterable[float], quarter: int) -> float:
    """The value a so many quarters of all lie at or below, the lower one of two."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) * quarter // 4]
