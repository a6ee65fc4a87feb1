"""Attempts on CUDA: a rank that dies in a step over NCCL, and the weights that the others should have."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import pytest
import torch

import deepep
from deepep.parallel.config import ParallelConfig
from deepep.reference.all_reduce import all_reduce
from deepep.sim import Status, World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]

STEPS, VICTIM, DEADLY, SIZE = 5, 1, 2, 70_016  # of whole blocks, so units are those of any bucket


class Scaled(torch.nn.Module):
    """Two parameters whose gradients are the inputs, whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(SIZE))
        self.second = torch.nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first * x).sum() + (self.second * x.flip(0)).sum()


def batch_of(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(SIZE, generator=generator)


def expected(num_ranks: int) -> torch.Tensor:
    """Weights by the oracle: over all ranks before the deadly step, over the survivors from it on."""
    first, second = torch.zeros(SIZE), torch.zeros(SIZE)
    for step in range(STEPS):
        members = [r for r in range(num_ranks) if step < DEADLY or r != VICTIM]
        inputs = [batch_of(rank, step) for rank in members]
        first -= 0.5 * all_reduce(inputs, "direct", "fixed32", mean=True)
        second -= 0.5 * all_reduce([x.flip(0) for x in inputs], "direct", "fixed32", mean=True)
    return torch.cat([first, second])


def trained(context: Any, phase: str, keep: str, topology: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    device = torch.device("cuda", torch.cuda.current_device())
    config = ParallelConfig(topology=topology, timeout=30.0)
    model = deepep.DistributedDataParallel(
        Scaled().to(device), device_ids=[device.index], process_group=context.group, config=config
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.5)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for step in range(STEPS):
        dies = context.rank == VICTIM and step == DEADLY
        if dies and phase == "sum":  # all others wait in it, on their devices
            comm: Any = model._reducer_of_ours().comm
            comm._reduce = lambda *given: die()
        for attempt in model.attempts(keep=keep, min_members=1):
            with attempt:
                optimizer.zero_grad()
                loss = model(batch_of(context.rank, step).to(device))
                if dies and phase == "forward":
                    die()
                loss.backward()
                optimizer.step()
    weights = torch.cat([p.detach().cpu() for p in model.parameters()])
    members = model.members
    with contextlib.suppress(deepep.errors.DeepEPError):
        model.close()
    return weights, members


@pytest.mark.parametrize(
    ("phase", "keep", "topology"),
    [
        ("forward", "buckets", "native"),
        ("sum", "buckets", "native"),
        ("sum", "recompute", "direct"),
        ("forward", "buckets", "nvlink"),
    ],
)
def test_survivors_on_gpus_have_the_oracles_weights(phase: str, keep: str, topology: str) -> None:
    with World(3, backend="nccl", timeout=240.0) as world:
        outcomes = world.try_run(trained, phase, keep, topology)
    assert outcomes[VICTIM].status is Status.DIED
    for outcome in outcomes:
        if outcome.rank != VICTIM:
            assert outcome.status is Status.RETURNED, outcome.describe()
            weights, members = outcome.value
            assert members == (0, 2)
            assert torch.equal(weights, expected(3))
