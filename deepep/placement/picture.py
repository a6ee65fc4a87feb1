"""A picture of a replay: imbalance window by window, and the ranks' loads before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from deepep.placement.replay import WindowImbalance


def draw(windows: Sequence[WindowImbalance], title: str, path: Path) -> None:
    """Left: imbalances by window. Right: each rank's entries over the mean, of all windows but the first,
    ranks in descending order. At least two windows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    ink, faint, accent, calm = "#1f2933", "#cbd2d9", "#c2410c", "#1d6fa5"
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    later = windows[1:]
    at = [w.first_step for w in windows]
    left.plot(at, [w.contiguous for w in windows], color=accent, marker="o", label="contiguous blocks")
    replayed = [w.previous for w in later if w.previous is not None]
    left.plot(at[1:], replayed, color=calm, marker="o", label="placed by the window before")
    left.plot(at, [w.hindsight for w in windows], color=calm, ls=":", label="placed by its own loads")
    left.plot(at, [w.least for w in windows], color=ink, lw=0.8, ls="--", label="bound, window's loads")
    left.set_xlabel("first step of the window")
    left.set_ylabel("busiest rank over the mean")
    left.set_ylim(bottom=0.97)
    left.set_title(title, loc="left", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    num_ranks = len(windows[0].rank_loads[0])
    for which, (color, name) in enumerate(((accent, "contiguous blocks"), (calm, "placed"))):
        total = torch.stack([w.rank_loads[which] for w in later]).sum(0).double()
        relative = (total / total.mean().clamp(min=1e-300)).sort(descending=True).values
        places = [rank + 0.4 * which - 0.2 for rank in range(num_ranks)]
        right.bar(places, relative.tolist(), width=0.4, color=color, label=name)
    right.axhline(1.0, color=faint, lw=1, zorder=0)
    right.set_xticks([])
    right.set_xlabel("ranks, the busiest first")
    right.set_ylabel("entries over the mean, all layers")
    right.set_title("Load of the ranks, whole replay", loc="left", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
