"""Planning: the plan of a bucket, by its size, dtype and codec, the options, and what was measured.

Where nothing was measured (one rank, `probe_seconds=0`) a fixed rule has the ranks come to the same
without a word: by size, and the hosts that they are on.
"""

from __future__ import annotations

import torch

from deepep.collectives import Communicator
from deepep.collectives.choosing import choose
from deepep.collectives.choosing_on_devices import choose_on_device
from deepep.collectives.codecs import FIXED, LOSSY, PLAIN
from deepep.collectives.plan import ReductionPlan
from deepep.collectives.plan_table import PlanTable, codecs_of
from deepep.parallel.config import ParallelConfig

FEW_BYTES = 32 << 10
"""Up to here a round costs more than its bytes: everybody sends everybody the whole."""
MANY_BYTES = 1 << 20
"""From here on several pieces are under way at a time."""


def groups_of(config: ParallelConfig, hosts: list[str]) -> tuple[tuple[int, ...], ...]:
    """The ranks by group: as the options say, else by host, in the order of their first ranks."""
    if not isinstance(config.groups, str):
        return config.groups
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    return tuple(map(tuple, by_host.values()))


def table_of(
    comm: Communicator, config: ParallelConfig, compresses: bool = True, current: PlanTable | None = None
) -> PlanTable | None:
    """The plans to use: pinned ones, or measured between the ranks; None where the fixed rule holds.

    Collective, if it measures. compresses: if the options say so. current: plans in use.
    """
    topology = config.topology
    if isinstance(topology, PlanTable):
        return topology
    measures = topology == "auto" or (topology in _BY_GROUPS and config.groups == "auto")
    if not measures or not config.probe_seconds or comm.num_ranks == 1:
        return None
    codecs = codecs_of(str(config.compression) if compresses else "off", config.reproducible)
    if comm.device.type != "cpu":
        if topology != "auto":
            return None
        return choose_on_device(
            comm, codecs, config.probe_seconds, groups_of(config, comm.hosts), current=current
        )
    return choose(
        comm,
        codecs,
        config.probe_seconds,
        schedule=str(topology),
        groups=None if isinstance(config.groups, str) else config.groups,
        current=current,
    )


_BY_GROUPS = ("hierarchical", "ring", "chain", "tree")
"""Schedules that go by which ranks are near each other."""


def plan_of(
    config: ParallelConfig,
    num_bytes: int,
    dtype: torch.dtype,
    hosts: list[str],
    device_type: str = "cpu",
    compresses: bool = True,
    *,
    table: PlanTable | None = None,
    chosen: str = "fp8",
) -> ReductionPlan:
    """The plan of a bucket. hosts: the name of each rank's. compresses: if the options say so. table: plans
    that were measured or pinned. chosen: the codec where compression is "auto".
    """
    if len(hosts) == 1:
        return ReductionPlan("oneshot", PLAIN)  # nobody to send to, and so nothing to round
    if isinstance(config.topology, ReductionPlan) and (compresses or config.topology.codec not in LOSSY):
        return config.topology
    compression = chosen if config.compression == "auto" else str(config.compression)
    is_small = num_bytes < config.min_compressed_bytes
    if compresses and compression in LOSSY and not is_small and dtype != torch.float64:
        codec = compression
    else:
        codec = FIXED if config.reproducible else PLAIN
    if table is not None:
        return table.entry_for(codec, num_bytes * 4 // dtype.itemsize).plan
    groups = groups_of(config, hosts)
    schedule = config.topology if isinstance(config.topology, str) else "auto"
    if schedule == "auto":
        if num_bytes <= FEW_BYTES:
            schedule = "oneshot"
        elif 1 < len(groups) < len(hosts):
            schedule = "hierarchical"
        else:
            schedule = "native" if device_type == "cuda" and codec not in LOSSY else "direct"
    inner = "bf16" if schedule == "hierarchical" and codec == "fp8" else ""
    pieces = 4 if schedule in ("hierarchical", "chain") and num_bytes >= MANY_BYTES else 1
    return ReductionPlan(schedule, codec, inner, groups, pieces)
