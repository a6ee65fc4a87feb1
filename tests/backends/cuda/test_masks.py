"""Ranks that the others leave out and take in again, between processes: every time all build anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from deepep.sim import World

pytestmark = pytest.mark.gpu

RANKS = 3
SYMMETRIC_BYTES = 64 << 20
SEED = int(os.environ.get("DEEPEP_TEST_SEED", "5"))


@pytest.fixture(scope="module")
def three() -> Iterator[World]:
    with World(RANKS, backend="nccl", timeout=180) as world:
        yield world


def come_and_go(ctx: Any, seed: int, count: int, mask_at: str) -> int:
    """Drawn cases, most of which leave ranks out: between calls, or between a dispatch and its combine. Every
    result against the oracle. How many did.
    """
    from harness.steadiness import check_own

    from deepep.sim.cases.case import Limits, draw_case
    from deepep.sim.cases.choices import RandomChoices
    from deepep.sim.fuzz.buffer_runs import as_buffer_call, run_buffer

    os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(SYMMETRIC_BYTES)
    fixed = {"mode": "ht", "skew": "none", "mask_at": mask_at}
    limits = Limits(ranks=(ctx.num_ranks,), max_tokens=48, masks=0.7, fixed=fixed)
    choices = RandomChoices(seed)
    masked = 0
    for number in range(count):
        case = as_buffer_call(draw_case(choices, limits))
        masked += bool(case.masked)
        view = run_buffer(ctx, case, "cuda")
        check_own(case, ctx.rank, view, f"seed {seed}, case {number}")
    return masked


@pytest.mark.parametrize("mask_at", ["dispatch", "combine"])
def test_masked_ranks_are_left_out_and_taken_in_again(three: World, mask_at: str) -> None:
    print(f"seed {SEED} (DEEPEP_TEST_SEED)")
    told = three.run(come_and_go, SEED, 20, mask_at)
    assert len(set(told)) == 1
    assert told[0] >= 10
