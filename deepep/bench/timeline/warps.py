"""Time lines of warps as a picture: a row a warp, a panel a rank, the same time for all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from deepep.runtime.control.lines import CallLines

COLORS = {
    "start": "#d4d4d8",
    "count": "#a1a1aa",
    "post": "#18181b",
    "wait for metadata": "#fca5a5",
    "push rows": "#1d4ed8",
    "local rows": "#0d9488",
    "signal": "#7c3aed",
    "wait for credit": "#fdba74",
    "wait for weights": "#fde047",
    "wait for rows": "#f87171",
    "reduce": "#4d7c0f",
    "spread": "#0369a1",
    "finish": "#e4e4e7",
}


def draw(calls: Sequence[CallLines], title: str, path: Path) -> None:
    """Writes a picture of one call of all ranks; `path`'s suffix names the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first = min(span.begin for call in calls for line in call.warps for span in line.spans)
    rows = max(len(call.warps) for call in calls)
    height = min(4.0, max(1.2, 0.12 * rows))
    figure = Figure(figsize=(11, 1.2 + height * len(calls)), layout="constrained")
    panels = figure.subplots(len(calls), 1, sharex=True, squeeze=False)[:, 0]
    used: set[str] = set()
    for axes, call in zip(panels, sorted(calls, key=lambda call: call.rank), strict=True):
        bars: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
        for y, line in enumerate(call.warps):
            for span in line.spans:
                bars[span.step].append(((span.begin - first) / 1e3, (span.end - span.begin) / 1e3, y))
        for step, spans in bars.items():
            used.add(step)
            begins, widths, ys = zip(*spans, strict=True)
            axes.barh(ys, widths, left=begins, height=1.0, color=COLORS.get(step, "#000000"), lw=0)
        blocks = [y for y, line in enumerate(call.warps) if line.warp == 0]
        names = [f"block {call.warps[y].block}" for y in blocks]
        stride = -(-len(blocks) // 12)
        axes.set_yticks(blocks[::stride], names[::stride], fontsize=7)
        axes.set_ylim(len(call.warps) - 0.5, -0.5)
        axes.set_ylabel(f"rank {call.rank}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("us")
    panels[0].set_title(title, loc="left", fontsize=10)
    figure.legend(
        handles=[Patch(color=color, label=step) for step, color in COLORS.items() if step in used],
        loc="outside right upper",
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
