"""Overlap's benchmark: what is measured of each operation, and its table."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from deepep.bench.overlap.rank import ALONE, BOUND, PRODUCTS, TOGETHER, run_overlap_rank
from deepep.bench.overlap.table import print_overlap_report
from deepep.bench.sweep import Shape, Sweep

SHAPE = Shape(tokens=11, hidden=128, topk=3, experts=6)
SMALL = Sweep(2, (SHAPE,), iterations=50, warmup=0, mode="overlap", width=16)


def measured(context: Any) -> Any:
    return run_overlap_rank(context.group, context.device, SMALL)


def test_an_operation_is_measured_alone_and_beside_products(world_of: Any) -> None:
    for report in world_of(2).run(measured):
        operations = (("cached dispatch", "bf16"), ("cached dispatch", "fp8"), ("combine", "bf16"))
        assert [(f.operation, f.dtype) for f in report.figures] == [
            (f"{name}, {part}", dtype) for name, dtype in operations for part in (ALONE, PRODUCTS, TOGETHER)
        ]
        assert all(0 < f.median <= f.p99 for f in report.figures)
    report.environment["command"] = ""
    # As on CUDA: the same products beside blocks that hold SMs.
    together = next(f for f in report.figures if f.operation.endswith(TOGETHER))
    bound = replace(together, operation=f"cached dispatch, {BOUND}", median=together.median / 2)
    report.figures.insert(3, bound)
    report.figures += [replace(figure, sms=24) for figure in report.figures[4:]]
    rows = table_of(report)
    assert len(rows) == 5
    assert "2.00" in rows[0]
    assert not any("2.00" in row for row in rows[1:])


def table_of(report: Any) -> list[str]:
    out = io.StringIO()
    print_overlap_report(report, Console(file=out))
    return [line for line in out.getvalue().splitlines() if "deepep" in line and "\u2502" in line]
