"""Inputs and outcome of an exploration: scenarios, schedules, ranks that stop, and a run's report."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from deepep.sim.cases.case import Case
from deepep.sim.emulator.calls import Gpu, KernelFault
from deepep.sim.emulator.shapes import STRATEGIES
from deepep.sim.explore import expanded_rows
from deepep.sim.rules import oracle
from deepep.sim.rules.observed import RankView


@dataclass(frozen=True)
class ThreadSchedule:
    """Every choice of a run: which thread goes next, how late each write arrives.

    strategy: one of STRATEGIES. expected_steps: over how many steps PCT spreads its changes of priority.
    """

    strategy: str = "random"
    seed: int = 0
    expected_steps: int = 50000

    def __str__(self) -> str:
        return f"{self.strategy}:{self.seed}:{self.expected_steps}"

    @staticmethod
    def parse(text: str) -> ThreadSchedule:
        """Reads what `str` wrote. Raises ValueError for anything else."""
        strategy, seed, steps = text.split(":")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {strategy}; allowed: {', '.join(STRATEGIES)}")
        return ThreadSchedule(strategy, int(seed), int(steps))


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
    """Cases to run: of equally many ranks, in order, on GPUs of one shape.

    use_layout: "yes": the layout kernel makes what dispatch is given, "no": the host; "only": nothing else;
    "inside": a dispatch that sends top-k finds it out itself.
    use_barrier: a barrier after each case, behind which every rank reads what the others wrote before it.
    short_slots: slots have room for one row less than comes, where the host waits for the counts: ranks
    learn of it with the counts, and acquire anew.
    num_combines: how often each case's combine is run, from the one handle.
    refuses: "dispatch" or "combine": before each of these a rank refuses one, in turn, and all learn of it.
    between_domains: domains are the cases'; else all ranks share one, whatever the cases say.
    expands: "rows": combines are of expanded rows; "weighted": of each times a factor; "": as received.
    """

    cases: tuple[Case, ...]
    gpu: Gpu = field(default_factory=Gpu)
    use_layout: str = "no"
    use_barrier: bool = False
    short_slots: bool = False
    num_combines: int = 1
    refuses: str = ""
    between_domains: bool = False
    expands: str = ""

    @property
    def ranks_per_domain(self) -> int:
        """P, the same of all cases."""
        first = self.cases[0]
        return first.options.ranks_per_node if self.between_domains else first.num_ranks

    @cached_property
    def expected(self) -> list[list[RankView]]:
        """The oracle's results, by case and rank."""
        sums = "domain" if self.between_domains else "rank"
        cases = [case.with_options(reduce=sums) for case in self.cases]
        views = [oracle.observe(case) for case in cases]
        if self.expands:
            for case, of_case in zip(cases, views, strict=True):
                expanded_rows.expect(case, of_case, weighted=self.expands == "weighted")
        return views


@dataclass
class RunReport:
    """The outcome of a run.

    kind: "ok", "fault" (ranks gave up waiting, as they should after a stop), "masked" (they went on without
    the one that stopped), or what failed: "wrong result",
    "needless fault", "unfinished", "stream that waits indefinitely", or a kind of the machine's ("data race",
    "deadlock", ...). text tells the story. faults: by rank, the fault record of the ranks that gave up. now:
    simulated seconds.
    """

    kind: str = "ok"
    text: str = ""
    steps: int = 0
    switches: int = 0
    now: float = 0.0
    faults: dict[int, KernelFault] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.kind not in ("ok", "fault", "masked")
