"""A timeline as a picture: a row for each rank's host and for each of its streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepep.bench.timeline.record import HOST, Span

COLORS = {
    "dispatch": "#c2410c",
    "hook": "#f59e0b",
    "combine": "#be185d",
    "experts": "#2563eb",
    "products": "#2563eb",
    "attention": "#0d9488",
    "MoE layer": "#7c3aed",
    "backward": "#4d7c0f",
    "optimizer": "#a16207",
    "rows and routing": "#7c3aed",
}
OTHERS = "#9aa5b1"


def draw(ranks: Sequence[Sequence[Span]], title: str, path: Path) -> None:
    """Writes a picture of all ranks' spans; `path`'s suffix names the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [(rank, lane) for rank, spans in enumerate(ranks) for lane in lanes_of(spans)]
    figure = Figure(figsize=(11, 1.3 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names: dict[str, str] = {}
    for y, (rank, lane) in enumerate(rows):
        for span in ranks[rank]:
            if span.lane == lane:
                color = names.setdefault(span.name, COLORS.get(span.name, OTHERS))
                width = (span.end - span.begin) / 1e3
                axes.barh(y, width, left=span.begin / 1e3, height=0.7, color=color, edgecolor="white", lw=0.3)
    axes.set_yticks(range(len(rows)), [f"rank {rank}, {lane}" for rank, lane in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(
        handles=[Patch(color=color, label=name) for name, color in names.items()],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        fontsize=8,
        frameon=False,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def lanes_of(spans: Sequence[Span]) -> list[str]:
    """The host, then streams in the order of their first kernels."""
    ordered = sorted(spans, key=lambda span: (span.lane != HOST, span.begin))
    return list(dict.fromkeys(span.lane for span in ordered))
