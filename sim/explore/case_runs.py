"""Exploration of drawn cases of one kernel, a run each: to the first failure or the end of the budget."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.scenarios import RunReport, ThreadSchedule

Case = TypeVar("Case")


@dataclass(frozen=True)
class CaseFailure(Generic[Case]):
    """A failure, and all it takes to run it again."""

    case: Case
    schedule: ThreadSchedule
    report: RunReport


@dataclass(frozen=True)
class CaseTally(Generic[Case]):
    """Counts of what an exploration has seen."""

    runs: int
    seconds: float
    failure: CaseFailure[Case] | None


def explore_cases(
    draw: Callable[[int], Case],
    run: Callable[[Case, ThreadSchedule], RunReport],
    *,
    runs: int | None,
    seconds: float | None,
    progress: Callable[[int], None],
) -> CaseTally[Case]:
    """Runs the cases that `draw` makes of 0, 1, ... `progress` is called with each run's number before it."""
    begin = time.monotonic()
    for number in itertools.count():
        progress(number)
        case, schedule = draw(number), draw_schedule(number)
        report = run(case, schedule)
        took = time.monotonic() - begin
        if report.failed:
            return CaseTally(number + 1, took, CaseFailure(case, schedule, report))
        is_over = runs is not None and number + 1 >= runs
        if is_over or (seconds is not None and took >= seconds):
            return CaseTally(number + 1, took, None)
    raise AssertionError("unreachable: there is always another case")
