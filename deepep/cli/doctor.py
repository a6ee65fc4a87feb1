"""`deepep doctor`: who is slow, a rank, a link or a process, and what to check."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepep.cli.launcher import launched_ranks, refusals_raised
from deepep.cli.terminal import FAILED, demand_use, make_console, misused
from deepep.doctor.judge import CHECKS, judge
from deepep.doctor.probe import Examination, examine, run_examination
from deepep.doctor.trial import FAULTS, Trial, run_trials
from deepep.errors import ArgumentError

#: What ranks waited for in the buffer's traffic, by phase, in words.
TRAFFIC = {
    "arrive": "to call",
    "metadata": "to launch a dispatch",
    "digest": "to launch a combine",
    "kernels": "to launch in low latency",
    "rows": "to send its rows",
}


def command(
    context: typer.Context,
    ranks: Annotated[
        int | None,
        typer.Option(help="Processes, one rank each. Default: a GPU's each; on CPU 4.", min=2, max=64),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend of Buffer; else the one it would choose.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of work and traffic.", min=3)] = 30,
    trials: Annotated[
        int, typer.Option(help="Instead: so many runs of each fault made on purpose, and of none.", min=0)
    ] = 0,
) -> None:
    """Runs the same work on all ranks with traffic between them, draws who waited for whom, and names whoever
    is slow: a rank, a link, all links of a rank, or a process that does not get its core.

    Under torchrun the ranks are torchrun's, on any number of nodes. Exit status 1 if somebody is named, or a
    trial was judged wrongly; 2 for misuse.
    """
    console = make_console()
    if device not in (None, "cpu", "cuda"):
        misused(f"device: got {device}; allowed: cpu or cuda")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        misused("device: got cuda; this machine's torch sees no CUDA device")
    where = device or ("cuda" if there else "cpu")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    found: Examination | list[Trial] | None
    try:
        if launched_ranks() is not None:
            own = {"ranks", "trials"}
            demand_use(context, context.params.keys() - own, "without torchrun, whose ranks these are")
            found = _under_torchrun(where, rounds, backend)
        else:
            found = _in_own_processes(console, ranks, where, rounds, backend, trials)
    except ArgumentError as error:
        misused(error)
    if found is None:
        return
    if isinstance(found, Examination):
        if show(console, found):
            raise typer.Exit(FAILED)
    elif not all(trial.is_right for trial in found):
        raise typer.Exit(FAILED)


def _in_own_processes(
    console: Console, ranks: int | None, where: str, rounds: int, backend: str | None, trials: int
) -> Examination | list[Trial]:
    from deepep.sim import World

    size = ranks or (max(2, torch.cuda.device_count()) if where == "cuda" else 4)
    transport = "nccl" if where == "cuda" else "gloo"
    with World(size, backend=transport, timeout=300.0) as world, refusals_raised():
        if not trials:
            found: Examination = world.run(run_examination, rounds, backend, None)[0]
            return found
        done = run_trials(world, trials, rounds, backend, lambda trial: _tell(console, trial))
    table = Table(title=f"{trials} runs each, {size} ranks", title_justify="left")
    for heading in ("fault", "judged rightly"):
        table.add_column(heading)
    for fault in FAULTS:
        table.add_row(fault, f"{sum(t.is_right for t in done if t.fault == fault)} of {trials}")
    console.print(table)
    return done


def _tell(console: Console, trial: Trial) -> None:
    named = "; ".join(map(str, trial.named)) or "nobody named"
    made = f"{trial.fault} {'-'.join(map(str, trial.ranks))}".strip()
    console.print(f"{'' if trial.is_right else 'WRONG: '}{made}: {named}", soft_wrap=True)


def _under_torchrun(where: str, rounds: int, backend: str | None) -> Examination | None:
    torch.set_num_threads(1)
    at = torch.device("cpu")
    if where == "cuda":
        at = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        torch.cuda.set_device(at)
    dist.init_process_group("nccl" if where == "cuda" else "gloo", timeout=timedelta(seconds=300))
    try:
        assert dist.group.WORLD is not None
        found = examine(dist.group.WORLD, at, rounds, backend)
        return found if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def show(console: Console, found: Examination) -> bool:
    """Prints the matrices and the names; True if somebody was named."""
    evidence = found.evidence
    console.print(f"{evidence.num_ranks} ranks, traffic on backend {found.backend}")
    if found.waits is not None:
        for phase, words in TRAFFIC.items():
            waited = found.waits.of(phase)
            if waited is not None:
                title = f"traffic: ms in all that a rank (row) waited for another {words}"
                _draw(console, title, (waited.double() / 1e6).tolist())
    late = [[seconds * 1e3 for seconds in row] for row in evidence.late]
    _draw(console, "work: ms a round that a rank (row) waited for another", late)
    links = [[seconds * 1e3 for seconds in row] for row in evidence.links]
    _draw(console, "links: ms that a message to a rank (row) took from another", links)
    shares = ", ".join(f"{rank}: {share:.0%}" for rank, share in enumerate(evidence.share))
    console.print(f"share of a core, by rank: {shares}")
    suspects = judge(evidence)
    for suspect in suspects:
        console.print(Text(f"{suspect}", "bold red"), soft_wrap=True)
        console.print(f"  check {CHECKS[suspect.kind]}", soft_wrap=True)
    if not suspects:
        console.print("nobody stands out")
    return bool(suspects)


def _draw(console: Console, title: str, matrix: Sequence[Sequence[float]]) -> None:
    """A matrix, the largest entries marked."""
    most = max((value for row in matrix for value in row), default=0.0)
    console.print(title)
    table = Table(box=None)
    table.add_column("")
    for rank in range(len(matrix)):
        table.add_column(str(rank), justify="right")
    for rank, row in enumerate(matrix):
        cells = [
            Text("-" if peer == rank else f"{value:.3g}", "yellow" if value > most / 2 > 0 else "")
            for peer, value in enumerate(row)
        ]
        table.add_row(str(rank), *cells)
    console.print(table)
