"""The demo's report: whether the losses are equal, tables, pictures and the routing trace."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepep.demo.config import DemoConfig
from deepep.demo.train import RankRecord, TrainingOutcome
from deepep.trace import RoutingTrace, TraceWriter

TRACE_NAME = "routing.safetensors"
#: Phases in the order of a step; those of the second level are parts of the one before them.
PHASES = (
    ("forward", 0),
    ("dispatch, forward", 1),
    ("experts, forward", 1),
    ("combine, forward", 1),
    ("backward", 0),
    ("combine, backward", 1),
    ("dispatch, backward", 1),
    ("gradient sum", 0),
    ("optimizer", 0),
    ("balancing", 0),
)


@dataclass(frozen=True)
class Comparison:
    """Both runs, and where they differ. Every difference is bounded by zero: deepep.demo.single says why."""

    parallel: TrainingOutcome
    single: TrainingOutcome

    @property
    def worst(self) -> tuple[float, int, int]:
        """(largest absolute difference of two losses, its step, its rank); infinite for a NaN on one side."""
        gaps = [
            (_gap(p, s), step, rank)
            for step, both in enumerate(zip(self.parallel.losses, self.single.losses, strict=True))
            for rank, (p, s) in enumerate(zip(*both, strict=True))
        ]
        return max(gaps, key=lambda gap: gap[0])

    @property
    def equal(self) -> bool:
        """Every loss of every rank in every step has the same bits, and so have all weights in the end."""
        return self.worst[0] == 0.0 and self.parallel.weights == self.single.weights

    @property
    def first_and_last(self) -> tuple[float, float]:
        """Mean loss of all ranks in the first step, and over the last tenth of the steps."""
        means = [sum(step) / len(step) for step in self.parallel.losses]
        last = means[-max(1, len(means) // 10) :]
        return means[0], sum(last) / len(last)


def _gap(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) if math.isfinite(a - b) else math.inf


def outcome(records: Sequence[RankRecord]) -> TrainingOutcome:
    """The outcome of the run between processes."""
    losses = [list(step) for step in zip(*(record.losses for record in records), strict=True)]
    return TrainingOutcome(losses, [record.weights for record in records])


def routing_trace(records: Sequence[RankRecord], config: DemoConfig) -> RoutingTrace:
    """All ranks' routing as a trace."""
    notes = {"producer": "deepep demo", "hidden": str(config.hidden)}
    writer = TraceWriter(
        num_layers=config.layers,
        num_ranks=config.num_ranks,
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        notes=notes,
    )
    for step in range(config.steps):
        for layer in range(config.layers):
            batch = [record.routing[step][layer] for record in records]
            writer.add(step, layer, [idx for idx, _ in batch], [weights for _, weights in batch])
    return writer.finish()


def print_tables(console: Console, records: Sequence[RankRecord], config: DemoConfig) -> None:
    """Traffic and balance by rank, then time by phase."""
    entries, rows = _entries(records), _rows(records, "dispatch")
    sent = _bytes(records)
    traffic = Table(title="Traffic", title_justify="left", title_style="bold")
    traffic.add_column("rank")
    for name in ("tokens dispatched", "top-k choices in", "rows in", "saved", "MB out", "MB in"):
        traffic.add_column(name, justify="right")
    off_diagonal = sent * (1 - torch.eye(config.num_ranks, dtype=torch.int64))
    tokens = config.steps * config.layers * config.tokens_per_rank
    for r in range(config.num_ranks):
        traffic.add_row(
            str(r),
            f"{tokens:,}",
            f"{int(entries[:, r].sum()):,}",
            f"{int(rows[:, r].sum()):,}",
            f"{1 - rows[:, r].sum().item() / max(1, entries[:, r].sum().item()):.0%}",
            f"{off_diagonal[r].sum().item() / 1e6:.1f}",
            f"{off_diagonal[:, r].sum().item() / 1e6:.1f}",
        )
    traffic.add_section()
    traffic.add_row(
        "all",
        f"{tokens * config.num_ranks:,}",
        f"{int(entries.sum()):,}",
        f"{int(rows.sum()):,}",
        f"{1 - rows.sum().item() / max(1, entries.sum().item()):.0%}",
        f"{off_diagonal.sum().item() / 1e6:.1f}",
        f"{off_diagonal.sum().item() / 1e6:.1f}",
    )
    console.print(traffic)
    console.print(
        "MB: payload between different ranks, forward and backward. Choices and rows: forward dispatch.\n",
        style="dim",
    )

    times = Table(title="Time per step", title_justify="left", title_style="bold")
    times.add_column("phase")
    times.add_column("mean of ranks, ms", justify="right")
    times.add_column("slowest rank, ms", justify="right")
    for name, level in PHASES:
        per_rank = [record.seconds.get(name, 0.0) / config.steps * 1e3 for record in records]
        label = Text(f"  {name}", "dim") if level else Text(name)
        times.add_row(label, f"{sum(per_rank) / len(per_rank):.1f}", f"{max(per_rank):.1f}")
    console.print(times)

    loads = torch.stack(records[0].loads).double()  # [steps, layers, E]
    imbalance = (loads.amax(2) / loads.mean(2)).mean(1)  # [steps]
    tenth = max(1, config.steps // 10)
    console.print(
        f"\nExpert load, busiest over mean: {imbalance[:tenth].mean():.2f} in the first {tenth} steps, "
        f"{imbalance[-tenth:].mean():.2f} in the last {tenth}."
    )


def write_outputs(
    folder: Path, records: Sequence[RankRecord], config: DemoConfig, comparison: Comparison
) -> list[Path]:
    """Pictures, the routing trace and the losses, into `folder`."""
    from deepep.demo.pictures import draw_expert_load, draw_losses, draw_traffic

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("loss.png", "expert_load.png", "traffic.png", TRACE_NAME, "run.json")]
    draw_losses(paths[0], comparison.parallel.losses, comparison.single.losses)
    draw_expert_load(paths[1], torch.stack(records[0].loads).numpy(), config.num_ranks)
    draw_traffic(
        paths[2],
        torch.stack([record.bytes_sent["dispatch"] for record in records]).numpy() / 1e6,
        _entries(records).numpy(),
        _rows(records, "dispatch").numpy(),
    )
    routing_trace(records, config).save(paths[3])
    run = {
        "config": asdict(config),
        "between_processes": asdict(comparison.parallel),
        "one_process": asdict(comparison.single),
        "bytes_sent": _bytes(records).tolist(),
        "seconds": [record.seconds for record in records],
    }
    paths[4].write_text(json.dumps(run) + "\n")
    return paths


def _entries(records: Sequence[RankRecord]) -> torch.Tensor:
    """[R, R]: top-k choices of each rank's tokens that live on each rank."""
    return torch.stack([r.entries_sent for r in records if r.entries_sent is not None])


def _rows(records: Sequence[RankRecord], exchange: str) -> torch.Tensor:
    """[R, R]: rows from each rank to each rank."""
    return torch.stack([record.rows_sent[exchange] for record in records])


def _bytes(records: Sequence[RankRecord]) -> torch.Tensor:
    """[R, R]: bytes from each rank to each rank in all exchanges, rows that stay included."""
    return torch.stack([sum(r.bytes_sent.values(), torch.zeros(len(records)).long()) for r in records])
