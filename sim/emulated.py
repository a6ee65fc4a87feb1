"""The kernels on the CPU: whole operations on an emulated machine, under one schedule, against the oracle.

`run` executes a scenario: layout, dispatch, combine and barrier of one or more cases, one after the other,
on all ranks. Every rank is a program of its own: nothing but the kernels' own protocol keeps the ranks in
step, so one may be an operation ahead of another, as on hardware. docs/emulator.md says what is modelled.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from deepep import _emulator
from deepep.sim import oracle
from deepep.sim.cases import Case
from deepep.sim.emulated_domain import EmulatedDomain, Fault, Gpu, HostCounts, Layout, Plan
from deepep.sim.observed import Array, RankView, first_difference
from deepep.sim.values import inputs

STRATEGIES = ("random", "pct", "starve")


@dataclass(frozen=True)
class Schedule:
    """Every choice of a run: which thread goes next, how late each write arrives.

    strategy: one of STRATEGIES. expected_steps: over how many steps PCT spreads its changes of priority.
    """

    strategy: str = "random"
    seed: int = 0
    expected_steps: int = 50000

    def __str__(self) -> str:
        return f"{self.strategy}:{self.seed}:{self.expected_steps}"

    @staticmethod
    def parse(text: str) -> Schedule:
        """Reads what `str` wrote. Raises ValueError for anything else."""
        strategy, seed, steps = text.split(":")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {strategy}; allowed: {', '.join(STRATEGIES)}")
        return Schedule(strategy, int(seed), int(steps))


@dataclass(frozen=True)
class Stop:
    """A rank stops at a step of the schedule: for good, or for `pause_seconds` of simulated time.

    counts_writes: `at` counts the rank's ordered writes instead: all places where its peers can tell.
    loses_writes: if it stops for good, what it wrote and nobody has seen by then never arrives.
    """

    rank: int
    at: int
    counts_writes: bool = False
    pause_seconds: float = 0.0
    loses_writes: bool = False


@dataclass(frozen=True)
class Scenario:
    """What is run: cases of equally many ranks, in order, on GPUs of one shape.

    use_layout: "yes": the layout kernel makes what dispatch is given, "no": the host; "only": nothing else.
    use_barrier: a barrier after each case, behind which every rank reads what the others wrote before it.
    short_slots: ranks lend slots with room for one row less than comes, where the host waits for the counts,
    hear of it with the counts, and lend anew.
    num_combines: how often each case's combine is run, from the one handle.
    """

    cases: tuple[Case, ...]
    gpu: Gpu = field(default_factory=Gpu)
    use_layout: str = "no"
    use_barrier: bool = False
    short_slots: bool = False
    num_combines: int = 1

    @cached_property
    def expected(self) -> list[list[RankView]]:
        """The oracle's results, by case and rank."""
        return [oracle.observe(case) for case in self.cases]


@dataclass
class Report:
    """What a run came to.

    kind: "ok", "fault" (ranks gave up waiting, as they should after a stop), or what failed: "wrong result",
    "needless fault", "unfinished", or a kind of the machine's ("data race", "deadlock", ...). text tells the
    story. faults: by rank, the fault record of the ranks that gave up. now: simulated seconds.
    """

    kind: str = "ok"
    text: str = ""
    steps: int = 0
    switches: int = 0
    now: float = 0.0
    faults: dict[int, Fault] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.kind not in ("ok", "fault")


class _WrongResult(Exception):
    """An operation finished with other bits than the oracle's."""


class _GaveUp(Exception):
    """A rank found a fault record after an operation."""


#: What a rank's host does; it yields what it waits for: its stream to be empty, or its watch to end.
Program = Generator[str, None, None]


def run(
    scenario: Scenario,
    schedule: Schedule,
    *,
    stops: Sequence[Stop] = (),
    kernels: Any = None,
    max_steps: int = 5_000_000,
) -> Report:
    """Runs the scenario and judges every rank's results.

    kernels: what `_emulator.load_kernels` gave; default the product's own. max_steps: more is a livelock.
    """
    return _Run(scenario, schedule, stops, kernels or _emulator.own_kernels(), max_steps).run()


class _Run:
    def __init__(
        self, scenario: Scenario, schedule: Schedule, stops: Sequence[Stop], kernels: Any, max_steps: int
    ) -> None:
        self.scenario = scenario
        self.stops = stops
        self.num_ranks = scenario.cases[0].num_ranks
        gpu = scenario.gpu
        machine = _emulator.Machine(
            num_ranks=self.num_ranks,
            max_blocks=gpu.num_blocks,
            max_threads=gpu.num_threads,
            num_sms=gpu.num_sms,
            strategy=schedule.strategy,
            seed=schedule.seed,
            expected_steps=schedule.expected_steps,
            max_steps=max_steps,
            faults=[
                (s.rank, s.at, s.counts_writes, int(s.pause_seconds * 1e9), s.loses_writes) for s in stops
            ],
        )
        self.machine = machine
        self.domain = EmulatedDomain(machine, scenario.cases, gpu, kernels)
        self.watched: Any = None  # outcome of the watch that ended last
        self.report = Report()
        self.programs: dict[int, Program] = {}

    def run(self) -> Report:
        report = self.report
        self.programs = {rank: self._program(rank) for rank in range(self.num_ranks)}
        try:
            for rank in range(self.num_ranks):
                self._advance(rank)
            while True:
                outcome = self.machine.run()
                report.steps, report.switches = outcome.steps, outcome.switches
                report.now = outcome.now_ns * 1e-9
                if outcome.status == "failed":
                    report.kind, report.text = outcome.kind, outcome.text
                    return report
                if outcome.status == "done":
                    break
                self.watched = outcome
                self._advance(outcome.rank)
        except _WrongResult as error:
            report.kind, report.text = "wrong result", str(error)
        except _emulator.HostFailure as error:
            report.kind, _, report.text = str(error).partition("\n")
        else:
            self._judge_faults()
        return report

    def _advance(self, rank: int) -> None:
        """Runs a rank's program to its next wait, or to its end."""
        try:
            waits_for = next(self.programs[rank])
        except (StopIteration, _GaveUp):
            del self.programs[rank]
        else:
            if waits_for == "stream":
                self.machine.host_step(rank)

    def _judge_faults(self) -> None:
        """Whoever gave up must have had a stopped rank to wait for; all others must have finished."""
        report = self.report
        unfinished = set(self.programs) - {stop.rank for stop in self.stops if stop.pause_seconds == 0}
        if unfinished:
            report.kind = "unfinished"
            report.text = f"ranks {sorted(unfinished)} neither finished nor gave up"
        elif report.faults and not self.stops:
            report.kind, report.text = "needless fault", str(report.faults)
        elif report.faults:
            report.kind = "fault"

    # ---- one rank's program --------------------------------------------------------------------------------

    def _program(self, rank: int) -> Program:
        for index, case in enumerate(self.scenario.cases):
            if rank in case.masked_at_dispatch:
                continue
            if self.scenario.use_layout == "only":
                yield from self._lay_out(rank, index, case)
            else:
                yield from self._round_trip(rank, index, case)
            if self.scenario.use_barrier and not case.masked:
                self.domain.barrier(rank, index)
                yield from self._settle(rank)
                self.domain.read_marks(rank, index)

    def _round_trip(self, rank: int, index: int, case: Case) -> Program:
        domain = self.domain
        if self.scenario.use_layout == "yes":
            layout = yield from self._lay_out(rank, index, case)
        else:
            layout = domain.given_layout(rank, self.scenario.expected[index][rank])
        plan = domain.new_plan(rank, case)
        slot, rows = yield from self._dispatch(rank, index, case, layout, plan)
        if case.options.cached:
            again = inputs(case, rank, again=True)
            slot_again = domain.dispatch(rank, case, again, layout, plan, cached=True)
            yield from self._settle(rank)
            view = RankView()
            domain.take_rows(rank, case, slot_again, rows, view)
            self._judge(rank, index, RankView(again_x=view.recv_x, again_scales=view.recv_scales))
        if rank in case.masked:
            return
        for _ in range(self.scenario.num_combines):
            outputs = domain.combine(rank, case, inputs(case, rank), plan, slot, rows)
            yield from self._settle(rank)
            view = RankView()
            domain.take_sums(rank, case, outputs, view)
            self._judge(rank, index, view)

    def _lay_out(self, rank: int, index: int, case: Case) -> Generator[str, None, Layout]:
        layout = self.domain.layout(rank, case, inputs(case, rank))
        yield "stream"
        view = RankView()
        self.domain.take_layout(rank, case, layout, view)
        self._judge(rank, index, view)
        return layout

    def _dispatch(
        self, rank: int, index: int, case: Case, layout: Layout, plan: Plan
    ) -> Generator[str, None, tuple[int, int]]:
        """Returns the slot's address and the number of rows in it."""
        domain = self.domain
        given = inputs(case, rank)
        expected = [view.recv_x for view in self.scenario.expected[index]]
        rows = len(_given(expected[rank]))
        most_rows = max(len(x) for x in expected if x is not None)
        waits = case.options.worst == "off"
        view = RankView()
        if waits and self.scenario.short_slots and most_rows > 1:
            domain.dispatch(rank, case, given, layout, plan, cached=False, capacity=most_rows - 1)
            told = yield from self._hear(rank)
            yield from self._settle(rank)
            if (told.phase, told.most_rows) != (_emulator.TOO_MANY_ROWS, most_rows):
                raise _WrongResult(f"rank {rank}: short slots: the host was told {told}")
        slot = domain.dispatch(rank, case, given, layout, plan, cached=False)
        if waits:
            # The host allocates by what it hears while the kernel runs.
            told = yield from self._hear(rank)
            if told.phase == 0:
                unit = case.options.expert_alignment
                view.num_rows, view.expert_counts = told.num_rows, -(-told.per_expert // unit) * unit
        else:
            view.num_rows = oracle.worst_tokens(case)
            view.expert_counts = np.zeros(0, dtype=np.int64)
        yield from self._settle(rank)
        if view.num_rows is None:
            raise _WrongResult(f"rank {rank}: the host was told {told}, and there is no fault record")
        domain.take_rows(rank, case, slot, rows, view)
        self._judge(rank, index, view)
        return slot, rows

    def _hear(self, rank: int) -> Generator[str, None, HostCounts]:
        """Waits for what a dispatch tells the host."""
        yield "watch"
        if not self.watched.in_time:
            raise _WrongResult(f"rank {rank}: the host was told nothing")
        return self.domain.host_counts(self.watched.words)

    def _settle(self, rank: int) -> Program:
        """Waits for the stream; where faults are to be expected, looks for one while the kernel runs, too."""
        told = None
        if self.stops:
            self.domain.watch_fault(rank)
            yield "watch"
            if self.watched.in_time:
                told = self.domain.take_fault(rank, watched=True)
        yield "stream"
        fault = self.domain.take_fault(rank, watched=False)
        if fault != told and told is not None:
            raise _WrongResult(f"rank {rank}: a fault record that changed: {told}, then {fault}")
        if fault is not None:
            self.report.faults[rank] = fault
            raise _GaveUp

    def _judge(self, rank: int, index: int, view: RankView) -> None:
        views = [view if r == rank else RankView() for r in range(self.num_ranks)]
        difference = first_difference(self.scenario.expected[index], views)
        if difference is not None:
            raise _WrongResult(f"case {index}: {difference}")


def _given(array: Array | None) -> Array:
    assert array is not None
    return array
