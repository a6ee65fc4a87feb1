"""`deepep dp handover`: ranks join a training with experts, and newcomers or members die at each moment."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from deepep.cli.terminal import make_console

if TYPE_CHECKING:
    from deepep.sim.faults.joining import Run

STEPS, TIMEOUT = 7, 20.0


def hand_overs() -> bool:
    """Runs each moment once; True if in all of them every rank ended with the oracle's weights."""
    from deepep.sim import World
    from deepep.sim.faults.expert_joining import judge_expert_joins
    from deepep.sim.rules.checking import Violation
    from deepep.sim.worlds import rank_handle

    rank_handle.PRELOADED += ["torch._dynamo", "deepep.parallel"]
    console, table, passed = make_console(), Table("who dies, and when", "went on", "s"), True
    for name, run in _runs():
        started = time.monotonic()
        with (
            World(run.num_ranks, timeout=120.0) as world,
            World(len(run.joins), timeout=120.0) as newcomers,
            tempfile.TemporaryDirectory() as run.folder,
        ):
            try:
                judge_expert_joins(world, newcomers, run)
                word = "yes"
            except Violation as violation:
                console.print(str(violation), soft_wrap=True)
                word, passed = "no", False
        table.add_row(name, word, f"{time.monotonic() - started:.1f}")
    console.print(table)
    console.print(
        "a run went on if all weights are those of one process whose experts never moved, bit for bit"
    )
    return passed


def _runs() -> Sequence[tuple[str, Run]]:
    """Deaths of a newcomer, after which another comes; of a member; and two that come one after the other."""
    from deepep.sim.faults.expert_joining import EXPERT_DEATHS, HAND_OVERS
    from deepep.sim.faults.fault import Effect
    from deepep.sim.faults.joining import Join, Run
    from deepep.sim.faults.training import StepEnd

    def killed(rank: int, step: int = 1, phase: str = "sum") -> StepEnd:
        return StepEnd(Effect.KILL, rank, step, phase)

    def run(num_ranks: int, ends: list[StepEnd], joins: list[Join]) -> Run:
        return Run(STEPS, ends, joins, TIMEOUT, "", num_ranks)

    found = [(f"newcomer, {d}", run(3, [killed(0)], [Join(0, 2, d), Join(0, 4)])) for d in EXPERT_DEATHS]
    found += [(f"member, {p}", run(4, [killed(1), killed(3, 3, p)], [Join(1, 2)])) for p in HAND_OVERS]
    two = [killed(1), killed(2, 2, "forward")]
    return [*found, ("nobody; two come back", run(5, two, [Join(1, 3), Join(2, 4)]))]
