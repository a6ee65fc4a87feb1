"""Choice of plans by measurement: probe the links, predict candidates, time the best, keep the fastest."""

from __future__ import annotations

from dataclasses import replace

import torch

from deepep.collectives.communicator import Communicator
from deepep.collectives.plan_table import SIZES, PlanEntry, PlanTable, candidates, settled, shortlist

TRIES = 3
HOPELESS = 1.5
"""Candidates that take so many times the fastest's time at first are not timed again."""


def choose(
    comm: Communicator,
    codecs: tuple[str, ...],
    seconds: float,
    *,
    schedule: str = "auto",
    groups: tuple[tuple[int, ...], ...] | None = None,
    current: PlanTable | None = None,
) -> PlanTable:
    """A plan for each codec and size, the same on all ranks. Collective, on the CPU.

    seconds: that timing may take, by the predictions, small sizes first; beyond it they are believed.
    schedule: the only one to consider, or "auto". groups: in place of those found. current: the plans in use,
    which are changed for a gain alone.
    """
    speeds = comm.probe()
    if groups is not None:
        speeds = replace(speeds, groups=groups, uplink=0.0)
    entries: list[PlanEntry] = []
    spent = 0.0
    for size in SIZES:
        for codec in codecs:
            listed = shortlist(candidates(codec, speeds.groups, schedule), size, speeds)
            if len(listed) == 1 or spent + TRIES * sum(entry.seconds for entry in listed) > seconds:
                entries.append(listed[0])
                continue
            used = None
            if current is not None and any(entry.plan.codec == codec for entry in current.entries):
                used = current.entry_for(codec, size).plan
                if used not in [entry.plan for entry in listed]:
                    listed += shortlist([used], size, speeds)
            times, took = _timed(comm, listed, size)
            spent += took
            entries.append(settled(listed, times, used))
    return PlanTable(speeds.groups, tuple(entries), 0 if current is None else current.version + 1)


def _timed(comm: Communicator, listed: list[PlanEntry], size: int) -> tuple[list[float], float]:
    """Seconds of each candidate, the fastest of several by the slowest rank, and of all of it together."""
    tensor = torch.zeros(size // 4, device="cpu")
    times = [float("inf")] * len(listed)
    spent, left = 0.0, list(range(len(listed)))
    for _ in range(TRIES):
        mine = []
        for number in left:
            pending = comm.all_reduce(tensor, listed[number].plan, mean=True, async_op=True)
            assert not isinstance(pending, torch.Tensor)
            pending.wait()
            mine.append(pending.seconds)
        slowest = [max(of_rank) for of_rank in zip(*comm.gather(mine), strict=True)]
        spent += sum(slowest)
        for number, seconds in zip(left, slowest, strict=True):
            times[number] = min(times[number], seconds)
        left = [number for number in left if times[number] <= HOPELESS * min(times)]
    return times, spent
