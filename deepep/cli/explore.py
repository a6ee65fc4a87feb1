"""`python -m deepep explore`: the kernels on the CPU, under many schedules."""

from __future__ import annotations

import enum
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deepep.cli.terminal import FAILED, PASSED, demand_folder, demand_use, make_console, misused
from deepep.sim.explore.explorer import LIMITS, Tally, draw_scenario, draw_tall_scenario, explore
from deepep.sim.explore.failures import Failure
from deepep.sim.explore.kernel_mutants import HARMLESS, mutants
from deepep.sim.explore.mutant_hunt import Catch, hunt_all, markdown
from deepep.sim.explore.scenarios import Scenario


class Op(str, enum.Enum):
    """The operations to explore."""

    ALL = "all"
    LAYOUT = "layout"
    DISPATCH = "dispatch"
    COMBINE = "combine"
    BARRIER = "barrier"


def scenarios_of(op: Op, ranks: int) -> Callable[[int], Scenario]:
    """Scenarios of up to `ranks` ranks that run the operation, with as little else as it needs."""
    # The largest group as often as all smaller ones together.
    sizes = [r for r in (1, 2, 3, 4, 6, 8) if r < ranks]
    limits = replace(LIMITS, ranks=(*sizes, *[ranks] * max(1, len(sizes))))
    mixed = partial(draw_scenario, limits=limits)

    def draw(seed: int) -> Scenario:
        scenario = mixed(seed)
        if op is Op.LAYOUT:
            return replace(draw_tall_scenario(2 * seed), use_layout="only")
        if op is Op.DISPATCH:
            return replace(scenario, num_combines=0, use_layout="no", use_barrier=False)
        if op is Op.COMBINE:
            return replace(
                scenario, num_combines=1 + seed % 3, use_layout="no", use_barrier=False, short_slots=False
            )
        if op is Op.BARRIER:
            return replace(scenario, num_combines=0, use_barrier=True, short_slots=False)
        return draw_tall_scenario(seed // 8) if seed % 8 == 7 else scenario

    return draw


def command(
    context: typer.Context,
    op: Annotated[Op, typer.Option(help="Which operation; combine needs a dispatch, too.")] = Op.ALL,
    ranks: Annotated[int, typer.Option(min=1, max=16, help="The largest number of ranks.")] = 4,
    minutes: Annotated[float, typer.Option(min=0, help="How long.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same scenarios.")] = 0,
    stops: Annotated[bool, typer.Option(help="In two of three runs a rank stops somewhere.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Threads that explore; 0: one for each core.")] = 0,
    replay: Annotated[
        Path | None, typer.Option(help="Run a failure saved earlier, and nothing else.")
    ] = None,
    mutations: Annotated[
        bool, typer.Option(help="Explore each mutant of the kernels' source instead, and print the table.")
    ] = False,
    match: Annotated[str, typer.Option(help="With --mutations: only those whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for failures.")] = Path("explore-failures"),
) -> None:
    """Run the kernels on the CPU under many schedules.

    Exit status: 0 nothing failed (with --mutations: every mutant was caught), 1 something did, 2 misuse.
    """
    torch.set_num_threads(1)
    console = make_console()
    workers = workers or os.cpu_count() or 1
    if replay is not None:
        demand_use(context, ("replay",))
        raise typer.Exit(_replay(console, replay))
    if mutations:
        demand_use(context, ("mutations", "match", "minutes", "workers"))
        raise typer.Exit(_hunt(console, match, minutes, workers))
    demand_use(context, context.params.keys() - {"match"}, "with --mutations")
    demand_folder("--out", out)
    tally = _explore(console, scenarios_of(op, ranks), seed, 60.0 * minutes, stops, workers)
    if tally.failure is None:
        raise typer.Exit(PASSED)
    _report(console, tally.failure, out)
    raise typer.Exit(FAILED)


def _explore(
    console: Console,
    scenarios: Callable[[int], Scenario],
    seed: int,
    seconds: float,
    stops: bool,
    workers: int,
) -> Tally:
    """All workers' tallies in one, with the failure of the lowest seed if there are several."""
    begin = time.monotonic()
    lock, over = Lock(), Event()
    total = Tally()

    def work(number: int) -> Tally:
        mine = Tally()

        def progress(now: Tally) -> None:
            with lock:
                total.runs += now.runs - mine.runs
                total.steps += now.steps - mine.steps
                total.kinds.update(now.kinds - mine.kinds)
                total.seconds = time.monotonic() - begin
            mine.runs, mine.steps, mine.kinds = now.runs, now.steps, Counter(now.kinds)
            if over.is_set():
                raise _Over

        try:
            tally = explore(
                first_seed=seed + number,
                stride=workers,
                seconds=seconds,
                with_stops=stops,
                scenarios=scenarios,
                progress=progress,
            )
        except _Over:
            return mine
        if tally.failure is not None:
            over.set()
        return tally

    console.print(f"exploring schedules from seed {seed} with {workers} workers")
    with ThreadPoolExecutor(workers) as pool, Live(console=console, transient=True) as live:
        pending = [pool.submit(work, number) for number in range(workers)]
        try:
            while not all(p.done() for p in pending):
                live.update(_table(total))
                time.sleep(0.2)
        except BaseException:  # Ctrl-C: the pool waits for its workers, which look at this between two runs
            over.set()
            raise
        tallies = [p.result() for p in pending]
    failures = [t.failure for t in tallies if t.failure is not None]
    total.failure = min(failures, key=lambda f: f.schedule.seed, default=None)
    if total.failure is not None:
        total.kinds[total.failure.report.kind] += 1
    console.print(_table(total))
    return total


class _Over(Exception):
    """Another worker has found a failure, or the user has had enough."""


def _table(tally: Tally) -> Table:
    table = Table(box=None, show_header=False)
    rate = tally.runs / tally.seconds * 60 if tally.seconds else 0.0
    table.add_row("schedules", f"{tally.runs}")
    table.add_row("schedules a minute", f"{rate:.0f}")
    table.add_row("steps a schedule", f"{tally.steps // max(1, tally.runs)}")
    for kind, count in sorted(tally.kinds.items()):
        table.add_row(kind if kind != "fault" else "ended in a fault record", f"{count}")
    return table


def _report(console: Console, failure: Failure, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{failure.schedule.strategy}-{failure.schedule.seed}.json"
    failure.save(path)
    console.print(Text.assemble((failure.report.kind, "red"), f" under schedule {failure.schedule}"))
    for part in (*failure.scenario.cases, failure.scenario.gpu, *failure.stops):
        console.print(f"  {part!r}")
    console.print(failure.report.text)
    console.print(f"again: python -m deepep explore --replay {shlex.quote(str(path))}", soft_wrap=True)


def _replay(console: Console, path: Path) -> int:
    try:
        failure = Failure.load(path)
    except (OSError, ValueError) as error:
        misused(f"--replay: {error}")
    report = failure.replay()
    console.print(report.kind, report.text, sep="\n")
    if report.kind != failure.report.kind:
        console.print(f"(when it was saved: {failure.report.kind})")
    return FAILED if report.failed else PASSED


def _hunt(console: Console, match: str, minutes: float, workers: int) -> int:
    """At most `minutes` for each mutant."""
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    if not (csrc / "emulator" / "kernel_set.cpp").exists():
        misused("--mutations needs a checkout: the kernels' source is mutated")
    wanted = [mutant for mutant in mutants(csrc) if match in mutant.name]
    if not wanted:
        misused(f"--match: no mutant's name contains {match!r}")
    console.print(f"{len(wanted)} mutants; those of an expression are built together, for a minute or so")

    def done(catch: Catch) -> None:
        verdict = catch.caught_by or ("harmless" if catch.mutant.name in HARMLESS else "escaped")
        line = f"{verdict:30} {catch.runs:5} {catch.seconds:6.2f} s  {catch.mutant.name}"
        console.print(line, style="red" if verdict == "escaped" else None)

    catches = hunt_all(wanted, csrc, seconds=60.0 * minutes, runs=10**6, workers=workers, done=done)
    typer.echo("\n".join(markdown(catches)))  # not to be wrapped: it is for docs/verification.md
    escaped = [c for c in catches if c.failure is None and c.mutant.name not in HARMLESS]
    return FAILED if escaped else PASSED
