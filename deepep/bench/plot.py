"""Figures as a picture: time by SM count, against the floor."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt

from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.operations import BY_TOPK, BY_TOPK_AT_ONCE, CACHED, COMBINE, LAID_OUT_AT_ONCE, LAYOUT

INK, FAINT, ACCENT = "#1f2933", "#cbd2d9", "#c2410c"
OTHERS = ("#2563eb", "#0d9488", "#7c3aed", "#a16207", "#be185d", "#4d7c0f")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "figure.constrained_layout.use": True,
}


def draw_report(report: BenchReport, path: Path) -> None:
    """A panel for each shape and operation, written to `path` in the format that its suffix names."""
    panels = panels_of(report.figures)
    shapes = list(dict.fromkeys(figure.shape for figure in report.figures))
    columns = list(dict.fromkeys(title for _, title in panels))
    with plt.rc_context(STYLE):
        size = (1.0 + 3.9 * max(1, len(columns)), 0.8 + 3.1 * max(1, len(shapes)))
        figure, grid = plt.subplots(max(1, len(shapes)), max(1, len(columns)), figsize=size, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for (shape, title), figures in panels.items():
            axes = grid[shapes.index(shape)][columns.index(title)]
            axes.set_axis_on()
            _draw_panel(axes, figures)
            axes.set_title(f"{title}, {shape}", fontsize=8)
        save_figure(figure, report, path)


def save_figure(figure: Any, report: BenchReport, path: Path) -> None:
    """Writes a drawn figure, with what was measured where as its title."""
    facts = report.environment
    warning = ": functional figures only" if facts["functional_only"] else ""
    figure.suptitle(
        f"{facts['device']}{warning}; {facts['ranks']} ranks, {facts['routing']} routing", fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panels_of(figures: Iterable[Figure]) -> dict[tuple[Any, str], list[Figure]]:
    """Figures that share a shape, a dtype and a direction, by (shape, title)."""
    panels: dict[tuple[Any, str], list[Figure]] = {}
    for figure in figures:
        if figure.operation != LAYOUT:
            kind = COMBINE if figure.operation == COMBINE else "dispatch"
            panels.setdefault((figure.shape, f"{kind} {figure.dtype}"), []).append(figure)
    return panels


def _draw_panel(axes: Any, figures: list[Figure]) -> None:
    colors = iter(OTHERS * 2)
    by_line = sorted(figures, key=_label)
    for label, line in groupby(by_line, key=_label):
        rows = sorted(line, key=lambda figure: figure.sms or 0)
        ours = rows[0].by == OURS
        color = ACCENT if ours else next(colors)
        style = {"color": color, "ls": "--" if "cached" in label else "-", "label": label}
        if rows[0].sms is None:
            axes.axhline(rows[0].median, lw=1, **style)
        else:
            sms, times = [row.sms for row in rows], [row.median for row in rows]
            axes.plot(sms, times, marker="o", ms=4, lw=1.8 if ours else 1.2, **style)
            axes.vlines(sms, times, [row.p99 for row in rows], color=color, lw=0.7, alpha=0.5)
    floors = {row.sms: row.floor for row in figures if row.sms is not None and row.floor is not None}
    if floors:
        counts = sorted(floors)
        axes.plot(counts, [floors[n] for n in counts], color=INK, lw=1, ls=":", marker="_", label="floor")
        axes.set_xticks(counts)
    if any(figure.sms for figure in figures):
        axes.set_xlabel("SMs")
    else:
        axes.set_xticks([])
    axes.set_ylabel("us  (median; thin line to p99)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=FAINT, lw=0.5, alpha=0.6)
    axes.legend(frameon=False, fontsize=7)


def _label(figure: Figure) -> str:
    kind = {
        CACHED: ", cached",
        BY_TOPK: ", by top-k",
        BY_TOPK_AT_ONCE: ", by top-k, no wait",
        LAID_OUT_AT_ONCE: ", with a layout before, no wait",
    }
    return figure.by + kind.get(figure.operation, "")
