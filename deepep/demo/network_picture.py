"""The picture of `deepep demo --data-parallel`: cluster as measured, plan, bytes and time per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from deepep.collectives.cost import LinkSpeeds
from deepep.demo.data_parallel import GradientRun
from deepep.demo.pictures import ACCENT, FAINT, INK, STYLE

GROUP_COLORS = plt.get_cmap("tab10")


def draw_network(
    path: Path, title: str, speeds: LinkSpeeds, torchs: GradientRun, ours: GradientRun, name: str
) -> None:
    """Draws both runs. title: of the cluster. name: of our run's format."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.4), height_ratios=(1.25, 1))
        _draw_cluster(axes[0][0], title, speeds)
        _draw_plan(axes[0][1], ours)
        steps = np.arange(len(ours.bytes))
        for axis, what in ((axes[1][0], "bytes"), (axes[1][1], "seconds")):
            scale = 1e-3 if what == "bytes" else 1e3
            for run, label, color in ((torchs, "torch's gloo", FAINT), (ours, f"deepep, {name}", ACCENT)):
                axis.plot(steps, scale * np.asarray(getattr(run, what)), color=color, lw=1.6, label=label)
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
            axis.legend(frameon=False)
        axes[1][0].set_title("Gradients sent by a rank, kB a step")
        axes[1][1].set_title("Backward of rank 0, ms a step")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_cluster(axis: Any, title: str, speeds: LinkSpeeds) -> None:
    """Ranks by the group that was found, joined by lines as wide as their links are fast."""
    places: dict[int, tuple[float, float]] = {}
    for number, group in enumerate(speeds.groups):
        centre = 2.6 * number
        for i, rank in enumerate(group):
            angle = 2 * np.pi * i / max(len(group), 2) + np.pi / 4
            places[rank] = (centre + 0.8 * np.cos(angle), 0.8 * np.sin(angle))
    fastest = max(max(row) for row in speeds.rate)
    for i, (x, y) in places.items():
        for j, (u, v) in places.items():
            if i < j:
                share = min(speeds.rate[i][j], fastest) / fastest
                axis.plot([x, u], [y, v], color=INK, lw=0.3 + 3.2 * share, alpha=0.15 + 0.5 * share, zorder=1)
    for number, group in enumerate(speeds.groups):
        for rank in group:
            axis.scatter(*places[rank], s=420, color=GROUP_COLORS(number % 10), zorder=2)
            axis.text(*places[rank], str(rank), ha="center", va="center", color="white", zorder=3)
    pairs = [speeds.rate[g[0]][g[1]] / 1e6 for g in speeds.groups if len(g) > 1]
    text = f"{max(pairs):.0f} MB/s inside a group" if pairs else ""
    if speeds.uplink:
        text += f", {speeds.uplink / 1e6:.0f} MB/s shared between groups"
    axis.set_title(f"{title}, as measured")
    axis.text(0.0, -0.02, text, transform=axis.transAxes, va="top")
    axis.margins(0.18)
    axis.set_aspect("equal")
    axis.axis("off")


def _draw_plan(axis: Any, run: GradientRun) -> None:
    """The plans by format and size, as a table."""
    axis.set_title("The plan")
    axis.axis("off")
    rows = [
        [codec, f"{size >> 10} KiB", words, f"{milliseconds:.0f} ms"]
        for codec, size, words, milliseconds in run.plans
    ]
    if rows:
        table = axis.table(rows, colLabels=["format", "float32", "schedule", "took"], loc="upper center")
        table.auto_set_font_size(False)
        table.set_fontsize(8)
        table.scale(1, 1.25)
        for cell in table.get_celld().values():
            cell.set_edgecolor(FAINT)
