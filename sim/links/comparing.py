"""Comparison of plans on emulated clusters: torch's own all-reduce, ours as chosen, schedules pinned."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepep.collectives.choosing import HOPELESS
from deepep.sim.links.clusters import EmulatedCluster
from deepep.sim.links.emulated import EmulatedNetwork
from deepep.sim.worlds.world import World

SIZES = (4 << 10, 256 << 10, 4 << 20)
GLOO, CHOSEN, CHOSEN_FP8 = "torch's gloo", "chosen", "chosen, fp8"
PINNED = ("native", "direct", "hierarchical", "ring", "chain", "oneshot")


@dataclass(frozen=True)
class ClusterComparison:
    """Median seconds on one cluster.

    seconds: by size, then by name: `GLOO`, `CHOSEN`, `CHOSEN_FP8`, and what of `PINNED` was run. plans: of
    `CHOSEN` and `CHOSEN_FP8` in words, by size. groups: as found.
    """

    cluster: str
    groups: tuple[tuple[int, ...], ...]
    seconds: dict[int, dict[str, float]]
    plans: dict[int, dict[str, str]]


class Measured:
    """Comparisons of a table that is made in pieces, kept in a file, or in memory alone.

    file: None, or where it is. conditions: what all pieces have to share: ranks, rounds, whether schedules
    were pinned. Raises ValueError for a file of others, or of something else.
    """

    def __init__(self, file: Path | None, conditions: dict[str, int]) -> None:
        self._file, self._conditions = file, conditions
        self.clusters: dict[str, ClusterComparison] = {}
        if file is None or not file.exists():
            return
        try:
            stored = json.loads(file.read_text())
            found = stored["conditions"]
            for one in stored["clusters"]:
                by_size = (
                    {int(size): of_size for size, of_size in one[key].items()} for key in ("seconds", "plans")
                )
                groups = tuple(map(tuple, one["groups"]))
                self.clusters[one["cluster"]] = ClusterComparison(one["cluster"], groups, *by_size)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{file}: no file of `dp topologies`: {error}") from None
        if found != conditions:
            raise ValueError(f"{file}: measured with {found}; allowed: {conditions}, or another file")

    def missing(self, name: str, sizes: Sequence[int]) -> tuple[int, ...]:
        """Those of `sizes` that a cluster has no times of."""
        there = self.clusters[name].seconds if name in self.clusters else {}
        return tuple(size for size in sizes if size not in there)

    def add(self, found: ClusterComparison) -> None:
        """Keeps a cluster's times, beside those of its other sizes."""
        before = self.clusters.get(found.cluster)
        if before is not None:
            seconds, plans = {**before.seconds, **found.seconds}, {**before.plans, **found.plans}
            found = ClusterComparison(found.cluster, found.groups, seconds, plans)
        self.clusters[found.cluster] = found
        if self._file is not None:
            made = {"conditions": self._conditions, "clusters": [asdict(c) for c in self.clusters.values()]}
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps(made, indent=1) + "\n")
            part.replace(self._file)


def compare(
    cluster: EmulatedCluster,
    rounds: int,
    pinned: bool,
    sizes: Sequence[int] = SIZES,
    timeout: float = 900.0,
) -> ClusterComparison:
    """Times on a cluster, in turn within each of `rounds` rounds, so that all have the same machine.

    pinned: whether the schedules are run one by one, too. sizes: those to run, in bytes; plans are chosen at
    all sizes in any case. Raises NetworkError.
    """
    with EmulatedNetwork(cluster) as network, World(cluster.num_ranks, network=network) as world:
        return world.run(_compared, cluster.name, rounds, pinned, tuple(sizes), timeout=timeout)[0]


def _compared(
    context: Any, name: str, rounds: int, pinned: bool, sizes: tuple[int, ...]
) -> ClusterComparison:
    import torch
    import torch.distributed as dist

    from deepep.collectives import Communicator, PlanTable, ReductionPlan
    from deepep.collectives.choosing import choose

    comm = Communicator(context.group, timeout=120.0)
    table: PlanTable = choose(comm, ("fp8", "fixed32"), 1e9)
    seconds: dict[int, dict[str, float]] = {}
    plans: dict[int, dict[str, str]] = {}
    for size in sizes:
        tensor = torch.zeros(size // 4)
        chosen, fp8 = (table.entry_for(codec, size).plan for codec in ("fixed32", "fp8"))
        ways: dict[str, Callable[[], object]] = {
            GLOO: lambda tensor=tensor: dist.all_reduce(tensor),  # type: ignore[misc]
            CHOSEN: _reduction(comm, tensor, chosen),
            CHOSEN_FP8: _reduction(comm, tensor, fp8),
        }
        same: list[str] = []  # schedules that were chosen as they would be pinned: no plan is timed twice
        for schedule in PINNED if pinned else ():
            if schedule == "oneshot" and size == SIZES[-1]:
                continue  # R - 1 times the whole
            groups = table.groups if schedule not in ("native", "direct", "oneshot") else ()
            pieces = 4 if schedule in ("hierarchical", "chain") else 1
            if schedule != "hierarchical" or 1 < len(table.groups) < context.num_ranks:
                plan = ReductionPlan(schedule, "fixed32", groups=groups, pieces=pieces)
                if plan == chosen:
                    same.append(schedule)
                else:
                    ways[schedule] = _reduction(comm, tensor, plan)
        seconds[size] = medians(ways, rounds, partial(_slowest, comm))
        seconds[size].update((schedule, seconds[size][CHOSEN]) for schedule in same)
        plans[size] = {CHOSEN: _words(chosen), CHOSEN_FP8: _words(fp8)}
    comm.close()
    return ClusterComparison(name, table.groups, seconds, plans)


def medians(
    ways: Mapping[str, Callable[[], object]], rounds: int, timed: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    """The median of each way's seconds over `rounds` rounds, all in turn in each; of a schedule of `PINNED`
    that takes `HOPELESS` times the fastest way in sums of all bits, those until it has: it runs no more.

    timed: runs a way; its seconds, the same on all ranks.
    """
    times: dict[str, list[float]] = {way: [] for way in ways}
    left = list(ways)
    for _ in range(rounds):
        for way in left:
            times[way].append(timed(ways[way]))
        fastest = min(min(of_way) for way, of_way in times.items() if way != CHOSEN_FP8)
        left = [way for way in left if way not in PINNED or min(times[way]) <= HOPELESS * fastest]
    return {way: statistics.median(of_way) for way, of_way in times.items()}


def _slowest(comm: Any, run: Callable[[], object]) -> float:
    comm.gather([0.0])  # all begin at once
    started = time.perf_counter()
    run()
    return float(max(row[0] for row in comm.gather([time.perf_counter() - started])))


def _reduction(comm: Any, tensor: Any, plan: Any) -> Callable[[], object]:
    return lambda: comm.all_reduce(tensor, plan)


def _words(plan: Any) -> str:
    return f"{plan.schedule} x{plan.pieces}" if plan.pieces > 1 else str(plan.schedule)
