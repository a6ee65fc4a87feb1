"""Outages: what of its work a run keeps when ranks die, by events. Pure.

E is the share of a window that begins with a death: samples that count in it, over those that all ranks
would have had counted in as long. A share f of the ranks that dies at once, in a run that goes on without
them after a gap G, leaves E = (1 - f) (1 - G / W). A run that begins anew from a checkpoint loses the time of
that, and of the steps since, and has all its ranks again.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

DRAWS = 500
"""Runs that a mean is over."""


@dataclass(frozen=True)
class OutageCosts:
    """Times that are measured, in seconds.

    num_ranks: of the run. step_seconds: a step's. gap_seconds: by which the step of a death takes longer
    where the others go on; restart_seconds: until all ranks are at work again from a checkpoint, made every
    checkpoint_steps steps, not counting the steps since that are made again.
    """

    num_ranks: int
    step_seconds: float
    gap_seconds: float
    restart_seconds: float
    checkpoint_steps: int

    def save(self, path: str | Path) -> None:
        """Writes them to a file, as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")


MEASURED = OutageCosts(20, 2.144, 0.36, 35.7, 8)
"""By `python -m deepep dp efficiency`, 2026-12-01 (docs/parallel.md)."""


def load_costs(path: str | Path) -> OutageCosts:
    """Costs from a file. Raises OSError, ValueError."""
    found = json.loads(Path(path).read_text())
    names = [field.name for field in fields(OutageCosts)]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise ValueError(f"{path}: got {found!r}; allowed: {', '.join(names)}")
    return OutageCosts(**found)


@dataclass(frozen=True)
class Death:
    """`ranks` ranks that die at once, `time` seconds after the window's begin."""

    time: float
    ranks: int


def spread_deaths(ranks: int, events: int, window: float) -> list[Death]:
    """As many ranks in as many events, in equal parts of a window, the first at its begin."""
    ends = [ranks * (i + 1) // events for i in range(events)]
    return [
        Death(window * i / events, end - begin)
        for i, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]


def share_going_on(
    costs: OutageCosts, num_ranks: int, deaths: Sequence[Death], window: float, done: float = 0.0
) -> float:
    """E where the others go on: a step in which ranks die takes a gap longer, and is theirs alone.

    done: seconds of its step that have passed at the window's begin, and do not count; of the last step what
    is done of it does.
    """
    alive, counted, recovered = num_ranks, 0.0, 0.0
    pending = sorted(deaths, key=lambda death: death.time)
    end, part = costs.step_seconds - done, 1 - done / costs.step_seconds
    while True:
        if pending and pending[0].time < min(end, window):
            death = pending.pop(0)
            alive -= death.ranks
            # Of a death while another is being settled: that begins anew.
            end += death.time + costs.gap_seconds - max(death.time, recovered)
            recovered = death.time + costs.gap_seconds
        elif end <= window:
            counted += alive * part
            end, part = end + costs.step_seconds, 1.0
        else:
            counted += alive * _done_of_last(costs, end, window)
            return counted / (num_ranks * window / costs.step_seconds)


def share_restarting(
    costs: OutageCosts, deaths: Sequence[Death], window: float, done: float = 0.0, since: int = 0
) -> float:
    """E where all begin anew, as many as there were, from the last checkpoint.

    done: as of `share_going_on`; since: steps since a checkpoint at the window's begin.
    """
    step, most = 0, done / costs.step_seconds  # of the window: where the run is, and how far it has been
    first, pending = most, sorted(deaths, key=lambda death: death.time)
    end = costs.step_seconds - done
    while True:
        if pending and pending[0].time < min(end, window):
            death = pending.pop(0)
            step -= (since + step) % costs.checkpoint_steps
            end = death.time + costs.restart_seconds + costs.step_seconds
        elif end <= window:
            step += 1
            most = max(most, step)
            end += costs.step_seconds
        else:
            most = max(most, step + _done_of_last(costs, end, window))
            return (most - first) / (window / costs.step_seconds)


def _done_of_last(costs: OutageCosts, end: float, window: float) -> float:
    return max(0.0, 1 - (end - window) / costs.step_seconds)


def mean_share_going_on(costs: OutageCosts, num_ranks: int, deaths: Sequence[Death], window: float) -> float:
    """The mean of E over the moments of a step at which ranks die."""
    return statistics.fmean(
        share_going_on(costs, num_ranks, moved, window, done) for done, _, moved in _moments(costs, deaths)
    )


def mean_share_restarting(costs: OutageCosts, deaths: Sequence[Death], window: float) -> float:
    """The same, and over the steps since a checkpoint."""
    return statistics.fmean(
        share_restarting(costs, moved, window, done, since) for done, since, moved in _moments(costs, deaths)
    )


def _moments(costs: OutageCosts, deaths: Sequence[Death]) -> Iterator[tuple[float, int, list[Death]]]:
    """Seconds of a step done, and steps since a checkpoint, where the first ranks die; the deaths, of which
    the later ones are moved by up to half the time between checkpoints.
    """
    draws, apart = random.Random(0), costs.checkpoint_steps * costs.step_seconds
    for _ in range(DRAWS):
        moved = [replace(d, time=max(0.0, d.time + draws.uniform(-0.5, 0.5) * apart)) for d in deaths[1:]]
        yield (
            draws.uniform(0.0, costs.step_seconds),
            draws.randrange(costs.checkpoint_steps),
            [*deaths[:1], *moved],
        )
