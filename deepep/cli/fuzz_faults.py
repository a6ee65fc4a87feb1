"""`python -m deepep fuzz --faults`: ranks that are killed or frozen at drawn moments."""

from __future__ import annotations

import time
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from deepep.cli.terminal import FAILED, PASSED
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.faults.sudden import STAGES, draw_sudden_end, judge_sudden_end
from deepep.sim.rules.checking import Violation
from deepep.sim.worlds.world import World

TIMEOUT = 2.0
"""Seconds that ranks wait for each other."""


def fuzz_faults(console: Console, ranks: int, seed: int, examples: int | None, minutes: float | None) -> int:
    """Judges `examples` ends of ranks, or as many as there is time for; prints a table, and what was missed.

    Returns the exit status.
    """
    until = None if examples is not None and minutes is None else time.monotonic() + 60.0 * (minutes or 1.0)
    ends: dict[tuple[str, str], list[float]] = defaultdict(list)
    missed = 0
    console.print(f"killing and freezing one of {ranks} ranks, seed {seed}")
    number = 0
    with World(ranks, store="tcp") as world:
        while (examples is None or number < examples) and (until is None or time.monotonic() < until):
            end = draw_sudden_end(RandomChoices(1_000_003 * seed + number), ranks)
            number += 1
            try:
                survivors = judge_sudden_end(world, end, TIMEOUT)
            except Violation as violation:
                missed += 1
                console.print(str(violation), style="red")
                continue
            ends[end.effect.value, end.stage].append(max(survivor.seconds for survivor in survivors))
    table = Table("rank", "in or after", "ends", "longest until the error", box=None)
    for effect in ("kill", "stall"):
        for stage in STAGES:
            seconds = ends[effect, stage]
            longest = f"{max(seconds):.1f} s" if seconds else ""
            table.add_row({"kill": "killed", "stall": "frozen"}[effect], stage, f"{len(seconds)}", longest)
    console.print(table)
    console.print(f"{number} ends, {missed} missed; time-out {TIMEOUT} s")
    return FAILED if missed else PASSED
