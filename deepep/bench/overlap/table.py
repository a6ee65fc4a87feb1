"""Overlap's figures as a table for people: microseconds, and times the bound."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from deepep.bench.figures import BenchReport, Figure
from deepep.bench.overlap.rank import ALONE, BOUND, PRODUCTS, TOGETHER
from deepep.bench.table import WIDTH, print_head, print_notes

COLUMNS = (ALONE, PRODUCTS, TOGETHER, BOUND, "x bound", "p99 together")


def print_overlap_report(report: BenchReport, console: Console) -> None:
    """A table for each shape, then the notes."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, markup=False)
    print_head(report, console)
    for shape, figures in groupby(report.figures, key=lambda figure: figure.shape):
        title = f"{shape} width={report.environment['width']}"
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in ("operation", "by", "SMs"):
            table.add_column(name, no_wrap=True)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for _, rows in groupby(figures, key=_measured):
            table.add_row(*_cells({figure.operation.rpartition(", ")[2]: figure for figure in rows}))
        console.print(table)
    print_notes(report, console)


def _measured(figure: Figure) -> tuple[str, str, str | None, int | None]:
    """The operation that a figure is of."""
    return figure.operation.rpartition(", ")[0], figure.by, figure.dtype, figure.sms


def _cells(by_name: dict[str, Figure]) -> list[str]:
    both, bound = by_name[TOGETHER], by_name.get(BOUND)
    operation, by, dtype, sms = _measured(both)
    times = (f"{found.median:.1f}" if (found := by_name.get(name)) else "" for name in COLUMNS[:4])
    ratio = f"{both.median / bound.median:.2f}" if bound else ""
    return [f"{operation} {dtype}", by, str(sms or ""), *times, ratio, f"{both.p99:.1f}"]
