"""Figures as a table for people."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepep.bench.elastic import operations as elastic
from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.operations import CACHED, COMBINE, FRESH, LAYOUT

#: what the widest row takes; files and pipes have no width of their own
WIDTH = 160
ORDER = (
    *(LAYOUT, *FRESH, elastic.AT_ONCE, CACHED),
    *(elastic.EXPANDED, elastic.EXPANDED_AT_ONCE, elastic.CACHED_EXPANDED),
    *(COMBINE, elastic.COMBINE_EXPANDED),
)
COLUMNS = (
    "median us",
    "p99 us",
    "host us",
    "wire MB",
    "logical MB",
    "wire GB/s",
    "logical GB/s",
    "floor us",
    "x floor",
)


def print_report(report: BenchReport, console: Console) -> None:
    """A table for each shape, then the notes and what was wrong."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, markup=False)
    print_head(report, console)
    for shape, figures in groupby(report.figures, key=lambda figure: figure.shape):
        skew = report.skews.get(shape)
        title = Text.assemble(str(shape), *([("\n" + str(skew), "not bold")] if skew else []))
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in ("operation", "by"):
            table.add_column(name, no_wrap=True)
        for name in ("SMs", *COLUMNS):
            table.add_column(name, justify="right")
        ordered = sorted(figures, key=lambda f: (ORDER.index(f.operation), f.dtype or ""))
        for _, rows in groupby(ordered, key=lambda f: (f.operation, f.dtype)):
            for figure in rows:
                table.add_row(*_cells(figure), style="bold" if figure.by == OURS else "")
            table.add_section()
        console.print(table)
    print_notes(report, console)


def print_head(report: BenchReport, console: Console) -> None:
    """Prints where it was measured."""
    facts = report.environment
    console.print(
        f"{facts['ranks']} ranks, {facts['device']}; backend {facts['backend']}, {facts['transport']}, "
        f"{facts['routing']} routing, {facts['iterations']} samples, {facts['date']}",
        highlight=False,
        markup=False,
    )


def print_notes(report: BenchReport, console: Console) -> None:
    """Prints the notes and what was wrong."""
    for note in report.notes:
        console.print(Text(note, "yellow"))
    for problem in report.problems:
        console.print(Text.assemble(("WRONG", "bold red"), " ", problem))


def _cells(figure: Figure) -> list[str]:
    floor = "" if figure.floor is None else f"{figure.floor:.1f} ({figure.floor_sms} SMs)"
    return [
        " ".join(filter(None, (figure.operation, figure.dtype))),
        figure.by,
        "" if figure.sms is None else str(figure.sms),
        f"{figure.median:.1f}",
        f"{figure.p99:.1f}",
        f"{figure.host:.1f}",
        _number(figure.wire_bytes / 1e6, 3),
        _number(figure.logical_bytes / 1e6, 3),
        _number(figure.wire_gbs, 1),
        _number(figure.logical_gbs, 1),
        floor,
        _number(figure.ratio, 3),
    ]


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value else ""
