"""Comparison of plans on emulated clusters: torch's own all-reduce, ours as chosen, schedules pinned."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def compare(cluster: EmulatedCluster, rounds: int, pinned: bool, timeout: float = 900.0) -> ClusterComparison:
    """Times on a cluster, in turn within each of `rounds` rounds, so that all have the same machine.

    pinned: whether the schedules are run one by one, too. Raises NetworkError.
    """
    with EmulatedNetwork(cluster) as network, World(cluster.num_ranks, network=network) as world:
        return world.run(_compared, cluster.name, rounds, pinned, timeout=timeout)[0]


def _compared(context: Any, name: str, rounds: int, pinned: bool) -> ClusterComparison:
    import torch
    import torch.distributed as dist

    from deepep.collectives import Communicator, PlanTable, ReductionPlan
    from deepep.collectives.choosing import choose

    comm = Communicator(context.group, timeout=120.0)
    table: PlanTable = choose(comm, ("fp8", "fixed32"), 1e9)
    seconds: dict[int, dict[str, float]] = {}
    plans: dict[int, dict[str, str]] = {}
    for size in SIZES:
        tensor = torch.zeros(size // 4)
        chosen, fp8 = (table.entry_for(codec, size).plan for codec in ("fixed32", "fp8"))
        ways: dict[str, Callable[[], object]] = {
            GLOO: lambda tensor=tensor: dist.all_reduce(tensor),  # type: ignore[misc]
            CHOSEN: _reduction(comm, tensor, chosen),
            CHOSEN_FP8: _reduction(comm, tensor, fp8),
        }
        for schedule in PINNED if pinned else ():
            if schedule == "oneshot" and size == SIZES[-1]:
                continue  # R - 1 times the whole
            groups = table.groups if schedule not in ("native", "direct", "oneshot") else ()
            pieces = 4 if schedule in ("hierarchical", "chain") else 1
            if schedule != "hierarchical" or 1 < len(table.groups) < context.num_ranks:
                plan = ReductionPlan(schedule, "fixed32", groups=groups, pieces=pieces)
                ways[schedule] = _reduction(comm, tensor, plan)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                comm.gather([0.0])  # all begin at once
                started = time.perf_counter()
                run()
                slowest = max(row[0] for row in comm.gather([time.perf_counter() - started]))
                times[way].append(slowest)
        seconds[size] = {way: statistics.median(of_way) for way, of_way in times.items()}
        plans[size] = {CHOSEN: _words(chosen), CHOSEN_FP8: _words(fp8)}
    comm.close()
    return ClusterComparison(name, table.groups, seconds, plans)


def _reduction(comm: Any, tensor: Any, plan: Any) -> Callable[[], object]:
    return lambda: comm.all_reduce(tensor, plan)


def _words(plan: Any) -> str:
    return f"{plan.schedule} x{plan.pieces}" if plan.pieces > 1 else str(plan.schedule)
