"""The GPUs' steadiness runs, without GPUs: the same runs on the reference and on the kernels' source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from harness.steadiness import OPTION_SETS, Late, check_own, long_run, option_case, run_steadily

from deepep.sim import World, WorldError
from deepep.sim.cases.case import Case, Limits
from deepep.sim.cases.options import SPACE
from deepep.sim.fuzz.buffer_runs import run_on_buffer

SHAPE = {"hidden": 144, "topk": 3, "local_experts": 4}
TOKENS = (17, 9, 0, 30)


def cases(num_ranks: int) -> list[Case]:
    return [option_case(name, TOKENS[:num_ranks], **SHAPE) for name in OPTION_SETS]


def test_every_option_is_among_the_sets() -> None:
    concerned = {"values", "payload", "scale_layout", "scale_columns", "idx_dtype", "topk", "cached", "worst"}
    concerned |= {"biases", "combine_rows", "combine_weights"}
    for name in concerned:
        tried = {getattr(case.options, name) for case in cases(2)}
        assert tried == set(SPACE[name]), name


@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_options_and_late_ranks(world_of: Callable[[int], World], backend: str) -> None:
    world = world_of(2)
    world.run(run_steadily, cases(2), num_sms=(1, 24), backend=backend)
    late = [None, *(Late(rank, host=True) for rank in range(2))]
    few = [option_case("two biases, cached, asynchronous", TOKENS[:2], **SHAPE)]
    world.run(run_steadily, few, late=late, backend=backend)


@pytest.mark.parametrize(("backend", "operations"), [("reference", 300), ("emulator", 60)])
def test_a_long_run_says_what_it_did(world_of: Callable[[int], World], backend: str, operations: int) -> None:
    limits = Limits(ranks=(2,), masks=0.0, fixed={"mode": "ht", "skew": "none"})
    runs = [world_of(2).run(long_run, 5, operations, backend=backend, limits=limits) for _ in range(2)]
    assert runs[0] == runs[1]
    assert operations <= runs[0][0].operations < operations + 4
    other = world_of(2).run(long_run, 6, operations, backend=backend, limits=limits)
    assert other[0].digest != runs[0][0].digest


def one_bit_off(ctx: Any, case: Case) -> None:
    """A run whose second cached row comes out with a bit turned."""
    from deepep.sim.fuzz.buffer_runs import buffer_of

    view = run_on_buffer(case, buffer_of(ctx, "reference"))
    assert view.again_x is not None
    view.again_x[1, 0] ^= 1
    check_own(case, ctx.rank, view, "now")


def test_a_wrong_bit_is_noticed(world_of: Callable[[int], World]) -> None:
    case = option_case("bf16, random values, cached", TOKENS[:2], **SHAPE)
    with pytest.raises(WorldError, match=r"again_x\[1, 0\]"):
        world_of(2).run(one_bit_off, case)
