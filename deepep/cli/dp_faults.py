"""`deepep dp kill`: training goes on without a rank that is killed or frozen at any moment of a step."""

from __future__ import annotations

import statistics
import tempfile
import time

from rich.table import Table

from deepep.cli.terminal import make_console, misused
from deepep.errors import RangeError

NUM_STEPS = 6
TIMEOUT = 5.0
FROZEN = "frozen"
"""The phase's name for a rank that is frozen in place of killed, at a drawn phase."""


def kill(ranks: int, phases: str, times: int, seed: int) -> bool:
    """Trains `times` times for each phase; whether every run went on, in time, with the oracle's weights.
    Phases of exchanges are those of a model with experts.
    """
    from deepep.sim import World
    from deepep.sim.cases.choices import RandomChoices
    from deepep.sim.faults.expert_training import EXPERT_PHASES
    from deepep.sim.faults.fault import Effect
    from deepep.sim.faults.training import MARGIN, PHASES, StepEnd, draw_step_end, judge_steps
    from deepep.sim.rules.checking import Violation
    from deepep.sim.worlds import rank_handle

    allowed = (*PHASES, *EXPERT_PHASES, FROZEN)
    chosen = list(allowed) if phases == "all" else phases.split(",")
    for phase in chosen:
        if phase not in allowed:
            misused(RangeError("phases", repr(phase), f"all, or some of {', '.join(allowed)}"))
    rank_handle.PRELOADED += ["torch._dynamo", "deepep.parallel"]
    console, table = make_console(), Table("killed in", "runs", "went on", "median gap, s", "longest")
    choices = RandomChoices(seed)
    passed = True
    for phase in chosen:
        gaps, most = [], MARGIN + (TIMEOUT if phase == FROZEN else 0.0)
        for _ in range(times):
            end = draw_step_end(choices, ranks, NUM_STEPS, "" if phase == FROZEN else phase)
            if phase == FROZEN:
                end = StepEnd(Effect.STALL, end.rank, end.step, end.phase)
            # One who is frozen with the lock of a store in a file would stop all others.
            store = "tcp" if phase == FROZEN else "file"
            with World(ranks, store=store, timeout=120.0) as world, tempfile.TemporaryDirectory() as folder:
                try:
                    has_experts = end.phase in EXPERT_PHASES
                    gaps.append(judge_steps(world, [end], NUM_STEPS, TIMEOUT, folder, has_experts)[1])
                except Violation as violation:
                    console.print(str(violation), soft_wrap=True)
        went_on = sum(gap <= most for gap in gaps)
        passed = passed and went_on == times
        median, longest = (f"{f(gaps):.2f}" if gaps else "-" for f in (statistics.median, max))
        table.add_row(phase, str(times), str(went_on), median, longest)
    console.print(table)
    console.print(
        f"{ranks} ranks, {NUM_STEPS} steps, seed {seed}, {time.strftime('%Y-%m-%d')}: a run went on if its "
        f"weights are the oracle's, bit for bit, within {MARGIN:g} s (frozen: {TIMEOUT + MARGIN:g} s)"
    )
    return passed
