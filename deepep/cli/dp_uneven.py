"""`deepep dp uneven`: ranks of several speeds, which share steps by what is measured."""

from __future__ import annotations

import os
import statistics
import time

from rich.table import Table

from deepep.cli.terminal import make_console

SLOWNESS = (1.0, 1.0, 1.0, 3.0)
"""Time that each rank takes for a sample, in proportion."""
SECONDS, BATCH = 0.02, 100
"""Of the fastest rank for a sample; samples of a step."""
LEAST = 0.9
"""Of what the ranks could do together."""


def uneven(steps: int) -> bool:
    """Samples a second against what the ranks could do together; True if they reach `LEAST` of it."""
    from deepep.sim import World
    from deepep.sim.faults.uneven import take_steps

    with World(len(SLOWNESS), timeout=1200.0) as world:
        found = world.run(take_steps, SLOWNESS, SECONDS, BATCH, steps)[0]
    ideal = sum(1 / slow for slow in SLOWNESS)
    table = Table(
        "", "samples of each rank", "median step, ms", "samples/s, of the fastest rank's", "of ideal"
    )
    even, share = [BATCH // len(SLOWNESS)] * len(SLOWNESS), 0.0
    for name, samples, times in (
        ("torch DDP", even, found.even),
        ("measured weights", found.samples, found.measured),
    ):
        median = statistics.median(times)
        rate = BATCH * SECONDS / median  # the fastest rank's alone is 1
        share = rate / ideal
        table.add_row(name, str(samples), f"{1e3 * median:.0f}", f"{rate:.2f} of {ideal:.2f}", f"{share:.3f}")
    console = make_console()
    console.print(table)
    console.print(
        f"weights {found.weights}; {steps} steps of each, in turn; load average {os.getloadavg()[0]:.0f}, "
        f"{time.strftime('%Y-%m-%d')}; wanted: {LEAST} of ideal"
    )
    return share >= LEAST
