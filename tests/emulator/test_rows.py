"""The kernels around the local experts on the emulated machine: the bits of plain torch, and no races."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.row_runs import KERNELS, RowCase, explore_rows, run_rows
from deepep.sim.rules.local_experts import logistic


@pytest.mark.parametrize("kernel", KERNELS)
def test_drawn_launches(kernel: str) -> None:
    failure = explore_rows(runs=25, only=kernel).failure
    assert failure is None, f"{failure.case} {failure.schedule}\n{failure.report.text}"


@pytest.mark.slow
def test_many_drawn_launches() -> None:
    failure = explore_rows(runs=600).failure
    assert failure is None, f"{failure.case} {failure.schedule}\n{failure.report.text}"


@pytest.mark.parametrize("num_rows", [0, 1, 31, 32, 33, 64, 300])
@pytest.mark.parametrize("num_warps", [1, 3])
def test_sorting_around_the_parts_of_warps(num_rows: int, num_warps: int) -> None:
    case = RowCase("sort_pairs", num_rows, num_topk=1, num_local_experts=3, num_warps=num_warps)
    report = run_rows(case, draw_schedule(0))
    assert report.kind == "ok", report.text


@pytest.mark.parametrize("miscounted", [-100, -40, -1, 1, 70])
def test_entries_that_nobody_counted_have_no_slot(miscounted: int) -> None:
    """A count that is wrong leaves nothing unwritten: no memory's earlier contents become a row's number."""
    case = RowCase("sort_pairs", 60, num_topk=2, num_local_experts=3, num_warps=3, miscounted=miscounted)
    report = run_rows(case, draw_schedule(0))
    assert report.kind == "ok", report.text


def test_a_wrong_result_is_found() -> None:
    """The judge itself: other weights than those it knows of."""
    case = RowCase("reduce_rows", 3, hidden=16, weighted=True)
    assert run_rows(case, draw_schedule(0)).kind == "ok"
    import deepep.sim.explore.row_runs as module

    real = module.expected
    try:
        module.expected = lambda case, given: real(replace(case, weighted=False), given)
        assert run_rows(case, draw_schedule(0)).kind == "wrong result"
    finally:
        module.expected = real


def test_the_logistic_function_is_one() -> None:
    """Against float64: e^-a is off by at most 2 units of 2^-23 and the sum and quotient round once each, half
    a unit: 4 units of 2^-24 ... 2^-21 in all. Every bfloat16 from -86 to 86, both ends, zeros and infinities.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = every[every.abs() <= 86]
    assert len(x) > 30_000
    wide = torch.sigmoid(x.double())
    assert ((logistic(x).double() - wide) / wide).abs().max() < 2.0**-21
    ends = torch.tensor([float("-inf"), -100.0, 100.0, float("inf")])
    assert logistic(ends).tolist() == [0.0, 0.0, 1.0, 1.0]
