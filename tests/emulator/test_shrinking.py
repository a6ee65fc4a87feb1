"""Low-latency kernels that mask a rank which stops: right results without it, and nobody else is masked."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from harness.side_by_side import explore_side_by_side

from deepep.sim.cases.case import Case
from deepep.sim.cases.options import Options
from deepep.sim.emulator.low_latency import LowLatencyGpu
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.low_latency import LowLatencyScenario
from deepep.sim.explore.low_latency_explorer import explore_low_latency
from deepep.sim.explore.scenarios import Stop, ThreadSchedule
from deepep.sim.explore.shrinking import draw_shrinking, run_shrinking

explore = partial(explore_low_latency, with_stops=True, scenarios=draw_shrinking, runner=run_shrinking)


def test_drawn_calls_go_on_without_the_rank_that_stops() -> None:
    tally = explore(runs=60)
    assert tally.failure is None, str(tally.failure)
    assert tally.kinds["masked"] > 0


@pytest.mark.slow
def test_many_drawn_calls_go_on_without_the_rank_that_stops() -> None:
    for tally in explore_side_by_side(explore, first_seed=1000, runs=200):
        assert tally.failure is None, str(tally.failure)
        assert tally.kinds["masked"] > 0


def three_ranks(reduce: str, *, hooked: bool, carries_weights: bool) -> LowLatencyScenario:
    """Three round trips, every token to all three ranks."""
    routing = [np.array([[0, 2, 4], [1, 3, 5]]), np.array([[5, 2, 1]]), np.array([[3, 1, 4], [0, 5, 2]])]
    options = Options(mode="ll", reduce=reduce, combine_rows="same")
    case = Case(6, tuple(routing), hidden=128, options=options).legal()
    return LowLatencyScenario(
        tuple(replace(case, seed=seed) for seed in range(3)),
        gpu=LowLatencyGpu(num_blocks=2, shrinks=True),
        hooked=hooked,
        carries_weights=carries_weights,
        own_stretches=True,
    )


@pytest.mark.parametrize("reduce", ["rank", "token"])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("carries_weights", [False, True])
def test_a_rank_may_stop_at_any_moment(reduce: str, hooked: bool, carries_weights: bool) -> None:
    """Once for good and once for longer than its peers wait: at each of some moments, from the first on."""
    scenario = three_ranks(reduce, hooked=hooked, carries_weights=carries_weights)
    length = run_shrinking(scenario, ThreadSchedule()).steps
    kinds = set()
    for i in range(8):
        stop = Stop(rank=i % 3, at=1 + i * length // 8, pause_seconds=1.5 * (i % 2), loses_writes=i % 4 == 0)
        report = run_shrinking(scenario, draw_schedule(i), stops=(stop,))
        assert not report.failed, f"{stop}: {report.kind}: {report.text}"
        kinds.add(report.kind)
    assert "masked" in kinds


def test_two_ranks_of_three_may_stop() -> None:
    scenario = three_ranks("rank", hooked=False, carries_weights=False)
    report = run_shrinking(scenario, ThreadSchedule(), stops=(Stop(rank=0, at=1), Stop(rank=2, at=4000)))
    assert report.kind == "masked", report.text
