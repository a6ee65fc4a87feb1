"""Ranks of several speeds, which compute by sleeping: steps by measured shares and by torch's equal ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepep.sim.worlds.rank_process import RankContext

EVERY = 5
"""Steps for which measured weights stay: fewer than by default, so that a run is short."""


class SleepingModel(nn.Module):
    """A model whose forward takes as long as it is told to for each sample, without a processor."""

    def __init__(self, seconds: float, width: int = 64) -> None:
        super().__init__()
        self.seconds = seconds
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds * len(x))
        out: Tensor = self.layer(x)
        return out


@dataclass(frozen=True)
class UnevenSteps:
    """Seconds of every measured step of a rank, by torch's equal shares and by measured ones; the weights in
    the end, and the samples of each rank.
    """

    even: list[float]
    measured: list[float]
    weights: list[float]
    samples: list[int]


def take_steps(
    ctx: RankContext, slowness: Sequence[float], seconds: float, batch: int, steps: int
) -> UnevenSteps:
    """One rank's part: steps of torch's DDP and of this library's in turn, on the same machine.

    slowness: of each rank, in proportion; seconds: of the fastest, for a sample.
    """
    import deepep

    own, width = seconds * slowness[ctx.rank], 64
    sampler = deepep.ElasticSampler(
        1 << 20, batch, ctx.rank, ctx.num_ranks, weights="measured", rebalance_every=EVERY
    )
    ours: Any = deepep.DistributedDataParallel(
        SleepingModel(own),
        process_group=ctx.group,
        sampler=sampler,
        config=deepep.ParallelConfig(timeout=60.0),
    )
    torchs = nn.parallel.DistributedDataParallel(SleepingModel(own), process_group=ctx.group)
    even = torch.zeros(batch // ctx.num_ranks, width)
    times: dict[str, list[float]] = {"even": [], "measured": []}
    for step in range(3 * EVERY + steps):
        started = time.perf_counter()
        for attempt in ours.attempts():
            with attempt:
                ours.zero_grad()
                ours(torch.zeros(len(sampler.indices()), width)).square().mean().backward()
        sampler.commit()
        times["measured"].append(time.perf_counter() - started)
        if step >= 3 * EVERY:
            started = time.perf_counter()
            torchs.zero_grad()
            torchs(even).square().mean().backward()
            times["even"].append(time.perf_counter() - started)
    found = UnevenSteps(
        times["even"],
        times["measured"][-steps:],
        list(sampler.weights),
        [len(share) for share in sampler.shares().values()],
    )
    ours.close()
    return found
