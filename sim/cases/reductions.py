"""Drawn all-reduces: a plan, and every rank's tensor, as functions of a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepep.collectives.codecs import FIXED, LOSSY, PLAIN
from deepep.collectives.communicator import DTYPES
from deepep.collectives.plan import ONE_ROUNDING, SCHEDULES, ReductionPlan
from deepep.sim.cases.gradients import draw_gradient


@dataclass(frozen=True)
class ReductionCase:
    """One all-reduce of `num_ranks` tensors of `count` elements. dice: see Communicator.all_reduce."""

    seed: int
    num_ranks: int
    count: int
    dtype: torch.dtype
    plan: ReductionPlan
    mean: bool
    dice: tuple[int, int, int] | None

    def inputs(self) -> list[Tensor]:
        """Every rank's tensor."""
        rng = np.random.default_rng([self.seed, self.num_ranks, 1])
        return [draw_gradient(rng, self.count).to(self.dtype) for _ in range(self.num_ranks)]


def draw_reduction(seed: int, num_ranks: int) -> ReductionCase:
    """A case in which every option is as likely as the others of its kind; what is undefined is left out."""
    rng = np.random.default_rng([seed, num_ranks, 0])
    dtype = DTYPES[int(rng.integers(len(DTYPES)))]
    schedule = SCHEDULES[int(rng.integers(len(SCHEDULES) - 1))]  # but for nvlink, which has direct's bits
    schedule = "nvlink" if schedule == "direct" and seed % 2 else schedule
    codecs = [PLAIN, FIXED, *(LOSSY if schedule in ONE_ROUNDING else ())]
    codec = codecs[int(rng.integers(len(codecs)))]
    if schedule == "native" and num_ranks > 2:  # of other sums the order is the transport's own
        codec, dtype = FIXED, torch.float32 if dtype == torch.float64 else dtype
    inner = ""
    if codec in LOSSY and rng.random() < 0.5:
        inner = (PLAIN, *LOSSY)[int(rng.integers(4))]
    groups, left = [], rng.permutation(num_ranks).tolist()
    while left:
        size = int(rng.integers(1, len(left) + 1))
        groups.append(tuple(left[:size]))
        left = left[size:]
    return ReductionCase(
        seed=seed,
        num_ranks=num_ranks,
        count=int(rng.choice([rng.integers(0, 5), rng.integers(0, 2000), rng.integers(0, 20000)])),
        dtype=dtype,
        plan=ReductionPlan(
            schedule, codec, inner, tuple(groups) if rng.random() < 0.7 else (), int(rng.integers(1, 5))
        ),
        mean=bool(rng.random() < 0.5),
        dice=(int(rng.integers(100)), seed, 3) if rng.random() < 0.5 else None,
    )
