"""ElasticBuffer on the emulator backend: kernels behind its calls, those that expand and sum included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.elastic_cases import CASES, ElasticCase, round_trip

from deepep.runtime.local_rows import LocalRows
from deepep.sim import World
from deepep.sim.emulator.local_rows import EmulatedRows


def run_case(ctx: Any, case: ElasticCase) -> None:
    from deepep import ElasticBuffer

    many = not case.single_reduction
    with ElasticBuffer(
        ctx.group, num_bytes=2 << 20, allow_multiple_reduction=many, backend="emulator"
    ) as buffer:
        assert buffer.info.operations["dispatch"] == "emulated kernels"
        round_trip(ctx, case, 2, buffer, torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_round_trip(world_of: Callable[[int], World], name: str) -> None:
    world_of(2).run(run_case, CASES[name])


@pytest.mark.parametrize("seed", range(8))
def test_its_kernels_have_the_bits_of_plain_torch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_topk, local = seed % 4 * 3, 1 + seed % 5, 1 + seed % 3
    lanes = torch.randint(-1, local, (num_rows, num_topk), generator=generator)
    x = torch.randn(num_rows, 24, generator=generator).bfloat16()
    made = []
    for rows in (LocalRows(), EmulatedRows()):
        slots, counts = torch.empty_like(lanes), torch.empty(local, dtype=torch.int32)
        rows.sort(lanes, slots, counts)
        slots += slots.clamp(min=0, max=1)  # a gap behind the first
        spread = torch.zeros(lanes.numel() + 2, 24, dtype=torch.bfloat16)
        rows.spread(x, slots, spread)
        spread[0] *= torch.nan
        reduced = torch.empty_like(x)
        rows.reduce(spread, slots, reduced)
        made.append((slots, counts, spread.view(torch.int16), reduced.view(torch.int16)))
    for plain, emulated in zip(*made, strict=True):
        assert torch.equal(plain, emulated)
