"""Exploration: scenarios and schedules drawn from seeds, until something fails or the time is up."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from deepep.sim.cases.case import Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.emulator.shapes import GPUS, STRATEGIES, TWO_LEVEL_GPUS
from deepep.sim.explore.emulated import run
from deepep.sim.explore.failures import Failure
from deepep.sim.explore.scenarios import RunReport, Scenario, Stop, ThreadSchedule

LIMITS = Limits(
    ranks=(2, 3, 4, 1),
    max_local_experts=4,
    max_topk=6,
    max_tokens=8,
    hidden=(128, 16, 136, 512),
    fixed={"mode": "ht", "schedule": "sync"},
)


def draw_scenario(seed: int, *, limits: Limits = LIMITS, num_cases: int | None = None) -> Scenario:
    """One to three cases, a GPU shape, and whether layout and barrier kernels run as well.

    A function of the seed alone, but for the limits.
    """
    choices = RandomChoices(seed)
    first = draw_case(choices, limits)
    same = replace(limits, ranks=(first.num_ranks,))
    count = choices.integer(1, 3) if num_cases is None else num_cases
    cases = [first, *(draw_case(choices, same) for _ in range(count - 1))]
    # A rank that was left out has missed epochs and cannot come back: only the last case may have masks.
    cases = [*(replace(case, masked=()) for case in cases[:-1]), cases[-1]]
    scenario = Scenario(
        cases=tuple(cases),
        gpu=replace(
            GPUS[choices.integer(0, len(GPUS) - 1)],
            calls_before=choices.pick((0, 0, 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD)),
            alone_tokens=choices.pick((0, 64)),
        ),
        use_layout=choices.pick(("no", "yes", "inside", "inside")),
        use_barrier=choices.flag(),
        short_slots=choices.flag(0.3),
        num_combines=choices.pick((1, 1, 0, 2, 3)),
        refuses=choices.pick(("", "", "", "dispatch", "combine")),
        expands=choices.pick(("", "", "rows", "weighted")),
    )
    # Ranks that are masked get new memory, which these do not: nobody waits here for what a rank that was
    # left out has under way of a combine that was refused.
    is_out = bool(cases[-1].masked) and scenario.refuses == "combine"
    return replace(scenario, refuses="") if is_out else scenario


def draw_tall_scenario(seed: int) -> Scenario:
    """One case of many short rows, more than a block has threads. Every third for the layout alone."""
    choices = RandomChoices(seed)
    limits = replace(LIMITS, max_tokens=200, max_topk=3, max_local_experts=3, hidden=(16,), masks=False)
    return Scenario(
        cases=(draw_case(choices, limits),),
        gpu=GPUS[choices.integer(0, len(GPUS) - 1)],
        use_layout=("only", "no", "inside")[seed % 3],
    )


TWO_LEVEL_LIMITS = replace(
    LIMITS,
    ranks=(4, 3, 4, 5),
    max_local_experts=2,
    max_topk=4,
    max_tokens=60,
    hidden=(16, 128),
    masks=0.15,
    fixed={**LIMITS.fixed, "reduce": "domain"},
)


def draw_two_level_scenario(seed: int, *, limits: Limits = TWO_LEVEL_LIMITS) -> Scenario:
    """One or two cases of ranks in domains of one to three, the last of which may be smaller.

    Mostly there are several windows. A rank is masked in a single case alone, from its dispatch on: another
    mask needs other memory.
    """
    choices = RandomChoices(seed)
    per_domain = choices.pick((2, 2, 2, 1, 3))
    limits = replace(limits, fixed={**limits.fixed, "ranks_per_node": per_domain, "mask_at": "dispatch"})
    first = draw_case(choices, limits)
    if per_domain >= first.num_ranks:
        first = first.with_options(ranks_per_node=per_domain - 1)
    per_domain = first.options.ranks_per_node
    same = {**limits.fixed, "ranks_per_node": per_domain}
    count = 1 if first.masked else choices.integer(1, 2)
    later = replace(limits, ranks=(first.num_ranks,), masks=0.0, fixed=same)
    cases = [first, *(draw_case(choices, later) for _ in range(count - 1))]
    return Scenario(
        cases=tuple(cases),
        gpu=replace(
            TWO_LEVEL_GPUS[choices.integer(0, len(TWO_LEVEL_GPUS) - 1)],
            calls_before=choices.pick((0, 0, 0xFFFFFFFF, 0xFFFFFFFE)),
            window=choices.pick((16, 16, 32)),
        ),
        use_layout=choices.pick(("no", "no", "yes")),
        short_slots=choices.flag(0.2),
        num_combines=choices.pick((1, 1, 0, 2)),
        between_domains=True,
    )


def draw_schedule(seed: int) -> ThreadSchedule:
    """The strategies take turns."""
    return ThreadSchedule(STRATEGIES[seed % len(STRATEGIES)], seed)


def draw_stop(seed: int, num_ranks: int, steps: int) -> Stop:
    """A rank, or a copy engine, which counts as one, that stops somewhere in a run of `steps`: for good, or
    for longer than its peers' patience.
    """
    choices = RandomChoices(seed)
    counts_writes = choices.flag()
    return Stop(
        rank=choices.integer(0, num_ranks - 1),
        # A rank makes some hundred ordered writes in a run, most of them small numbers apart.
        at=choices.integer(1, 400 if counts_writes else max(1, steps)),
        counts_writes=counts_writes,
        pause_seconds=choices.pick((0.0, 0.0, 1.5)),
        loses_writes=choices.flag(),
    )


@dataclass
class Tally:
    """Counts of what an exploration has seen so far."""

    runs: int = 0
    steps: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    failure: Failure | None = None

    def add(self, report: RunReport, seconds: float) -> None:
        self.runs += 1
        self.steps += report.steps
        self.seconds = seconds
        self.kinds[report.kind] += 1


def explore(
    *,
    first_seed: int = 0,
    stride: int = 1,
    seconds: float | None = None,
    runs: int | None = None,
    schedules_per_scenario: int = 3,
    with_stops: bool = False,
    scenarios: Callable[[int], Scenario] = draw_scenario,
    kernels: Any = None,
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Runs drawn scenarios, each under several schedules, to the first failure or the end of the budget.

    Scenarios are drawn from first_seed, first_seed + stride, ...; schedules from numbers of their own.
    with_stops: in every run after a scenario's first, a rank stops somewhere.
    """
    tally = Tally()
    begin = time.monotonic()
    for seed in itertools.count(first_seed, stride):
        scenario = scenarios(seed)
        steps = 0
        for i in range(schedules_per_scenario):
            number = seed * schedules_per_scenario + i
            stops: tuple[Stop, ...] = ()
            if with_stops and i > 0:
                actors = scenario.gpu.num_actors(scenario.cases[0].num_ranks)
                stops = (draw_stop(number, actors, steps // i),)
            schedule = draw_schedule(number)
            report = run(scenario, schedule, stops=stops, kernels=kernels)
            steps += report.steps
            tally.add(report, time.monotonic() - begin)
            if report.failed:
                tally.failure = Failure(scenario, schedule, stops, report)
                return tally
            if progress is not None:
                progress(tally)
            is_over = runs is not None and tally.runs >= runs
            if is_over or (seconds is not None and tally.seconds >= seconds):
                return tally
    raise AssertionError("unreachable: there is always another seed")
