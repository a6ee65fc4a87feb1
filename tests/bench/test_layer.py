"""The layer's benchmark: plain torch computes the same, a difference is found, figures and their table."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from deepep.bench.layer.plain import PlainLayer
from deepep.bench.layer.rank import FIXED, FORWARD, PLAIN, PRODUCTS, SCALED, TRAINED, run_layer_rank
from deepep.bench.layer.table import print_layer_report
from deepep.bench.sweep import Shape, Sweep
from deepep.errors import ArgumentError

SHAPE = Shape(tokens=11, hidden=32, topk=3, experts=6)
SMALL = Sweep(2, (SHAPE,), dtypes=("bf16",), iterations=50, warmup=0, mode="layer", width=16)


def measured(context: Any, breaks: bool, sweep: Sweep = SMALL) -> Any:
    """The report of a run; with `breaks`, of a baseline that sends one row of rank 1 to a wrong expert."""
    from deepep.bench.layer import rank as module

    if breaks and context.rank == 1:

        class Astray(PlainLayer):
            def __call__(self, x: torch.Tensor) -> torch.Tensor:
                return super().__call__(x.roll(1, 0))

        module.PlainLayer = Astray
    try:
        return run_layer_rank(context.group, context.device, sweep)
    finally:
        module.PlainLayer = PlainLayer


def test_plain_torch_computes_the_same_and_all_is_measured(world_of: Any) -> None:
    for report in world_of(2).run(measured, False):
        assert report.problems == []
        assert [(f.operation, f.by) for f in report.figures] == [
            (operation, by) for operation in (FORWARD, TRAINED) for by in ("deepep", PLAIN, FIXED, PRODUCTS)
        ]
        assert all(0 < f.median <= f.p99 for f in report.figures)
    out = io.StringIO()
    report.environment["command"] = ""
    print_layer_report(report, Console(file=out))
    rows = [line for line in out.getvalue().splitlines() if PRODUCTS in line]
    assert len(rows) == 2
    assert all("1.00" in row for row in rows)


def test_rows_in_fp8_are_measured_where_they_can_be_cast(world_of: Any) -> None:
    sweep = replace(SMALL, shapes=(replace(SHAPE, hidden=128),))
    for report in world_of(2).run(measured, False, sweep):
        assert report.problems == []
        assert [f.by for f in report.figures] == 2 * ["deepep", SCALED, PLAIN, FIXED, PRODUCTS]
        assert {f.dtype for f in report.figures if f.by == SCALED} == {"fp8"}


def test_another_result_is_found_on_every_rank(world_of: Any) -> None:
    for report in world_of(2).run(measured, True):
        (problem,) = report.problems
        assert "output, by plain torch: rank 1: output: off by" in problem
        assert report.figures == []


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [("width", 12, "width: got 12"), ("sms", (8,), "sms: got"), ("routing", "zipf", "routing: got zipf")],
)
def test_what_cannot_be_measured_is_refused(option: str, value: Any, complaint: str) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        Sweep(2, (SHAPE,), dtypes=("bf16",), **{"mode": "layer", option: value})
