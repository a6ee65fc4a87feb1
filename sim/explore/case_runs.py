"""Exploration of drawn cases of one kernel, a run each: to the first failure or the end of the budget."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from deepep.sim.explore.explorer import draw_schedule, draw_stop
from deepep.sim.explore.scenarios import RunReport, Stop, ThreadSchedule

Case = TypeVar("Case")


class CaseOfRanks(Protocol):
    """A case in which a rank can stop."""

    @property
    def num_ranks(self) -> int: ...


StoppableCase = TypeVar("StoppableCase", bound=CaseOfRanks)


@dataclass(frozen=True)
class CaseFailure(Generic[Case]):
    """A failure, and all it takes to run it again."""

    case: Case
    schedule: ThreadSchedule
    report: RunReport


@dataclass(frozen=True)
class CaseTally(Generic[Case]):
    """Counts of what an exploration has seen. faults: of the runs, those in which ranks gave up waiting."""

    runs: int
    seconds: float
    failure: CaseFailure[Case] | None
    faults: int = 0


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


def explore_stops(
    draw: Callable[[int], StoppableCase],
    run: Callable[..., RunReport],
    *,
    kernels: Any,
    runs: int | None,
    seconds: float | None,
    progress: Callable[[int], None],
) -> CaseTally[tuple[StoppableCase, tuple[Stop, ...]]]:
    """As `explore_cases`; in every third run a rank stops somewhere.

    run: gets a case, a schedule, `stops` and `kernels`. A failure's case has the stops with it.
    """
    steps, faults = 1000, 0  # of a run in which nobody stopped

    def drawn(number: int) -> tuple[StoppableCase, tuple[Stop, ...]]:
        case = draw(number)
        return case, (draw_stop(number, case.num_ranks, steps),) if number % 3 == 2 else ()

    def run_one(with_stops: tuple[StoppableCase, tuple[Stop, ...]], schedule: ThreadSchedule) -> RunReport:
        nonlocal steps, faults
        case, stops = with_stops
        report = run(case, schedule, stops=stops, kernels=kernels)
        steps = report.steps if not stops else steps
        faults += report.kind == "fault"
        return report

    tally = explore_cases(drawn, run_one, runs=runs, seconds=seconds, progress=progress)
    return replace(tally, faults=faults)
