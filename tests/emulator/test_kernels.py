"""The product's kernels on the emulated machine: the oracle's bits, under every schedule tried."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.side_by_side import explore_side_by_side
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepep.sim.cases.case import Case
from deepep.sim.cases.options import Options
from deepep.sim.cases.strategies import cases
from deepep.sim.emulator.calls import Gpu
from deepep.sim.emulator.shapes import GPUS, STRATEGIES
from deepep.sim.explore.emulated import run
from deepep.sim.explore.explorer import (
    LIMITS,
    draw_scenario,
    draw_schedule,
    draw_tall_scenario,
    explore,
)
from deepep.sim.explore.failures import Failure
from deepep.sim.explore.scenarios import RunReport, Scenario, Stop, ThreadSchedule


def even_case(ranks: int, tokens: int, topk: int, hidden: int = 128) -> Case:
    """Every rank sends `tokens` tokens to `topk` distinct experts, two experts a rank."""
    rng = np.random.default_rng(0)
    indices = tuple(
        np.array([rng.permutation(2 * ranks)[:topk] for _ in range(tokens)], np.int64).reshape(tokens, topk)
        for _ in range(ranks)
    )
    return Case(num_experts=2 * ranks, topk_idx=indices, hidden=hidden, options=Options()).legal()


def explore_all(**options: Any) -> Counter[str]:
    """Explores on all cores; how often each outcome was seen. None may be a failure."""
    kinds: Counter[str] = Counter()
    for tally in explore_side_by_side(explore, **options):
        failure = tally.failure
        assert failure is None, (
            f"{failure.schedule} {failure.stops}\n{failure.scenario}\n{failure.report.text}"
        )
        kinds += tally.kinds
    return kinds


@pytest.mark.slow
def test_drawn_scenarios_agree_with_the_oracle() -> None:
    assert explore_all(runs=1000, schedules_per_scenario=4).total() == 1000


@pytest.mark.slow
def test_more_tokens_than_threads_agree_with_the_oracle() -> None:
    explore_all(runs=300, schedules_per_scenario=2, scenarios=draw_tall_scenario)


@pytest.mark.slow
def test_a_rank_that_stops_ends_in_fault_records_or_not_at_all() -> None:
    assert explore_all(runs=1000, schedules_per_scenario=4, with_stops=True)["fault"] > 130


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=cases(replace(LIMITS, masks=False)),
    seed=st.integers(0, 2**32),
    strategy=st.sampled_from(STRATEGIES),
    gpu=st.sampled_from(GPUS),
)
def test_shapes_and_schedules_by_hypothesis(case: Case, seed: int, strategy: str, gpu: Gpu) -> None:
    report = run(Scenario((case,), gpu), ThreadSchedule(strategy, seed))
    assert report.kind == "ok", report.text


@pytest.mark.parametrize("rows", [90, 120, 300, 530])
@pytest.mark.parametrize("gpu", [GPUS[2], GPUS[3], GPUS[-1]], ids=["mixed", "apart", "may mix"])
def test_rows_return_in_as_many_parts_as_they_are_few(rows: int, gpu: Gpu) -> None:
    """In four, three, two and one: kernels/combine/call.hpp decides by the most rows between two ranks."""
    scenario = Scenario((even_case(ranks=2, tokens=rows, topk=4, hidden=136),), gpu)
    for seed in range(3):
        report = run(scenario, draw_schedule(seed))
        assert report.kind == "ok", report.text


@pytest.mark.parametrize("expands", ["rows", "weighted"])
def test_expanded_rows_are_summed_while_they_are_read(expands: str) -> None:
    """Whole rows and parts of them; two to eight entries a row, some of none."""
    for seed, (tokens, gpu) in enumerate(((3, GPUS[0]), (90, GPUS[2]), (12, GPUS[4]), (5, GPUS[6]))):
        case = even_case(ranks=2, tokens=tokens, topk=4 - seed % 2, hidden=136)
        case = case.with_options(combine_weights=True, biases=seed % 3, payload="bf16")
        report = run(Scenario((case,), gpu, expands=expands), draw_schedule(seed))
        assert report.kind == "ok", report.text


@pytest.mark.parametrize("alone_tokens", [0, 64], ids=["together", "alone"])
@pytest.mark.parametrize("gpu", [GPUS[1], GPUS[3], GPUS[5]], ids=["one block", "three", "three on one SM"])
def test_where_tokens_go_is_found_out_inside(gpu: Gpu, alone_tokens: int) -> None:
    """Around the ends of stretches, of groups of them, and of what each block counts for itself."""
    for seed, tokens in enumerate((0, 1, 31, 32, 33, 64, 65, 200)):
        case = even_case(ranks=2, tokens=tokens, topk=3, hidden=16)
        scenario = Scenario((case,), replace(gpu, alone_tokens=alone_tokens), use_layout="inside")
        report = run(scenario, draw_schedule(seed))
        assert report.kind == "ok", report.text


def test_a_dozen_schedules_of_a_larger_case() -> None:
    """Dispatch and combine of 4 ranks x 2 blocks x 128 threads with 24 tokens each."""
    scenario = Scenario((even_case(ranks=4, tokens=24, topk=4),), Gpu(num_blocks=2, num_threads=128))
    assert scenario.expected
    for seed in range(12):
        assert run(scenario, draw_schedule(seed)).kind == "ok"


def test_a_run_is_a_function_of_its_schedule() -> None:
    scenario = draw_scenario(3)
    for seed in range(3):
        assert run(scenario, draw_schedule(seed)) == run(scenario, draw_schedule(seed))
    assert len({run(scenario, draw_schedule(3 * seed)).steps for seed in range(8)}) > 1


def test_survivors_give_up_at_their_deadline() -> None:
    """Whichever write is a rank's last: the others end, having waited for it, within a few deadlines."""
    scenario = Scenario((even_case(ranks=3, tokens=4, topk=2),), Gpu(timeout=0.5))
    ended = set()
    for at in range(1, 120, 7):
        stop = Stop(rank=1, at=at, counts_writes=True)
        report = run(scenario, ThreadSchedule("random", at), stops=(stop,))
        assert report.kind in ("ok", "fault"), report.text
        assert report.now < 2.0
        if report.kind == "fault":
            assert set(report.faults) <= {0, 2}
            assert all(1 in fault.waited_on for fault in report.faults.values())
        ended.add(report.kind)
    assert "fault" in ended


def test_a_failure_is_saved_and_replayed(tmp_path: Path) -> None:
    scenario, schedule = draw_scenario(5), draw_schedule(11)
    stops = (Stop(0, 9, counts_writes=True),)
    report = run(scenario, schedule, stops=stops)
    failure = Failure(scenario, schedule, stops, report)
    failure.save(tmp_path / "failure.json")
    assert Failure.load(tmp_path / "failure.json").replay() == report
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="failing-schedule"):
        Failure.load(tmp_path / "other.json")


def test_a_schedule_reads_what_it_writes() -> None:
    schedule = ThreadSchedule("pct", 17, 999)
    assert ThreadSchedule.parse(str(schedule)) == schedule
    with pytest.raises(ValueError, match="strategy"):
        ThreadSchedule.parse("fair:1:2")


def test_blocks_of_one_warp_are_refused() -> None:
    """The warp that waits for credits and raises flags may be one that does not push: one warp is too few."""
    with pytest.raises(ValueError, match="two warps"):
        run(replace(draw_scenario(0), gpu=replace(GPUS[0], num_threads=32)), draw_schedule(0))


def test_a_wrong_result_is_told() -> None:
    """The judge itself: with another case's expectations a run fails where they first differ."""
    scenario = draw_scenario(0, num_cases=1)
    other = replace(scenario.cases[0], seed=scenario.cases[0].seed + 1)
    lying = Scenario(scenario.cases, scenario.gpu)
    lying.__dict__["expected"] = Scenario((other,), scenario.gpu).expected
    report = run(lying, draw_schedule(0))
    assert isinstance(report, RunReport)
    assert report.kind == "wrong result"
    assert "expected" in report.text
