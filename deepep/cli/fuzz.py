"""`python -m deepep fuzz`: random routing, values and options against the reference."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deepep.cli.fuzz_faults import fuzz_faults
from deepep.cli.terminal import FAILED, PASSED, demand_folder, demand_use, make_console, misused
from deepep.runtime.backends import backends
from deepep.sim.cases.case import Limits, draw_case
from deepep.sim.cases.traces import TraceSource
from deepep.sim.fuzz import subjects
from deepep.sim.fuzz.drawing import print_finding, save_picture
from deepep.sim.fuzz.fuzzer import Draw, Finding, Fuzzer, FuzzReport
from deepep.sim.fuzz.stored import StoredExample
from deepep.sim.fuzz.subjects import Subject

#: What can be fuzzed besides Buffer.
IMPLEMENTATIONS: dict[str, Callable[[], Subject]] = {
    "core": subjects.core,
    "oracle": subjects.reference,
    "all_to_all": subjects.all_to_all,
}


def subjects_of(backend: str) -> list[Subject]:
    """The implementations that a choice of backend stands for: an engine's name stands for Buffer on it.

    Raises:
        ValueError: there is none of this name, or this machine cannot run it.
    """
    if backend == "all":
        return [*(make() for make in IMPLEMENTATIONS.values()), subjects.buffer(backend="reference")]
    if backend in IMPLEMENTATIONS:
        return [IMPLEMENTATIONS[backend]()]
    engines = {engine.name: engine for engine in backends()}
    if backend not in engines:
        raise ValueError(f"got {backend}; allowed: {', '.join(['all', *IMPLEMENTATIONS, *engines])}")
    able, why = engines[backend].available()
    if not able:
        raise ValueError(f"{backend}: {why}")
    return [subjects.buffer(backend=backend)]


def command(
    context: typer.Context,
    ranks: Annotated[int, typer.Option(min=1, help="The largest number of ranks.")] = 8,
    minutes: Annotated[float | None, typer.Option(min=0, help="How long (default: 1).")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="How many examples, instead.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same examples.")] = 0,
    backend: Annotated[
        str, typer.Option(help="core, oracle, all_to_all, an engine's name (Buffer on it), or all.")
    ] = "all",
    trace: Annotated[Path | None, typer.Option(help="Draw routing from this trace (docs/trace.md).")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Run a failing example saved earlier, and no others.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for failing examples.")] = Path("fuzz-output"),
    faults: Annotated[
        bool, typer.Option("--faults", help="Kill and freeze ranks at any moment instead.")
    ] = False,
) -> None:
    """Fuzz routing layouts against the reference.

    Exit status: 0 nothing failed, 1 something did, 2 misuse.
    """
    torch.set_num_threads(1)
    if replay is None:
        demand_folder("--out", out)
    console = make_console()
    if replay is not None:
        demand_use(context, ("replay", "backend"))
    if faults:
        demand_use(context, ("faults", "ranks", "seed", "examples", "minutes"))
        if ranks < 2:
            misused("--ranks: got 1; allowed with --faults: 2 or more")
        raise typer.Exit(fuzz_faults(console, ranks, seed, examples, minutes))
    try:
        chosen = subjects_of(backend)
    except ValueError as error:
        misused(f"--backend: {error}")
    try:
        if replay is not None:
            finding = _replay(console, chosen, replay)
        else:
            finding = _fuzz(console, chosen, ranks, minutes, examples, seed, trace)
        if finding is None:
            raise typer.Exit(PASSED)
        _report(console, finding, out, save=replay is None)
        raise typer.Exit(FAILED)
    finally:
        for subject in chosen:
            subject.close()


def _fuzz(
    console: Console,
    chosen: list[Subject],
    ranks: int,
    minutes: float | None,
    examples: int | None,
    seed: int,
    trace: Path | None,
) -> Finding | None:
    draw: Draw = draw_case
    # The largest world as often as all smaller ones together.
    sizes = sorted({r for r in (1, 2, 3, 4, 6, 8) if r < ranks} | {ranks})
    limits = Limits(ranks=(*sizes, *[ranks] * (len(sizes) - 1)))
    if trace is not None:
        try:
            source = TraceSource.load(trace)
        except (OSError, ValueError) as error:
            misused(f"--trace: {error}")
        fitting = tuple(r for r in limits.ranks if source.trace.num_experts % r == 0)
        if len(source.trace) == 0:
            misused("--trace: the trace is empty")
        limits = Limits(ranks=fitting)
        draw = source.draw
    seconds = (
        None if examples is not None and minutes is None else 60.0 * (1.0 if minutes is None else minutes)
    )
    fuzzer = Fuzzer(chosen, seed=seed, limits=limits, draw=draw)
    names = ", ".join(subject.name for subject in chosen)
    console.print(f"fuzzing {names} with up to {ranks} ranks, seed {seed}")
    with Live(console=console, transient=True, auto_refresh=False) as live:
        report = fuzzer.run(
            examples=examples,
            seconds=seconds,
            progress=lambda now: live.update(_table(now), refresh=True),
        )
    console.print(_table(report))
    missing = [f"{name}={value}" for name, value in report.coverage.missing()]
    if missing and trace is None:
        console.print(f"not tried: {', '.join(missing)}")
    return report.finding


def _table(report: FuzzReport) -> Table:
    coverage = report.coverage
    pairs = f"{len(coverage.seen_pairs)} of {coverage.total_pairs}"
    table = Table(box=None, show_header=False)
    table.add_row("examples", f"{report.examples}")
    table.add_row("examples a second", f"{report.examples_per_second:.1f}")
    table.add_row("option space", f"{len(coverage.seen)} of {coverage.total} alternatives, {pairs} pairs")
    table.add_row("failed", Text("1", "red") if report.finding else "0")
    return table


def _replay(console: Console, chosen: list[Subject], path: Path) -> Finding | None:
    try:
        stored = StoredExample.load(path)
    except (OSError, ValueError) as error:
        misused(f"--replay: {error}")
    if stored.subject:
        console.print(f"{path}: {stored.subject}: {stored.rule}", soft_wrap=True)
    finding = Fuzzer(chosen).replay(stored.cases, stored.rule)
    if finding is None:
        console.print("nothing fails")
    return finding


def _report(console: Console, finding: Finding, out: Path, *, save: bool) -> None:
    print_finding(console, finding)
    if save:
        out.mkdir(parents=True, exist_ok=True)
        slug = f"{finding.subject}-{finding.rule}".replace(" ", "-").replace(":", "-")
        file = out / f"{slug}.json"
        StoredExample.of(finding).save(file)
        save_picture(finding, file.with_suffix(".png"))
        console.print(f"saved {file} and {file.with_suffix('.png')}", soft_wrap=True)
        console.print(f"replay: python -m deepep fuzz --replay {shlex.quote(str(file))}", soft_wrap=True)
