"""A picture of predicted times by number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

#: By curve, (ranks, microseconds).
Curves = Mapping[str, Sequence[tuple[int, float]]]


def draw(panels: Mapping[str, Curves], path: Path) -> None:
    """One panel a mode, one line a curve; both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(places, panels.items(), strict=True):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        ranks = sorted({rank for points in curves.values() for rank, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_xlabel("ranks")
        axes.set_ylabel("predicted time, µs")
        axes.set_title(title)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
