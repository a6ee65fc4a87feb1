"""Dispatches that spread rows as they come, on the emulator: bits of the oracle's expanded layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.scenarios import Stop
from deepep.sim.explore.spread_runs import SHAPES, SpreadCase, explore_spreads, run_spread, run_stopped

CASES = {
    "plain": SpreadCase(hidden=40),
    "scales by columns": SpreadCase(num_scales=3, column_major=True),
    "scales by rows, 4-byte indices": SpreadCase(num_scales=2, index_bytes=4, zero_padding=False),
    "no host waits": SpreadCase(worst=16, num_scales=3, column_major=True),
    "no host waits, too few rows": SpreadCase(worst=14, short=7),
    "one rank does not spread": SpreadCase(spreads=(True, False)),
    "no rank has room": SpreadCase(short=1, alignment=1),
    "experts named twice": SpreadCase(has_duplicates=True, topk=5, alignment=1),
    "three ranks, one without tokens": SpreadCase(tokens=(6, 0, 3), local_experts=2),
    "no token at all": SpreadCase(tokens=(0, 0)),
    "one rank": SpreadCase(tokens=(7,), local_experts=5),
    "as along a handle": SpreadCase(is_again=True, num_scales=3, column_major=True, num_calls=1),
    "as along a handle, no row on a rank": SpreadCase(
        tokens=(1, 0), topk=1, local_experts=1, is_again=True, num_calls=1
    ),
    "three groups of tokens": SpreadCase(tokens=(150, 3), topk=2, hidden=8, num_calls=1),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_spread_as_the_oracle_has_them(name: str) -> None:
    case = CASES[name]
    gpu = SHAPES[len(name) % len(SHAPES)]
    if len(case.tokens) == 1:
        gpu = replace(gpu, push_blocks=0, local_blocks=gpu.num_blocks)
    report = run_spread(replace(case, gpu=gpu), draw_schedule(len(name)))
    assert not report.failed, f"{report.kind}: {report.text}"


def test_drawn_calls_under_drawn_schedules() -> None:
    tally = explore_spreads(runs=20)
    assert tally.failure is None, tally.failure


def test_a_rank_that_stops_leaves_no_slot_that_is_no_row() -> None:
    case = SpreadCase(tokens=(9, 8), worst=20, num_calls=1)
    kinds = set()
    for at in range(0, 300, 12):
        stop = Stop(rank=1, at=at, counts_writes=True)
        report = run_stopped(replace(case, gpu=SHAPES[at % len(SHAPES)]), draw_schedule(at), stop)
        assert not report.failed, f"{at}: {report.kind}: {report.text}"
        kinds.update((fault.phase, fault.operation) for fault in report.faults.values())
    assert {1, 2} <= {phase for phase, _ in kinds}  # at the counts, and at the rows
