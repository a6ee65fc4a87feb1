"""Planning: the plan of a bucket, by its size and dtype, the options, and the hosts that the ranks are on.

A fixed rule, so that all ranks come to the same without a word. Measured choice is what it will give way to.
"""

from __future__ import annotations

import torch

from deepep.collectives.codecs import FIXED, LOSSY, PLAIN
from deepep.collectives.plan import ReductionPlan
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


def plan_of(
    config: ParallelConfig,
    num_bytes: int,
    dtype: torch.dtype,
    hosts: list[str],
    device_type: str = "cpu",
    compresses: bool = True,
) -> ReductionPlan:
    """The plan of a bucket. hosts: the name of each rank's. compresses: if the options say so."""
    if len(hosts) == 1:
        return ReductionPlan("oneshot", PLAIN)  # nobody to send to, and so nothing to round
    if isinstance(config.topology, ReductionPlan) and (compresses or config.topology.codec not in LOSSY):
        return config.topology
    compression = "fp8" if config.compression == "auto" else str(config.compression)
    is_small = num_bytes < config.min_compressed_bytes
    if compresses and compression in LOSSY and not is_small and dtype != torch.float64:
        codec = compression
    else:
        codec = FIXED if config.reproducible else PLAIN
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
