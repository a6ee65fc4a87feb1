"""`deepep check`: a self-test of the installed library on this machine."""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text

from deepep.cli.terminal import FAILED, make_console, misused
from deepep.errors import ArgumentError
from deepep.runtime.backends import backends


def command(
    ranks: Annotated[int, typer.Option(help="Processes to spawn, one rank each.", min=1, max=64)] = 4,
    backend: Annotated[
        str | None, typer.Option(help="Backend to test; else the one Buffer would choose.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu (gloo) or cuda (NCCL, ranks share the GPUs there are).")
    ] = "cpu",
) -> None:
    """Runs every operation once between processes and compares all outputs, bit for bit, with the reference.

    Exit status 1 if anything does not hold.
    """
    from deepep.cli.selftest import CHECKS, run_check
    from deepep.sim import World

    _refuse_what_cannot_be(backend, device)
    console = make_console()
    table = Table(
        title=f"deepep on {ranks} ranks, {device}, backend {backend or 'by choice'}", title_justify="left"
    )
    table.add_column("what should hold")
    table.add_column("holds")
    table.add_column("ms", justify="right")
    table.add_column("seen on rank 0")
    started = time.perf_counter()
    failures: list[Text] = []
    missing = 0
    with (
        World(ranks, backend="nccl" if device == "cuda" else "gloo", timeout=60.0) as world,
        console.status("") as status,
    ):
        for name in CHECKS:
            status.update(name)
            outcomes = world.try_run(run_check, name, backend)
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
    held = len(CHECKS) - len(failures) - missing
    words = f"{held} of {len(CHECKS)} hold" + (f", {missing} missing" if missing else "")
    console.print(f"{words}; {time.perf_counter() - started:.1f} s")
    if failures:
        raise typer.Exit(FAILED)


def _refuse_what_cannot_be(backend: str | None, device: str) -> None:
    problem = ""
    if device not in ("cpu", "cuda"):
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
    if problem:
        misused(problem)
