"""`deepep demo`: train a small expert-parallel model on real text, and check it against one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from deepep.cli.demo_gradients import run_gradients
from deepep.cli.launcher import launched_ranks
from deepep.cli.terminal import FAILED, demand_folder, make_console, misused
from deepep.demo.config import DemoConfig
from deepep.demo.report import Comparison, outcome, print_tables, write_outputs
from deepep.demo.single import train_single
from deepep.demo.train import RankRecord, train_rank
from deepep.errors import ArgumentError

#: Longest a whole run may take, and longest a rank waits for another, in seconds.
RUN_TIMEOUT = 3600.0
PEER_TIMEOUT = 120.0


def command(
    ranks: Annotated[int, typer.Option(help="Processes to train with, one rank each.")] = 4,
    steps: Annotated[int, typer.Option(help="Training steps.")] = DemoConfig.steps,
    out: Annotated[Path, typer.Option(help="Folder for pictures and the routing trace.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    experts: Annotated[
        int, typer.Option(help="E, of each layer; rounded up to a multiple of the ranks.")
    ] = DemoConfig.num_experts,
    topk: Annotated[int, typer.Option(help="K.")] = DemoConfig.num_topk,
    data_parallel: Annotated[
        str,
        typer.Option(help="off, auto, fp8, bf16 or fp16: the gradients' part alone, on an emulated cluster."),
    ] = "",
) -> None:
    """Trains a byte-level MoE model on Python's own library sources, over processes that dispatch and
    combine.

    Then trains the same model in one process, and fails unless every loss is equal, bit for bit. Under
    torchrun the ranks are torchrun's. With --data-parallel it trains by torch's DistributedDataParallel and
    by deepep's instead, on an emulated cluster where the system allows one, and draws a picture of it.
    """
    console = make_console()
    demand_folder("--out", out)
    try:
        launched = launched_ranks()
        num_ranks = ranks if launched is None else launched
        config = DemoConfig.for_ranks(num_ranks, steps, seed, num_experts=experts, num_topk=topk)
        if data_parallel:
            if not run_gradients(config, data_parallel, out):
                raise typer.Exit(FAILED)
            return
    except ArgumentError as error:
        misused(error)
    started = time.perf_counter()
    records = _train_in_own_processes(config) if launched is None else _train_under_torchrun(config)
    if records is None:  # a rank of torchrun's other than 0
        return
    with _progress(console, "one process", config.steps) as on_step:
        single = train_single(config, on_step)
    comparison = Comparison(outcome(records), single)
    console.print()
    print_tables(console, records, config)
    console.print("\nWritten", style="bold")
    for path in write_outputs(out, records, config, comparison):
        console.print(f"  {path}", soft_wrap=True)
    first, last = comparison.first_and_last
    seconds = time.perf_counter() - started
    console.print(
        f"\nLoss {first:.3f} nats per byte at first, {last:.3f} over the last tenth; {seconds:.0f} s in all."
    )
    if not comparison.equal:
        gap, step, rank = comparison.worst
        where = f"losses by {gap:.3g} on rank {rank} in step {step}" if gap else "the final weights"
        console.print(Text.assemble(("The runs differ", "bold red"), f": {where}; allowed: not at all"))
        raise typer.Exit(FAILED)
    console.print(
        Text.assemble(
            ("Equal", "bold green"),
            f": all {config.steps * config.num_ranks} losses and all final weights of {_processes(config)} "
            "have the bits of the run in one process.",
        )
    )
    console.print(f"Pictures: {out}/loss.png, expert_load.png, traffic.png", soft_wrap=True)


def _train_in_own_processes(config: DemoConfig) -> list[RankRecord]:
    from deepep.sim import World

    with World(config.num_ranks, timeout=RUN_TIMEOUT) as world:
        return world.run(_train_one, config)[0]


def _train_one(context: Any, config: DemoConfig) -> list[RankRecord] | None:
    """In a rank process; rank 0 draws the progress bar on the terminal it shares with the parent."""
    return _train(context.group, config)


def _train_under_torchrun(config: DemoConfig) -> list[RankRecord] | None:
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=PEER_TIMEOUT))
    try:
        return _train(dist.group.WORLD, config)
    finally:
        dist.destroy_process_group()


def _train(group: Any, config: DemoConfig) -> list[RankRecord] | None:
    if group.rank() != 0:
        return train_rank(group, config)
    with _progress(make_console(), _processes(config), config.steps) as on_step:
        return train_rank(group, config, on_step)


def _processes(config: DemoConfig) -> str:
    return "1 process" if config.num_ranks == 1 else f"{config.num_ranks} processes"


@contextmanager
def _progress(console: Console, label: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    if not console.is_terminal:  # where the bar appears at the end alone
        console.print(f"training: {label}, {steps} steps")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=steps, loss="")

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step + 1, loss=f"{loss:.3f}")

        yield on_step
