"""`deepep dp efficiency`: what a run keeps of its work when ranks die, measured, and simulated for more."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from pathlib import Path

from rich.table import Table

from deepep.cli.terminal import make_console, misused
from deepep.errors import RangeError

SECONDS, USUAL = 2.0, 30.0
"""That a step sleeps; of steps before the deaths."""
CHECKPOINT_STEPS = 8
LEAST_SHARE, MOST_OF_GAP, MOST_OFF = 0.92, 1 / 3, 0.03
"""Of the window's samples; of the smallest gap of others; between a simulated and a measured share."""
EVENTS, WINDOWS = (1, 2, 3), (60.0, 600.0)


def efficiency(ranks: int, kill: int, window: float, costs_file: str) -> bool:
    """Measures this library's share and gap beside torchrun's; True if they are as wanted.

    costs_file: where to keep the times for `simulate`, or "".
    """
    from deepep.sim.faults.outage_runs import go_on, restart
    from deepep.sim.faults.outages import Death, OutageCosts, share_going_on, share_restarting
    from deepep.sim.worlds import rank_handle

    if not 1 <= kill < ranks - kill:
        misused(RangeError("killed", str(kill), f"1 or more, fewer than half of {ranks} ranks"))
    rank_handle.PRELOADED += ["torch._dynamo", "deepep.parallel"]
    console = make_console()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        ours = go_on(ranks, kill, SECONDS, USUAL, window, Path(first))
        console.print(f"deepep: step {ours.step_seconds:.3f} s, gap {ours.gap:.2f} s")
        torchs = restart(ranks, kill, SECONDS, USUAL, window, Path(second), CHECKPOINT_STEPS)
    since = sum(when < torchs.died for _, when, _ in torchs.steps) % CHECKPOINT_STEPS
    restart_seconds = torchs.gap - since * torchs.step_seconds
    costs = OutageCosts(ranks, ours.step_seconds, ours.gap, restart_seconds, CHECKPOINT_STEPS)
    deaths, done = [Death(0.0, kill)], SECONDS / 2
    simulated = share_going_on(costs, ranks, deaths, window, done)
    rows = (
        ("deepep", ours, simulated),
        ("torchrun, restart", torchs, share_restarting(costs, deaths, window, done, since)),
    )
    table = Table("", "step, s", "gap, s", f"of {window:g} s", "simulated", "steps after, of those before")
    for name, run, expected in rows:
        table.add_row(
            name,
            f"{run.step_seconds:.3f}",
            f"{run.gap:.2f}",
            f"{run.share(window):.3f}",
            f"{expected:.3f}",
            f"{run.slowdown(window):.3f}",
        )
    console.print(table)
    found = importlib.util.find_spec("torchft") is not None
    console.print(
        f"torchft: {'installed, but this command does not run it' if found else 'not installed, not run'}"
    )
    console.print(
        f"{ranks} ranks, {kill} killed, steps that sleep {SECONDS} s, checkpoints every {CHECKPOINT_STEPS} "
        f"steps; without a gap {1 - kill / ranks:.3f} would be left; load average {os.getloadavg()[0]:.0f}, "
        f"{time.strftime('%Y-%m-%d')}",
        soft_wrap=True,
    )
    if costs_file:
        costs.save(costs_file)
    return (
        ours.share(window) >= LEAST_SHARE
        and ours.gap <= MOST_OF_GAP * torchs.gap
        and abs(ours.share(window) - simulated) <= MOST_OFF
    )


def simulate(ranks: int, kill: int, costs_file: str) -> bool:
    """Shares of `ranks` ranks that lose `kill` in some separate events, by measured times; True."""
    from deepep.sim.faults.outages import (
        MEASURED,
        load_costs,
        mean_share_going_on,
        mean_share_restarting,
        spread_deaths,
    )

    if not 1 <= kill < ranks:
        misused(RangeError("killed", str(kill), f"1 to {ranks - 1} ranks"))
    try:
        costs = load_costs(costs_file) if costs_file else MEASURED
    except (OSError, ValueError) as error:
        misused(RangeError("costs", costs_file, f"a file of `dp efficiency --costs`: {error}"))
    table = Table("events", "window, s", "deepep", "restart")
    for window in WINDOWS:
        for events in EVENTS:
            if events > kill:
                continue
            deaths = spread_deaths(kill, events, window)
            going_on = mean_share_going_on(costs, ranks, deaths, window)
            again = mean_share_restarting(costs, deaths, window)
            table.add_row(str(events), f"{window:g}", f"{going_on:.3f}", f"{again:.3f}")
    console = make_console()
    console.print(table)
    console.print(
        f"{kill} of {ranks} ranks; times measured with {costs.num_ranks}: step {costs.step_seconds:.3f} s, "
        f"gap {costs.gap_seconds:.2f} s, restart {costs.restart_seconds:.1f} s from a checkpoint every "
        f"{costs.checkpoint_steps} steps",
        soft_wrap=True,
    )
    return True
