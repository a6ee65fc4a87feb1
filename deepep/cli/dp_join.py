"""`deepep dp join`: for how long training stops when a process takes the place of a rank that died."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from deepep.cli.terminal import make_console

MIB = (1, 48, 192)
"""Sizes of the state that is handed over: weights, and two of AdamW's states of each."""
MARGIN = 2.0
"""Seconds that the others may stop, beyond what the bytes take from one rank to another."""
_WIDTH, _TIMEOUT = 1024, 60.0


def join(ranks: int, times: int) -> bool:
    """Has a process join `times` times for each size; whether the others never stopped for too long."""
    from deepep.sim import World
    from deepep.sim.worlds import rank_handle

    rank_handle.PRELOADED += ["torch._dynamo", "deepep.parallel"]
    columns = ("state, MiB", "runs", "bytes alone, s", "pause, s", "longest", "longest beyond the bytes")
    console, table = make_console(), Table(*columns)
    passed = True
    for mib in MIB:
        alone, pauses = [], []
        for _ in range(times):
            with World(ranks, timeout=600.0) as world, World(1, timeout=600.0) as fresh:
                with tempfile.TemporaryDirectory() as folder:
                    joined = fresh.submit(_newcomer, ranks - 1, mib, folder)
                    outcomes = world.try_run(_member, mib, folder)
                    alone.append(joined.results()[0])
                pauses.append(max(outcome.value for outcome in outcomes[:-1]))
        beyond = max(pause - bytes_alone for pause, bytes_alone in zip(pauses, alone, strict=True))
        passed = passed and beyond <= MARGIN
        figures = (statistics.median(alone), statistics.median(pauses), max(pauses), beyond)
        table.add_row(str(mib), str(times), *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    console.print(
        f"{ranks - 1} ranks and a newcomer, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.0f}."
        " Medians; pause: how much longer the step takes in which it joins. "
        f"Bar: the bytes alone, from one rank to another, and {MARGIN:g} s"
    )
    return passed


class _Training:
    def __init__(self, mib: int) -> None:
        torch.set_num_threads(1)
        rows = max(1, (mib << 20) // (3 * 4 * _WIDTH))
        self.module = torch.nn.Linear(_WIDTH, rows, bias=False)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), 0.01)
        self.state = {"optimizer": self.optimizer}
        self.ddp: Any = None

    def options(self) -> Any:
        from deepep.parallel import ParallelConfig

        return ParallelConfig(timeout=_TIMEOUT, probe_seconds=0)

    def step(self) -> float:
        started = time.monotonic()
        for attempt in self.ddp.attempts(state=self.state):
            with attempt:
                self.optimizer.zero_grad()
                self.ddp(torch.ones(1, _WIDTH)).square().mean().backward()
                self.optimizer.step()
        return time.monotonic() - started

    def end(self) -> float:
        """Sends as many bytes as the state has from the first rank to the last; seconds on that one."""
        from deepep.runtime.control.transport import Link

        seconds = [0.0]
        size = 3 * self.module.weight.numel() * self.module.weight.element_size()

        def body(link: Link) -> None:
            message = torch.zeros(size, dtype=torch.uint8, device="cpu")
            started, last = time.monotonic(), len(link.members) - 1
            if link.group.rank() == 0:
                link.group.send([message], last, 0).wait()
            elif link.group.rank() == last:
                link.group.recv([message], 0, 0).wait()
            seconds[0] = time.monotonic() - started

        self.ddp._bucket_reducer.comm.hand_over(body, 0)
        self.ddp.close()
        return seconds[0]


def _member(context: Any, mib: int, folder: str) -> float:
    """Seconds that the step in which a process joins takes longer than the others."""
    from deepep.parallel import DistributedDataParallel
    from deepep.runtime.control.stores import base_of, place_of
    from deepep.runtime.control.transport import store_of

    mine = _Training(mib)
    mine.ddp = DistributedDataParallel(mine.module, process_group=context.group, config=mine.options())
    mine.step()
    if context.rank == context.num_ranks - 1:
        os._exit(0)
    mine.step()  # the one that goes on without it
    usual = [mine.step() for _ in range(3)]
    if context.rank == 0:
        unfinished = Path(folder, "new")
        unfinished.write_text(place_of(base_of(store_of(context.group))))
        unfinished.rename(Path(folder, "store"))
    while True:
        before = mine.ddp.members
        seconds = mine.step()
        if mine.ddp.members != before:
            break
        usual.append(seconds)
    mine.end()
    return seconds - statistics.median(usual)


def _newcomer(context: Any, rank: int, mib: int, folder: str) -> float:
    from deepep.parallel import DistributedDataParallel
    from deepep.runtime.control.stores import open_store

    mine = _Training(mib)
    while not Path(folder, "store").exists():
        time.sleep(0.01)
    store = open_store(Path(folder, "store").read_text(), _TIMEOUT)
    mine.ddp = DistributedDataParallel.join_run(
        mine.module, rank, mine.state, store=store, config=mine.options()
    )
    mine.step()
    return mine.end()
