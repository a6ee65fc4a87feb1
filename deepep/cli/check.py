"""`deepep check`: a self-test of the installed library on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepep.cli.machine import Advice, findings, read_facts
from deepep.cli.terminal import FAILED, make_console, misused
from deepep.errors import ArgumentError
from deepep.runtime.backends import Backend, backends

if TYPE_CHECKING:
    from deepep.sim import World


@dataclass(frozen=True)
class SelfTest:
    """One run of all checks: a backend, and where its tensors lie."""

    backend: str
    device: str


def planned(
    known: Iterable[Backend], has_gpu: bool, backend: str | None, device: str | None
) -> tuple[list[SelfTest], list[tuple[SelfTest, str]]]:
    """Self-tests to run, GPUs first, and those that cannot be run, each with the reason.

    backend, device: nothing but these.
    """
    tests, absent = [], []
    for where in ("cuda", "cpu"):
        if device not in (None, where) or (where == "cuda" and not has_gpu):
            continue
        for one in known:
            if backend not in (None, one.name) or where not in one.device_types:
                continue
            able, why = one.available()
            if able:
                tests.append(SelfTest(one.name, where))
            else:
                absent.append((SelfTest(one.name, where), why))
    return tests, absent


def command(
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Processes to spawn, one rank each. Default: a GPU's each, at least 2; on CPU 4.",
            min=1,
            max=64,
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Test this one alone; else all that this machine can run.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cuda (NCCL; ranks share the GPUs there are) or cpu (gloo) alone; else both."),
    ] = None,
    facts: Annotated[
        bool, typer.Option(help="Also look at the machine: links, NICs, NVSHMEM, limits of the container.")
    ] = True,
) -> None:
    """Runs every operation once between processes and compares all outputs, bit for bit, with the reference:
    on every backend that this machine can run, on the GPUs where there are any, and on the CPU. Then says
    what would be slow here, or cannot run, and why.

    Exit status 1 if anything does not hold.
    """
    from deepep.sim import World

    _refuse_what_cannot_be(backend, device)
    console = make_console()
    tests, absent = planned(backends(), torch.cuda.is_available(), backend, device)
    started = time.perf_counter()
    held = missing = failed = 0
    for where in ("cuda", "cpu"):
        here = [test for test in tests if test.device == where]
        if not here:
            continue
        size = ranks or (max(2, torch.cuda.device_count()) if where == "cuda" else 4)
        with World(size, backend="nccl" if where == "cuda" else "gloo", timeout=60.0) as world:
            for test in here:
                outcome = _run(console, world, test)
                held, missing, failed = (a + b for a, b in zip((held, missing, failed), outcome, strict=True))
    if facts:
        _advise(console, absent, findings(read_facts()))
    words = f"{held} of {held + missing + failed} hold" + (f", {missing} missing" if missing else "")
    console.print(f"{words}; {time.perf_counter() - started:.1f} s")
    if failed:
        raise typer.Exit(FAILED)


def _run(console: Console, world: World, test: SelfTest) -> tuple[int, int, int]:
    """Numbers of checks that hold, are missing, and fail; prints a table of them, and what failed."""
    from deepep.cli.selftest import CHECKS, run_check

    where = "GPUs" if test.device == "cuda" else "CPU"
    table = Table(title=f"{test.backend} on {where}, {world.num_ranks} ranks", title_justify="left")
    for heading in ("what should hold", "holds"):
        table.add_column(heading)
    table.add_column("ms", justify="right")
    table.add_column("seen on rank 0")
    failures: list[Text] = []
    missing = 0
    with console.status("") as status:
        for name in CHECKS:
            status.update(name)
            outcomes = world.try_run(run_check, name, test.backend)
            bad = [o for o in outcomes if not o.ok]
            if not bad:
                seen, seconds = outcomes[0].value
                table.add_row(name, Text("yes", "green"), f"{seconds * 1e3:.0f}", seen)
            elif all(isinstance(o.error, NotImplementedError) for o in bad):
                missing += 1
                table.add_row(name, Text("missing", "yellow"), "", "not part of this backend yet")
            else:
                table.add_row(name, Text("NO", "bold red"), "", f"see below ({len(bad)} ranks)")
                failures.append(Text.assemble((name, "bold"), *("\n" + o.describe() for o in bad)))
    console.print(table)
    for failure in failures:
        console.print(failure, soft_wrap=True)
    return len(CHECKS) - len(failures) - missing, missing, len(failures)


def _advise(console: Console, absent: list[tuple[SelfTest, str]], advice: list[Advice]) -> None:
    """Prints what was not tested, and what the machine's facts say."""
    lines = [Advice("cannot run", f"{test.backend} on {test.device}", why) for test, why in absent]
    lines += advice
    if not lines:
        console.print("Nothing known of this machine makes anything slow or unavailable.")
        return
    table = Table(title="slow here, or not to be had", title_justify="left")
    for heading in ("", "what", "why", "what to do"):
        table.add_column(heading)
    colours = {"cannot run": "red", "slow": "yellow", "look": "cyan"}
    for line in lines:
        table.add_row(Text(line.level, colours[line.level]), line.what, line.why, line.remedy)
    console.print(table)


def _refuse_what_cannot_be(backend: str | None, device: str | None) -> None:
    problem = ""
    if device not in (None, "cpu", "cuda"):
        problem = f"device: got {device}; allowed: cpu or cuda"
    elif device == "cuda" and not torch.cuda.is_available():
        problem = "device: got cuda; this machine's torch sees no CUDA device"
    elif backend is not None:
        known = {b.name: b for b in backends()}
        if backend not in known:
            problem = str(ArgumentError("backend", repr(backend), " or ".join(known)))
        else:
            able, why = known[backend].available()
            problem = "" if able else f"backend {backend}: {why}"
            if able and device is not None and device not in known[backend].device_types:
                problem = f"backend {backend}: it does not serve {device} tensors"
    if problem:
        misused(problem)
