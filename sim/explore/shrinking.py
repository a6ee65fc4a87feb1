"""Low-latency kernels that mask a rank which stops, on the emulated machine, against the oracle.

Each rank has its own mask, and right is the oracle with that mask: whatever a rank that stops has still sent,
to some and not to others. Nobody else is masked, and nobody else gives up; a rank that stops for a while may
find its own kernel late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deepep import _emulator
from deepep.sim.cases.case import Case, Limits
from deepep.sim.cases.values import inputs
from deepep.sim.explore.low_latency import (
    LowLatencyRun,
    LowLatencyScenario,
    Program,
    WrongBits,
    call_of,
    cast_of,
    rows_of,
)
from deepep.sim.explore.low_latency_explorer import LOW_LATENCY_LIMITS, draw_low_latency
from deepep.sim.explore.scenarios import RunReport, Stop, ThreadSchedule
from deepep.sim.rules import oracle
from deepep.sim.rules.observed import RankView, bits, fill_low_latency, first_difference


@dataclass(frozen=True)
class _Views:
    """The oracle's results of one case, by mask."""

    case: Case
    by_mask: dict[tuple[int, ...], list[RankView]] = field(default_factory=dict)

    def without(self, masked: tuple[int, ...]) -> list[RankView]:
        if masked not in self.by_mask:
            case = replace(self.case.with_options(mask_at="dispatch"), masked=masked)
            self.by_mask[masked] = oracle.observe(case)
        return self.by_mask[masked]


def draw_shrinking(seed: int, *, limits: Limits = LOW_LATENCY_LIMITS) -> LowLatencyScenario:
    """Two cases or more, of kernels that may mask. A function of its arguments. FP8 rows are not combined:
    what the oracle would combine then depends on their places, and so on all ranks' masks.
    """
    scenario = draw_low_latency(seed, limits=limits, num_cases=2 + seed % 2)
    drawn = [replace(case, masked=()) for case in scenario.cases]
    if seed % 4:
        cases = [case.with_options(low_latency="bf16", combine_rows="same") for case in drawn]
        scenario = replace(scenario, num_combines=max(1, scenario.num_combines))
    else:
        cases, scenario = drawn, replace(scenario, num_combines=0)
    gpu = replace(scenario.gpu, shrinks=True, num_sms=0)
    return replace(scenario, cases=tuple(cases), gpu=gpu, spoils="", own_stretches=True)


def run_shrinking(
    scenario: LowLatencyScenario,
    schedule: ThreadSchedule,
    *,
    stops: Sequence[Stop] = (),
    kernels: Any = None,
    max_steps: int = 5_000_000,
) -> RunReport:
    """Runs the scenario and judges every rank's results and masks. kernels: default the product's own."""
    return _ShrinkingRun(scenario, schedule, stops, kernels or _emulator.own_kernels(), max_steps).run()


class _ShrinkingRun(LowLatencyRun):
    def _program(self, rank: int) -> Program:
        self.domain.measure_waits(rank)
        for case in self.scenario.cases:
            yield from self._masked_trip(rank, _Views(case))
        self._judge_mask(rank)

    def _masked_trip(self, rank: int, views: _Views) -> Program:
        domain, case = self.domain, views.case
        given = inputs(case, rank)
        call = call_of(case, given, carries_weights=self.scenario.carries_weights)
        cast = cast_of(case)
        handle = domain.new_handle(rank, call)
        args, received = domain.dispatch(rank, call, cast, given.tokens, handle)
        yield from self._carry_out(rank, lambda halves: domain.launch_dispatch(rank, args, halves))
        view = RankView()
        fill_low_latency(view, *domain.read_results(rank, call, cast, received))
        expected = views.without(domain.masked(rank))[rank]
        self._compare(rank, case, expected, view)
        rows = rows_of(case, rank, expected)
        for _ in range(self.scenario.num_combines):
            combine_args, out = domain.combine(rank, call, rows, handle)
            yield from self._combine(rank, combine_args)
            x = domain.read(rank, out, torch.bfloat16, (call.topk_idx.shape[0], case.hidden))
            expected = views.without(domain.masked(rank))[rank]
            self._compare(rank, case, expected, RankView(combined_x=bits(x)))

    def _compare(self, rank: int, case: Case, expected: RankView, got: RankView) -> None:
        difference = first_difference([expected], [got])
        if difference is not None:
            raise WrongBits(f"rank {rank}, masked {self.domain.masked(rank)}, {case}: {difference}")

    def _judge_mask(self, rank: int) -> None:
        stopped = {stop.rank for stop in self.stops}
        masked = set(self.domain.masked(rank))
        if masked:
            self.report.kind = "masked"
        if rank not in stopped and masked - stopped:
            raise WrongBits(f"rank {rank} masked {sorted(masked)}, but only {sorted(stopped)} stopped")

    def _judge_faults(self) -> None:
        kind = self.report.kind
        super()._judge_faults()
        if self.report.kind == "fault":
            self.report.kind = kind
        needless = set(self.report.faults) - {stop.rank for stop in self.stops}
        if needless and not self.report.failed:
            self.report.kind, self.report.text = "needless fault", str(self.report.faults)
