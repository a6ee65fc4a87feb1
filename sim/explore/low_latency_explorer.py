"""Exploration of the low-latency kernels: scenarios and schedules drawn from seeds, until something fails."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from deepep.sim.cases.case import Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.emulator.low_latency import LowLatencyGpu
from deepep.sim.explore.explorer import draw_schedule, draw_stop
from deepep.sim.explore.low_latency import SPOILS, LowLatencyScenario, run
from deepep.sim.explore.scenarios import RunReport, Stop, ThreadSchedule

LOW_LATENCY_GPUS = (
    LowLatencyGpu(num_blocks=2, num_threads=64),
    LowLatencyGpu(num_blocks=1, num_threads=64),
    LowLatencyGpu(num_blocks=3, num_threads=32),
    LowLatencyGpu(num_blocks=2, num_threads=128),
    LowLatencyGpu(num_blocks=4, num_threads=64),
)

LOW_LATENCY_LIMITS = Limits(
    ranks=(2, 3, 4, 1),
    max_local_experts=3,
    max_topk=6,
    max_tokens=6,
    hidden=(128, 16, 136, 512),
    fixed={
        "mode": "ll",
        "schedule": "sync",
        "skew": "none",
        "stats": False,
        "zero_copy": False,
        "given_out": False,
    },
)


def draw_low_latency(
    seed: int, *, limits: Limits = LOW_LATENCY_LIMITS, num_cases: int | None = None
) -> LowLatencyScenario:
    """One to three cases and how they are launched. A function of its arguments."""
    choices = RandomChoices(seed)
    first = draw_case(choices, limits)
    # Memory is made for one way to sum.
    fixed = {**limits.fixed, "reduce": first.options.reduce}
    same = replace(limits, ranks=(first.num_ranks,), fixed=fixed)
    count = choices.integer(1, 4) if num_cases is None else num_cases
    cases = [first, *(draw_case(choices, same) for _ in range(count - 1))]
    # A rank that was left out has missed epochs and cannot come back: only the last case may have masks.
    cases = [*(replace(case, masked=()) for case in cases[:-1]), cases[-1]]
    hooked = choices.flag()
    gpu = replace(
        LOW_LATENCY_GPUS[choices.integer(0, len(LOW_LATENCY_GPUS) - 1)],
        calls_before=choices.pick((0, 0, 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD)),
        # A launch of both halves needs all its blocks together.
        num_sms=choices.pick((0, 0, 1)) if hooked else 0,
    )
    scenario = LowLatencyScenario(
        cases=tuple(cases),
        gpu=gpu,
        hooked=hooked,
        carries_weights=choices.flag(),
        num_combines=choices.pick((1, 1, 0, 2)),
        spoils=choices.pick(("", "", "", *SPOILS[1:])),
        own_stretches=choices.flag(),
    )
    return replace(scenario, spoils="") if cases[-1].masked else scenario


FAR_LIMITS = replace(LOW_LATENCY_LIMITS, ranks=(4, 3, 2, 5))


def draw_far_low_latency(
    seed: int, *, limits: Limits = FAR_LIMITS, num_cases: int | None = None
) -> LowLatencyScenario:
    """As draw_low_latency, of ranks in domains of one to three, the last of which may be smaller."""
    scenario = draw_low_latency(seed, limits=limits, num_cases=num_cases)
    per_domain = min(RandomChoices(seed).pick((2, 2, 1, 3)), scenario.cases[0].num_ranks - 1)
    return replace(scenario, ranks_per_domain=per_domain)


RAIL_LIMITS = replace(
    LOW_LATENCY_LIMITS,
    ranks=(4, 2, 3, 6),
    masks=0.0,
    fixed={**LOW_LATENCY_LIMITS.fixed, "reduce": "rank", "logfmt": False},
)


def draw_rail_low_latency(
    seed: int, *, limits: Limits = RAIL_LIMITS, num_cases: int | None = None
) -> LowLatencyScenario:
    """The same in two levels: of domains of one size, without hooks and masks."""
    scenario = draw_low_latency(seed, limits=limits, num_cases=num_cases)
    num_ranks = scenario.cases[0].num_ranks
    sizes = [size for size in (2, 1, 3) if num_ranks % size == 0 and size < num_ranks]
    return replace(
        scenario,
        gpu=replace(scenario.gpu, num_sms=0),
        hooked=False,
        ranks_per_domain=RandomChoices(seed).pick(sizes),
        has_gateways=True,
        spoils="" if scenario.spoils == "logfmt" else scenario.spoils,
    )


@dataclass(frozen=True)
class LowLatencyFailure:
    """A failing run, and all it takes to run it again."""

    scenario: LowLatencyScenario
    schedule: ThreadSchedule
    stops: tuple[Stop, ...]
    report: RunReport

    def __str__(self) -> str:
        return f"{self.scenario}\n{self.schedule} {self.stops}\n{self.report.kind}: {self.report.text}"


@dataclass
class LowLatencyTally:
    """Counts of an exploration so far."""

    runs: int = 0
    steps: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    failure: LowLatencyFailure | None = None


def explore_low_latency(
    *,
    first_seed: int = 0,
    runs: int | None = None,
    seconds: float | None = None,
    schedules_per_scenario: int = 2,
    with_stops: bool = False,
    scenarios: Callable[[int], LowLatencyScenario] = draw_low_latency,
    runner: Callable[..., RunReport] = run,
    kernels: Any = None,
) -> LowLatencyTally:
    """Runs drawn scenarios, each under several schedules, to the first failure or the end of the budget.

    with_stops: in every run after a scenario's first, a rank stops somewhere.
    """
    tally = LowLatencyTally()
    begin = time.monotonic()
    for seed in itertools.count(first_seed):
        scenario = scenarios(seed)
        steps = 0
        for i in range(schedules_per_scenario):
            number = seed * schedules_per_scenario + i
            stops: tuple[Stop, ...] = ()
            if with_stops and i > 0:
                stops = (draw_stop(number, scenario.cases[0].num_ranks, steps // i),)
            schedule = draw_schedule(number)
            report = runner(scenario, schedule, stops=stops, kernels=kernels)
            steps += report.steps
            tally.runs += 1
            tally.steps += report.steps
            tally.seconds = time.monotonic() - begin
            tally.kinds[report.kind] += 1
            if report.failed:
                tally.failure = LowLatencyFailure(scenario, schedule, stops, report)
                return tally
            is_over = runs is not None and tally.runs >= runs
            if is_over or (seconds is not None and tally.seconds >= seconds):
                return tally
    raise AssertionError("unreachable: there is always another seed")
