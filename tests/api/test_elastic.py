"""ElasticBuffer against the oracle of expanded layouts, case by case and to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.elastic_cases import CASES, ElasticCase, round_trip

from deepep.sim import World


def elastic_of(ctx: Any, **options: Any) -> Any:
    """This rank's buffer with these options, kept until its world is rebuilt."""
    from deepep import ElasticBuffer

    key = ("elastic", tuple(sorted(options.items())))
    if key not in ctx.scratch:
        how = {"num_bytes": 2 << 20, "num_gpu_timeout_secs": 30, **options}
        ctx.scratch[key] = ElasticBuffer(ctx.group, **how)
    return ctx.scratch[key]


def run_case(ctx: Any, case: ElasticCase, seed: int, backend: str | None) -> None:
    buffer = elastic_of(ctx, allow_multiple_reduction=not case.single_reduction, backend=backend)
    round_trip(ctx, case, seed, buffer, torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_round_trip(world_of: Callable[[int], World], name: str) -> None:
    for seed in (0, 1):
        world_of(2).run(run_case, CASES[name], seed, None)


@pytest.mark.parametrize("name", ["plain", "expanded, zero padding, biases", "expanded, one sum"])
def test_round_trip_of_three_ranks(world_of: Callable[[int], World], name: str) -> None:
    case = replace(CASES[name], tokens=(4, 0, 7), pattern="holes")
    world_of(3).run(run_case, case, 3, None)
