"""The demo's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize, TwoSlopeNorm

INK, FAINT, ACCENT = "#1f2933", "#cbd2d9", "#c2410c"
RANK_COLORS = plt.get_cmap("viridis")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "figure.constrained_layout.use": True,
}


def draw_losses(path: Path, by_rank: Sequence[Sequence[float]], single: Sequence[Sequence[float]]) -> None:
    """by_rank, single: [steps][R] losses in nats per byte of the two runs."""
    ranks, alone = np.asarray(by_rank), np.asarray(single)
    steps = np.arange(len(ranks))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 3.8))
        for rank in range(ranks.shape[1]):
            color = RANK_COLORS(rank / max(1, ranks.shape[1] - 1))
            axes.plot(steps, ranks[:, rank], color=color, lw=0.7, alpha=0.45)
        axes.plot(steps, ranks.mean(1), color=INK, lw=2.0, label=f"{ranks.shape[1]} processes, mean of ranks")
        every = max(1, len(steps) // 30)
        axes.plot(
            steps[::every],
            alone.mean(1)[::every],
            ls="none",
            marker="o",
            ms=5.5,
            mfc="none",
            mec=ACCENT,
            mew=1.3,
            label="one process",
        )
        axes.axhline(np.log(256), color=FAINT, lw=1, ls="--", zorder=0)
        axes.text(steps[-1], np.log(256), "guessing: ln 256", ha="right", va="bottom", fontsize=8, alpha=0.7)
        worst = float(np.abs(ranks - alone).max())
        verdict = "bit for bit equal" if worst == 0 else f"DIFFERENT by up to {worst:.3g}"
        axes.set_title(f"Training loss: both runs are {verdict}")
        axes.set_xlabel("step")
        axes.set_ylabel("nats per byte  (thin: each rank's own text)")
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, steps[-1])
        axes.grid(axis="y", color=FAINT, lw=0.5, alpha=0.6)
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.92))
        _save(figure, path)


def draw_expert_load(path: Path, loads: np.ndarray, num_ranks: int) -> None:
    """loads: [steps, layers, E] top-k entries per expert."""
    steps, layers, experts = loads.shape
    relative = loads / loads.mean(axis=2, keepdims=True)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(layers, 1, figsize=(7.2, 1.3 + 2.2 * layers), sharex=True, squeeze=False)
        norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=3.0)
        for layer in range(layers):
            axes = grid[layer, 0]
            image = axes.imshow(
                relative[:, layer].T,
                aspect="auto",
                cmap="RdBu_r",
                norm=norm,
                interpolation="nearest",
                extent=(0, steps, experts, 0),
            )
            for boundary in range(1, num_ranks):
                axes.axhline(boundary * experts / num_ranks, color=INK, lw=0.8)
            centers = (np.arange(num_ranks) + 0.5) * experts / num_ranks
            axes.set_yticks(centers, [f"rank {r}" for r in range(num_ranks)])
            axes.tick_params(length=0)
            final = relative[-max(1, steps // 10) :, layer].max(axis=1).mean()
            first = relative[: max(1, steps // 10), layer].max(axis=1).mean()
            axes.set_title(
                f"Layer {layer}: busiest expert at first {first:.1f}x the mean, at last {final:.1f}x"
            )
        grid[-1, 0].set_xlabel("step")
        bar = figure.colorbar(image, ax=grid[:, 0], shrink=0.8, pad=0.015, extend="max")
        bar.set_label("tokens of an expert, 1 = even share")
        bar.outline.set_visible(False)
        _save(figure, path)


def draw_traffic(path: Path, megabytes: np.ndarray, entries: np.ndarray, rows: np.ndarray) -> None:
    """All [R, R], from rank (row) to rank (column), of all forward dispatches. megabytes: payload. entries:
    top-k choices. rows: what was sent for them, one row per token and rank.
    """
    num_ranks = len(megabytes)
    between = np.where(np.eye(num_ranks, dtype=bool), np.nan, megabytes)
    with plt.rc_context(STYLE):
        width = 2.6 + 0.75 * max(4, num_ranks)
        figure, (axes, bars) = plt.subplots(
            1, 2, figsize=(width + 2.6, 0.9 + 0.75 * max(4, num_ranks)), width_ratios=(1.5, 1)
        )
        colors = plt.get_cmap("YlOrBr").copy()
        colors.set_bad("#eef1f4")
        low, high = (np.nanmin(between), np.nanmax(between)) if num_ranks > 1 else (0.0, 1.0)
        scale = Normalize(low - 0.35 * (high - low), high + 0.35 * (high - low))
        axes.imshow(between, cmap=colors, norm=scale)
        for source in range(num_ranks):
            for target in range(num_ranks):
                own = source == target
                axes.text(
                    target,
                    source,
                    f"{megabytes[source, target]:.1f}" + ("\nstays" if own else ""),
                    ha="center",
                    va="center",
                    fontsize=7.5 if own else 9.5,
                    color="#7b8794" if own else "white" if scale(between[source, target]) > 0.6 else INK,
                )
        axes.set_xticks(range(num_ranks), [f"{r}" for r in range(num_ranks)])
        axes.set_yticks(range(num_ranks), [f"{r}" for r in range(num_ranks)])
        axes.set_xlabel("to rank")
        axes.set_ylabel("from rank")
        axes.set_title("MB dispatched from rank to rank")
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        _draw_deduplication(bars, entries.sum(0), rows.sum(0))
        _save(figure, path)


def _draw_deduplication(axes: Any, entries: np.ndarray, rows: np.ndarray) -> None:
    ranks = np.arange(len(entries))
    axes.barh(ranks, entries / 1e3, height=0.62, color="#f3d9b1", label="top-k choices")
    axes.barh(ranks, rows / 1e3, height=0.62, color="#b45309", label="rows sent")
    for rank in ranks:
        saved = 1 - rows[rank] / max(1, entries[rank])
        axes.text(
            rows[rank] / 2e3, rank, f"-{saved:.0%}", ha="center", va="center", color="white", fontsize=8
        )
    axes.invert_yaxis()
    axes.set_yticks(ranks, [f"{r}" for r in ranks])
    axes.set_ylabel("to rank")
    axes.set_xlabel("thousands")
    axes.set_title("One row per token and rank")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(ranks) - 0.5, -1.15)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", borderaxespad=0.1, columnspacing=1.0)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
