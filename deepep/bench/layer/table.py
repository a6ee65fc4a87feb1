"""The layer's figures as a table for people: milliseconds, and times those of its products."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.layer.rank import PRODUCTS
from deepep.bench.table import WIDTH, print_head, print_notes

COLUMNS = ("median ms", "p99 ms", "host ms", "x products")


def print_layer_report(report: BenchReport, console: Console) -> None:
    """A table for each shape, then the notes and what was wrong."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, markup=False)
    print_head(report, console)
    for shape, figures in groupby(report.figures, key=lambda figure: figure.shape):
        title = f"{shape} width={report.environment['width']}"
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in ("operation", "by"):
            table.add_column(name, no_wrap=True)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for _, rows in groupby(figures, key=lambda f: f.operation):
            together = list(rows)
            least = next((f.median for f in together if f.by == PRODUCTS), None)
            for figure in together:
                table.add_row(*_cells(figure, least), style="bold" if figure.by == OURS else "")
            table.add_section()
        console.print(table)
    print_notes(report, console)


def _cells(figure: Figure, least: float | None) -> list[str]:
    times = (f"{value / 1e3:.3f}" for value in (figure.median, figure.p99, figure.host))
    return [figure.operation, figure.by, *times, f"{figure.median / least:.2f}" if least else ""]
