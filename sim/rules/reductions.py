"""The rule for all-reduces: every rank has the bits that the oracle says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepep.collectives.codecs import LOSSY, PLAIN
from deepep.collectives.communicator import Communicator
from deepep.collectives.plan import ReductionPlan
from deepep.reference.all_reduce import all_reduce
from deepep.sim.cases.reductions import ReductionCase, draw_reduction

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def expected(case: ReductionCase) -> Tensor:
    """The oracle's result of a case."""
    plan = case.plan
    return all_reduce(
        case.inputs(),
        plan.schedule,
        plan.codec,
        inner=plan.inner or None,
        groups=plan.groups or None,
        mean=case.mean,
        dice=case.dice,
        pieces=plan.pieces,
    )


def same_numbers(got: Tensor, want: Tensor) -> bool:
    """Equal bits, signed zeros told apart; a NaN is any other's equal, for its bits are the processor's."""
    nan = want.isnan()
    if got.dtype != want.dtype or not torch.equal(got.isnan(), nan):
        return False
    return torch.equal(got[~nan].view(_BITS[got.itemsize]), want[~nan].view(_BITS[got.itemsize]))


def failing_reductions(context: Any, seeds: Iterable[int], device: str = "cpu") -> list[str]:
    """Runs drawn cases on a rank of a world; those that fail there, in words. Collective.

    device: "cpu", or "cuda" for the rank's current one.
    """
    failed = []
    with Communicator(context.group, device=device, timeout=60.0) as comm:
        for seed in seeds:
            case = draw_reduction(seed, context.num_ranks)
            tensor = case.inputs()[context.rank].to(device)
            comm.all_reduce(tensor, case.plan, mean=case.mean, dice=case.dice)
            if not same_numbers(tensor.cpu(), expected(case)):
                failed.append(f"rank {context.rank}: {case}")
    return failed


def differing_plans(comm: Communicator, plans: Sequence[ReductionPlan]) -> list[str]:
    """Runs plans `for_ranks`, each on 100,003 elements of many scales; those whose mean is not the oracle's
    on this rank, in words. Collective.
    """
    differing, inputs = [], [_of_many_scales(rank) for rank in range(comm.num_ranks)]
    for number, plan in enumerate(plans):
        dice = (7, number, 0) if plan.codec in LOSSY else None
        got = inputs[comm.rank].to(comm.device, copy=True)
        comm.all_reduce(got, plan, mean=True, dice=dice)
        if plan.schedule == "native" and plan.codec == PLAIN and comm.num_ranks > 2:
            continue  # in the transport's own order
        want = all_reduce(
            inputs,
            plan.schedule,
            plan.codec,
            inner=plan.inner or None,
            groups=plan.groups,
            mean=True,
            dice=dice,
            pieces=plan.pieces,
        )
        if not same_numbers(got.cpu(), want):
            differing.append(f"rank {comm.rank}: {plan}")
    return differing


def _of_many_scales(rank: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(1 + rank)
    values = torch.randn(100_003, generator=generator, device="cpu")
    return values * 10.0 ** torch.randint(-6, 3, values.shape, generator=generator, device="cpu")
