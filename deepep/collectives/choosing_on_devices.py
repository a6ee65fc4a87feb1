"""Choice of plans on CUDA, by timing alone: nothing probes NVLink, or what NCCL makes of a network.

Candidates are few: the transport's own, this library's kernels over mapped memory where all ranks are on
one host, and direct exchanges, between hosts by groups as well. Each is timed in place at sizes of buckets,
on the device as the host sees it, and the fastest by the slowest rank is kept, as on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from deepep.collectives.choosing import HOPELESS, TRIES
from deepep.collectives.codecs import LOSSY
from deepep.collectives.communicator import Communicator
from deepep.collectives.plan import ReductionPlan
from deepep.collectives.plan_table import PlanEntry, PlanTable, settled

DEVICE_SIZES = (64 << 10, 1 << 20, 16 << 20, 64 << 20)
"""Bytes of float32 at which plans are compared on a device."""

Timed = Callable[[Communicator, ReductionPlan, int], float]
"""Runs a plan on so many bytes; this rank's seconds."""


def choose_on_device(
    comm: Communicator,
    codecs: tuple[str, ...],
    seconds: float,
    groups: tuple[tuple[int, ...], ...],
    current: PlanTable | None = None,
    timed: Timed | None = None,
) -> PlanTable:
    """A plan for each codec and size, the same on all ranks. Collective.

    seconds: that timing may take, small sizes first; sizes beyond it go by the last one's choice. groups: the
    ranks by host. current: the plans in use, which are changed for a gain alone. timed: another clock.
    """
    run = timed or timed_on_device
    entries: list[PlanEntry] = []
    spent, last = 0.0, {codec: PlanEntry(0, rule(codec, groups), 0.0) for codec in codecs}
    for size in DEVICE_SIZES:
        for codec in codecs:
            before = last[codec]
            if spent > seconds:
                grown = before.seconds * size / before.size if before.size else 0.0
                entries.append(PlanEntry(size, before.plan, grown))
                continue
            listed = [PlanEntry(size, plan, 0.0) for plan in candidates_on_device(codec, groups, size)]
            used = None
            if current is not None and any(entry.plan.codec == codec for entry in current.entries):
                used = current.entry_for(codec, size).plan
                if used not in [entry.plan for entry in listed]:
                    listed.append(PlanEntry(size, used, 0.0))
            times, took = _fastest(comm, [entry.plan for entry in listed], size, run)
            spent += took
            last[codec] = settled(listed, times, used)
            entries.append(last[codec])
    return PlanTable(groups, tuple(entries), 0 if current is None else current.version + 1)


def rule(codec: str, groups: tuple[tuple[int, ...], ...]) -> ReductionPlan:
    """The plan where nothing is measured: NCCL's own, for what it can sum."""
    if codec not in LOSSY:
        return ReductionPlan("native", codec)
    listed = candidates_on_device(codec, groups, DEVICE_SIZES[-1])
    return next((plan for plan in listed if plan.schedule == "hierarchical"), listed[0])


def candidates_on_device(
    codec: str, groups: tuple[tuple[int, ...], ...], num_bytes: int
) -> list[ReductionPlan]:
    """Plans that are worth timing. groups: the ranks by host."""
    plans = [ReductionPlan("direct", codec)]
    if num_bytes <= DEVICE_SIZES[0]:
        plans.append(ReductionPlan("oneshot", codec))
    if codec not in LOSSY:
        plans.append(ReductionPlan("native", codec))
    if len(groups) == 1:
        plans.append(ReductionPlan("nvlink", codec))
    elif max(map(len, groups)) > 1:
        inner = "bf16" if codec == "fp8" else ""
        plans.append(ReductionPlan("hierarchical", codec, inner, groups, 4 if num_bytes >= 1 << 20 else 1))
    return plans


def _fastest(
    comm: Communicator, plans: list[ReductionPlan], size: int, run: Timed
) -> tuple[list[float], float]:
    """Seconds of each plan, the fastest of several by the slowest rank, and of all of it together."""
    times, spent = [float("inf")] * len(plans), 0.0
    left = list(range(len(plans)))
    for attempt in range(TRIES + 1):
        mine = [run(comm, plans[number], size) for number in left]
        slowest = [max(of_rank) for of_rank in zip(*comm.gather(mine), strict=True)]
        if not attempt:
            continue  # connections were made, and memory mapped
        spent += sum(slowest)
        for number, seconds in zip(left, slowest, strict=True):
            times[number] = min(times[number], seconds)
        left = [number for number in left if times[number] <= HOPELESS * min(times)]
    return times, spent


def timed_on_device(comm: Communicator, plan: ReductionPlan, size: int) -> float:
    """Seconds of a sum, from when the device had nothing to do until it has the result."""
    tensor = torch.zeros(size // 4, device=comm.device)
    if tensor.is_cuda:
        torch.cuda.synchronize(comm.device)
    started = time.perf_counter()
    comm.all_reduce(tensor, plan, mean=True)
    if tensor.is_cuda:
        torch.cuda.synchronize(comm.device)
    return time.perf_counter() - started
