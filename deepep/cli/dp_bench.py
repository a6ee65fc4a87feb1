"""`deepep dp bench`: all-reduces of gradients beside torch's own, and a death in one, on GPUs or the CPU."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from deepep.bench.reductions import (
    AUTO,
    DRAWN,
    FP8,
    TORCH,
    TORCH_BF16,
    ReductionTimes,
    Survival,
    lose_a_rank,
    measure_reductions,
    median_and_spread,
)
from deepep.cli.launcher import launched_ranks
from deepep.cli.terminal import make_console, misused
from deepep.errors import RangeError

MOST_AUTO, MOST_FP8, MOST_GAP = 1.02, 0.75, 5.0
"""Of torch's float32: uncompressed, and in FP8, judged where each rank has a GPU of its own; and seconds
after which the others go on.
"""
VICTIM, STEP = 1, 20
RUN_TIMEOUT = 1800.0
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def bench(ranks: int, sizes: str, rounds: int, kills: bool) -> bool:
    """Compares bits, times all-reduces, and kills a rank; True if what is judged here is as wanted.

    ranks: processes, 0: one for each GPU, at least two; under torchrun its own. sizes: bytes of float32, with
    K, M or G. kills: whether a rank is killed, which torchrun's ranks are not.
    """
    is_cuda = torch.cuda.is_available() and dist.is_nccl_available()
    wanted = [_bytes_of(word) for word in (sizes or ("1M,64M,1G" if is_cuda else "64K,1M,16M")).split(",")]
    console = make_console()
    if launched_ranks() is not None:
        found = _under_torchrun(wanted, rounds, is_cuda)
        if found is None:
            return True
        passed = show(found, console)
        console.print("no rank was killed: torchrun would end the others (run it without torchrun)")
        return passed
    from deepep.sim import World

    count = ranks or max(torch.cuda.device_count(), 2)
    backend = "nccl" if is_cuda else "gloo"
    with World(count, backend=backend, timeout=300.0) as world:
        passed = show(world.run(_measured, wanted, rounds, timeout=RUN_TIMEOUT)[0], console)
    return _killed(count, backend, console) and passed if kills else passed


def show(found: ReductionTimes, console: Console) -> bool:
    """Prints what was measured; True if bits are the oracle's, and times as wanted where they are judged."""
    for text in found.wrong[:10]:
        console.print(f"other bits than the CPU's: {text}", soft_wrap=True)
    judged = found.device == "cuda" and not found.shares_gpus
    if found.device == "cpu":
        console.print("no GPU here: CPU tensors over gloo; these figures say nothing about any GPU")
    elif found.shares_gpus:
        console.print("ranks share GPUs, and NCCL links them by sockets: functional figures alone")
    if found.absent:
        console.print(f"torch's own all-reduce is absent: {found.absent}", soft_wrap=True)
    table = Table("bytes", "way", "median, ms", "lowest", "highest", "of torch fp32", "of torch bf16")
    missed = []
    for size, of_size in found.seconds.items():
        base = {way: statistics.median(of_size[way]) for way in (TORCH, TORCH_BF16) if way in of_size}
        for way, samples in of_size.items():
            middle, lowest, highest = median_and_spread(samples)
            shares = [f"{middle / base[way_]:.2f}" if way_ in base else "-" for way_ in (TORCH, TORCH_BF16)]
            name = f"{way}: {found.plans[size][way]}" if way in found.plans[size] else way
            times = (f"{1e3 * seconds:.4g}" for seconds in (middle, lowest, highest))
            table.add_row(f"{size:,}", name, *times, *shares)
            most = {AUTO: MOST_AUTO, FP8: MOST_FP8}.get(way)
            if judged and most is not None and TORCH in base and middle > most * base[TORCH]:
                missed.append(
                    f"{size:,} bytes, {way}: {middle / base[TORCH]:.2f}; allowed: at most {most:.2f}"
                )
    console.print(table)
    for text in missed:
        console.print(text)
    bits = f"{len(found.wrong)} results with other bits than the CPU's"
    console.print(f"{found.ranks} ranks, {found.device}, {time.strftime('%Y-%m-%d')}: {bits}")
    return not found.wrong and not missed


def _killed(ranks: int, backend: str, console: Console) -> bool:
    """One of the ranks dies in an all-reduce; True if the others go on, in time where that is judged."""
    from deepep.sim import Status, World

    with World(ranks, backend=backend, timeout=300.0) as world, tempfile.TemporaryDirectory() as folder:
        outcomes = world.try_run(_losing, folder, timeout=240.0)
        died = float((Path(folder) / "died").read_text())
    survivors: list[Survival] = [outcome.value for outcome in outcomes if outcome.status is Status.RETURNED]
    for outcome in outcomes:
        if outcome.rank != VICTIM and outcome.status is not Status.RETURNED:
            console.print(outcome.describe(), soft_wrap=True)
    if len(survivors) < ranks - 1:
        return False
    gap = max(survivor.when for survivor in survivors) - died
    right = all(survivor.is_right and len(survivor.members) == ranks - 1 for survivor in survivors)
    console.print(
        f"rank {VICTIM} of {ranks} killed in an all-reduce: the others have their next sum after {gap:.2f} s "
        f"(at most {MOST_GAP:g}), all of them right and their devices in use: {right}"
    )
    return right and gap <= MOST_GAP


def _measured(context: Any, sizes: Sequence[int], rounds: int, drawn: int = DRAWN) -> ReductionTimes:
    return measure_reductions(context.group, context.device, sizes, rounds, drawn)


def _losing(context: Any, folder: str) -> Survival:
    def die() -> None:
        (Path(folder) / "died").write_text(repr(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    return lose_a_rank(context.group, context.device, VICTIM, STEP, die)


def _under_torchrun(sizes: Sequence[int], rounds: int, is_cuda: bool) -> ReductionTimes | None:
    """On torchrun's rank 0 what was measured, on others None."""
    from deepep.sim.worlds.gpus import take_gpu

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if is_cuda:
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        device = take_gpu(local, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
    dist.init_process_group("nccl" if is_cuda else "gloo", timeout=timedelta(seconds=300.0))
    try:
        group = dist.group.WORLD
        assert group is not None
        found = measure_reductions(group, device, sizes, rounds)
        return found if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def _bytes_of(word: str) -> int:
    number, unit = word.strip().upper().rstrip("KMG"), word.strip().upper()[-1:]
    if not number.isdecimal() or int(number) < 1:
        misused(RangeError("sizes", repr(word), "numbers of bytes, as 4096, 64K, 1M, 1G"))
    return int(number) * _UNITS[unit if unit in "KMG" else ""]
