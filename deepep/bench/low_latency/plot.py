"""Figures of low latency as a picture: time by T, against the bare exchange."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.plot import ACCENT, FAINT, INK, OTHERS, STYLE, save_figure

EXCHANGE = "bare exchange"
COLUMNS = 3


def draw_curves(report: BenchReport, path: Path) -> None:
    """A panel for each operation, a line for each that does it; `path`'s suffix names the format."""
    panels = curves_of(report.figures)
    columns = min(COLUMNS, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(1.0 + 3.9 * columns, 0.8 + 3.1 * rows), squeeze=False
        )
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, figures) in zip(grid.flat, panels.items(), strict=False):
            _draw_panel(axes, figures)
            axes.set_title(title, fontsize=8)
        save_figure(figure, report, path)


def curves_of(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    """Figures of one operation, dtype and shape but for T, by title."""
    panels: dict[str, list[Figure]] = {}
    for figure in figures:
        shape = figure.shape
        title = f"{figure.operation} {figure.dtype or ''}".rstrip()
        panels.setdefault(f"{title}, H={shape.hidden} K={shape.topk} E={shape.experts}", []).append(figure)
    return panels


def _draw_panel(axes: Any, figures: list[Figure]) -> None:
    colors = iter(OTHERS * 2)
    counts = sorted({figure.shape.tokens for figure in figures})
    for by, line in groupby(sorted(figures, key=lambda figure: figure.by), key=lambda figure: figure.by):
        rows = sorted(line, key=lambda figure: figure.shape.tokens)
        color = ACCENT if by == OURS else INK if by == EXCHANGE else next(colors)
        tokens, times = [row.shape.tokens for row in rows], [row.median for row in rows]
        style = ":" if by == EXCHANGE else "-"
        axes.plot(
            tokens, times, marker="o", ms=4, lw=1.8 if by == OURS else 1.2, ls=style, color=color, label=by
        )
        axes.vlines(tokens, times, [row.p99 for row in rows], color=color, lw=0.7, alpha=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("T, tokens of a rank")
    axes.set_ylabel("us  (median; thin line to p99)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, lw=0.5, alpha=0.6)
    axes.legend(frameon=False, fontsize=7)
