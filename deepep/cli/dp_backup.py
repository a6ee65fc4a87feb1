"""`deepep dp backup`: what it costs that each rank copies the experts of the next one."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
from rich.table import Table

from deepep.cli.terminal import make_console

MIB = (1, 48, 192)
"""Sizes of what a rank has of its experts: weights, and two of AdamW's states of each."""
_HIDDEN, _EXPERTS, _TIMEOUT, _STEPS = 512, 4, 60.0, 5


def backup(ranks: int, times: int) -> bool:
    """Takes steps with copies before each and without, in turn; True: there is no bar."""
    from deepep.sim import World
    from deepep.sim.worlds import rank_handle

    rank_handle.PRELOADED += ["torch._dynamo", "deepep.parallel"]
    columns = ("experts of a rank, MiB", "a step, s", "with copies, s", "longest", "bytes alone, s")
    console, table = make_console(), Table(*columns)
    for mib in MIB:
        with World(ranks, timeout=600.0) as world:
            found = world.run(_train, mib, times)
        plain, copying, alone = (max(of_rank[n] for of_rank in found) for n in range(3))
        longest = max(of_rank[3] for of_rank in found)
        figures = (plain, copying, longest, alone)
        table.add_row(str(mib), *(f"{figure:.3f}" for figure in figures))
    console.print(table)
    console.print(
        f"{ranks} ranks of {_EXPERTS} experts and {_EXPERTS} empty places, {_STEPS * times} steps of each "
        f"kind in turn, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.0f}. Medians of the slowest "
        "rank; bytes alone: as many from each rank to the one before it"
    )
    return True


def _train(context: Any, mib: int, times: int) -> tuple[float, float, float, float]:
    """Medians of a step, of one with copies, and of the bytes alone; the longest with copies. In seconds."""
    import deepep
    from deepep.nn import ExpertParallelMoE
    from deepep.placement import contiguous, with_spare

    torch.set_num_threads(1)
    ranks = context.num_ranks
    width = max(1, (mib << 20) // (3 * 4 * 3 * _HIDDEN * _EXPERTS))  # gate, up and down
    placement = with_spare(contiguous(_EXPERTS * ranks, ranks), _EXPERTS)
    config = deepep.ParallelConfig(timeout=_TIMEOUT, probe_seconds=0)
    with deepep.Buffer(context.group, device="cpu", timeout=_TIMEOUT) as buffer:
        sizes = {"hidden": _HIDDEN, "expert_hidden": width, "num_experts": _EXPERTS * ranks, "num_topk": 1}
        layer = ExpertParallelMoE(buffer, placement=placement, dtype=torch.float32, **sizes)
        ddp: Any = deepep.DistributedDataParallel(layer, process_group=context.group, config=config)
        optimizer = torch.optim.AdamW(ddp.parameters(), 0.01)
        state = {"optimizer": optimizer}

        def step(every: int) -> float:
            started = time.monotonic()
            for attempt in ddp.attempts(state=state, expert_backup=every):
                with attempt:
                    optimizer.zero_grad()
                    ddp(torch.ones(4, _HIDDEN)).square().mean().backward()
                    optimizer.step()
            return time.monotonic() - started

        never = 1 << 30
        step(1)
        seconds: dict[int, list[float]] = {1: [], never: []}
        for _ in range(times):
            for every in seconds:
                step(every)  # which makes copies, whatever it is: it is another one's
                seconds[every] += [step(every) for _ in range(_STEPS)]
        alone = [_bytes_alone(ddp, mib << 20) for _ in range(times)]
        ddp.close()
    plain, copying = (statistics.median(seconds[every]) for every in (never, 1))
    return plain, copying, statistics.median(alone), max(seconds[1])


def _bytes_alone(ddp: Any, size: int) -> float:
    """Seconds in which so many bytes go from each rank to the one before it."""
    from deepep.runtime.control.transport import Link

    seconds = [0.0]

    def body(link: Link) -> None:
        place, count = link.group.rank(), len(link.members)
        given, taken = (torch.zeros(size, dtype=torch.uint8, device="cpu") for _ in range(2))
        started = time.monotonic()
        works = [
            link.group.recv([taken], (place + 1) % count, 0),
            link.group.send([given], (place - 1) % count, 0),
        ]
        for work in works:
            work.wait()
        seconds[0] = time.monotonic() - started

    ddp._bucket_reducer.comm.hand_over(body, 0)
    return seconds[0]
