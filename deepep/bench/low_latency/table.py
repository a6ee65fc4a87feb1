"""Low-latency figures as a table for people: for each operation a curve over T."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.table import WIDTH, print_head, print_notes

COLUMNS = (
    "T",
    "median us",
    "p99 us",
    "host us",
    "kernels us",
    "wire MB",
    "copy us",
    "exchange us",
    "x exchange",
)


def print_low_latency_report(report: BenchReport, console: Console) -> None:
    """A table for each H, K and E, then the notes and what was wrong."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, markup=False)
    print_head(report, console)
    runs_on = report.environment.get("runs_on", {})
    console.print(
        "; ".join(f"{name}: {what}" for name, what in runs_on.items()), highlight=False, markup=False
    )
    for (hidden, topk, experts), figures in groupby(report.figures, key=_curve):
        title = f"H={hidden} K={topk} E={experts}"
        table = Table(title=title, title_justify="left", title_style="bold")
        for name in ("operation", "by"):
            table.add_column(name, no_wrap=True)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        # Operations in the order in which they were first measured, each by T.
        listed = list(figures)
        for operation in dict.fromkeys((figure.operation, figure.dtype) for figure in listed):
            rows = [figure for figure in listed if (figure.operation, figure.dtype) == operation]
            for figure in sorted(rows, key=lambda f: (f.by != OURS, f.by, f.shape.tokens)):
                table.add_row(*_cells(figure), style="bold" if figure.by == OURS else "")
            table.add_section()
        console.print(table)
    print_notes(report, console)


def _curve(figure: Figure) -> tuple[int, int, int]:
    return figure.shape.hidden, figure.shape.topk, figure.shape.experts


def _cells(figure: Figure) -> list[str]:
    exchange = _number(figure.exchange, 1)
    if figure.exchange_sms is not None:
        exchange += f" ({figure.exchange_sms} SMs)"
    return [
        " ".join(filter(None, (figure.operation, figure.dtype))),
        figure.by,
        str(figure.shape.tokens),
        f"{figure.median:.1f}",
        f"{figure.p99:.1f}",
        f"{figure.host:.1f}",
        _number(figure.kernels, 1),
        _number(figure.wire_bytes / 1e6, 3),
        _number(figure.floor, 1),
        exchange,
        _number(figure.exchange_ratio, 2),
    ]


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value else ""
