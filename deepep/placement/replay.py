"""Replay of a routing trace under placements: what each would have had its ranks do, window by window.

A window is so many recorded steps. The placement in force in one is made from the loads of the window before
it, each layer's from its own: what a running system can know. Beside it stands the placement from the
window's own loads, which it cannot know. Tokens are mapped as they would be, entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepep.errors import RangeError
from deepep.placement.experts import ExpertPlacement, contiguous
from deepep.placement.revise import revise
from deepep.placement.search import least_share, place
from deepep.runtime.checks import check_int
from deepep.trace import RoutedBatch, RoutingTrace


@dataclass(frozen=True)
class WindowImbalance:
    """One window's imbalances: entries of the busiest rank over the mean of all, the mean over its batches,
    which are one layer's dispatches in one step each.

    first_step, last_step: as the trace numbers them. contiguous: without a placement. previous: with that of
    the window before; None for the first window. hindsight: with that of this window. least: what no
    placement of so many replicas gets below, for the loads of the window as a whole. moved: experts that a
    rank had to be brought before this window, in a layer, on average; None for the first. rank_loads: [R]
    entries by rank of all batches, by contiguous blocks, and with the placement in force.
    """

    first_step: int
    last_step: int
    contiguous: float
    previous: float | None
    hindsight: float
    least: float
    moved: float | None
    rank_loads: tuple[Tensor, Tensor]


def replay(
    trace: RoutingTrace,
    num_ranks: int,
    num_redundant: int = 0,
    *,
    window: int = 0,
    num_groups: int = 1,
    num_domains: int = 1,
    moving_cost: float = 0.0,
) -> list[WindowImbalance]:
    """Imbalances of every window of a trace, whose tokens are dealt to `num_ranks` ranks.

    num_redundant, num_groups, num_domains: as `place` has them; moving_cost: as `revise` has it, or
    0: what moves does not count. window: steps of one, the last may be
    shorter; 0: an eighth of the trace's. Raises ArgumentTypeError or RangeError, for E that is no multiple of
    R, too: what is compared with is the placement by contiguous blocks.
    """
    window = check_int("window", window, 0, max(trace.num_steps, 1)) or max(1, trace.num_steps // 8)
    check_int("num_ranks", num_ranks, 1, trace.num_experts)
    if trace.num_experts % num_ranks:
        raise RangeError("num_ranks", str(num_ranks), f"a divisor of {trace.num_experts}, the experts")
    plain = [contiguous(trace.num_experts, num_ranks)] * trace.num_layers
    in_force, moved = plain, None
    found: list[WindowImbalance] = []
    for first in range(0, trace.num_steps, window):
        steps = range(first, min(first + window, trace.num_steps))
        by_layer = [
            [trace.batch(step, layer).reshard(num_ranks) for step in steps]
            for layer in range(trace.num_layers)
        ]
        loads = [expert_loads(batches, trace.num_experts) for batches in by_layer]
        made = [
            place(load, num_ranks, num_redundant, num_groups=num_groups, num_domains=num_domains)
            for load in loads
        ]
        without, with_it, best = (_imbalance(by_layer, chosen) for chosen in (plain, in_force, made))
        found.append(
            WindowImbalance(
                first_step=int(trace.step[steps[0]]),
                last_step=int(trace.step[steps[-1]]),
                contiguous=without[0],
                previous=None if moved is None else with_it[0],
                hindsight=best[0],
                least=sum(_least(load, num_ranks, num_redundant) for load in loads) / len(loads),
                moved=moved,
                rank_loads=(without[1], with_it[1]),
            )
        )
        later = [
            revise(old, new, load, moving_cost, num_domains=num_domains)
            if moving_cost
            else new.renumbered(old, num_domains)
            for old, new, load in zip(in_force, made, loads, strict=True)
        ]
        brought = sum(new.num_moved(old) for new, old in zip(later, in_force, strict=True))
        in_force, moved = later, brought / (num_ranks * trace.num_layers)
    return found


def expert_loads(batches: Sequence[RoutedBatch], num_experts: int) -> Tensor:
    """[E] int64: entries of each expert in all of the batches."""
    entries = torch.cat([idx.flatten() for batch in batches for idx in batch.topk_idx])
    return torch.bincount(entries[entries >= 0], minlength=num_experts)


def rank_entries(batch: RoutedBatch, placement: ExpertPlacement) -> Tensor:
    """[R] int64: entries that each rank would compute of a batch that is dealt to these ranks."""
    mapped = [placement.physical_topk(idx, rank).flatten() for rank, idx in enumerate(batch.topk_idx)]
    entries = torch.cat(mapped)
    owners = entries[entries >= 0] // placement.num_local
    return torch.bincount(owners, minlength=placement.num_ranks)


def summary(windows: Sequence[WindowImbalance]) -> tuple[float, float, float] | None:
    """Means over all windows but the first: contiguous, previous, hindsight. None if there is one alone."""
    rows = [(w.contiguous, w.previous, w.hindsight) for w in windows if w.previous is not None]
    if not rows:
        return None
    plain, before, after = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return plain, before, after


def _imbalance(
    by_layer: Sequence[Sequence[RoutedBatch]], placements: Sequence[ExpertPlacement]
) -> tuple[float, Tensor]:
    """The mean imbalance of all batches, and the entries by rank of all together."""
    total, found = torch.zeros(placements[0].num_ranks, dtype=torch.int64, device="cpu"), []
    for batches, placement in zip(by_layer, placements, strict=True):
        for batch in batches:
            entries = rank_entries(batch, placement)
            total += entries
            number = int(entries.sum())
            found.append(int(entries.max()) * len(entries) / number if number else 1.0)
    return sum(found) / len(found), total


def _least(load: Tensor, num_ranks: int, num_redundant: int) -> float:
    total = float(load.sum())
    return least_share(load, num_ranks, num_redundant) * num_ranks / total if total else 1.0
