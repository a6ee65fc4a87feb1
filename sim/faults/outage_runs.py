"""Runs that lose ranks: this library's attempts, and torchrun's restarts; the times of both.

Ranks sleep, as if each had a GPU: on a processor that they share, a rank's death would speed the others up.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepep.sim.faults import restarted
from deepep.sim.faults.fault import Effect
from deepep.sim.faults.training import StepEnd, Striker
from deepep.sim.worlds.outcomes import Outcome
from deepep.sim.worlds.rank_process import RankContext
from deepep.sim.worlds.world import World

SKIPPED = 5
"""First steps, which do not count for the time of a usual one."""
_END = 30.0


@dataclass(frozen=True)
class OutageRun:
    """A run, with its times in seconds by one clock.

    died: when; steps: of each that counted, in order and once, its number, the time at which it did, and the
    ranks whose samples were in it.
    """

    num_ranks: int
    died: float
    steps: list[tuple[int, float, int]]

    @property
    def step_seconds(self) -> float:
        """The mean of the steps before the death."""
        before = [when for _, when, _ in self.steps if when < self.died][SKIPPED:]
        return (before[-1] - before[0]) / (len(before) - 1)

    @property
    def gap(self) -> float:
        """The time of the step in which ranks died, beyond a usual one's."""
        before = max(when for _, when, _ in self.steps if when < self.died)
        after = min(when for _, when, _ in self.steps if when >= self.died)
        return after - before - self.step_seconds

    def share(self, window: float) -> float:
        """Samples that count in a window from the death on, of what all ranks would have had in as long.

        Of the step in which ranks died what is left of it counts, and of the last one what is done of it.
        """
        end = self.died + window
        before = max(when for _, when, _ in self.steps if when < self.died)
        after = [(when, ranks) for _, when, ranks in self.steps if when >= self.died]
        if after[0][0] > end:
            return 0.0
        counted = after[0][1] * max(0.0, 1 - (self.died - before) / self.step_seconds)
        for (begin, _), (when, ranks) in itertools.pairwise(after):
            counted += ranks * min(1.0, max(0.0, end - begin) / (when - begin))
        return counted / (self.num_ranks * window / self.step_seconds)

    def slowdown(self, window: float) -> float:
        """The time of a step in the window after the gap, over that before: what other work on the machine
        makes of it, and fewer ranks.
        """
        after = [when for _, when, _ in self.steps if self.died <= when < self.died + window]
        return (after[-1] - after[0]) / (len(after) - 1) / self.step_seconds if len(after) > 1 else math.nan


def steps_before(seconds: float, usual: float) -> int:
    """The step in which ranks die: after as many seconds of steps."""
    return SKIPPED + math.ceil(usual / seconds)


def go_on(num_ranks: int, kill: int, seconds: float, usual: float, window: float, folder: Path) -> OutageRun:
    """This library's attempts: the last `kill` ranks die in the middle of a forward, at once."""
    last = steps_before(seconds, usual)
    steps = last + math.ceil(window / seconds) + 2
    ends = [
        StepEnd(Effect.KILL, rank, last, "forward", seconds / 2)
        for rank in range(num_ranks - kill, num_ranks)
    ]
    with World(num_ranks, timeout=600.0) as world:
        outcomes = world.try_run(_sleeping_steps, ends, seconds, steps, str(folder), timeout=3600.0)
    return _run_of(outcomes, ends, folder)


def _sleeping_steps(
    ctx: RankContext, ends: Sequence[StepEnd], seconds: float, steps: int, folder: str
) -> list[tuple[int, float, int]]:
    """One rank's part."""
    import torch

    import deepep

    torch.set_num_threads(1)
    config = deepep.ParallelConfig(timeout=60.0, probe_seconds=0)
    model: Any = deepep.DistributedDataParallel(
        torch.nn.Linear(restarted.WIDTH, restarted.WIDTH), process_group=ctx.group, config=config
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    striker, found = Striker(ctx.rank, ends, folder), []
    for step in range(steps):
        striker.step = step
        for attempt in model.attempts():
            with attempt:
                optimizer.zero_grad()
                out = model(torch.ones(4, restarted.WIDTH))
                striker.reached("forward")
                time.sleep(seconds)
                out.square().mean().backward()
                optimizer.step()
        found.append((step, time.monotonic(), len(model.report()["members"])))
    model.close()
    return found


def _run_of(outcomes: Sequence[Outcome], ends: Sequence[StepEnd], folder: Path) -> OutageRun:
    """A step counts once it does on the last survivor."""
    dead = {end.rank for end in ends}
    of_rank = [outcome.value for outcome in outcomes if outcome.rank not in dead]
    bad = [outcome.describe() for outcome in outcomes if not outcome.ok and outcome.rank not in dead]
    if bad:
        raise RuntimeError("\n".join(bad))
    died = max(float((folder / f"end-{rank}").read_text()) for rank in dead)
    steps = [(number, max(rank[number][1] for rank in of_rank), members) for number, _, members in of_rank[0]]
    return OutageRun(len(outcomes), died, steps)


def restart(
    num_ranks: int,
    kill: int,
    seconds: float,
    usual: float,
    window: float,
    folder: Path,
    every: int,
    patience: float = 600.0,
) -> OutageRun:
    """torchrun's restart of all, from checkpoints every `every` steps, until a step counts that ends after
    the window.

    Raises RuntimeError if none does for `patience` seconds, with the end of what torchrun has printed.
    """
    last = steps_before(seconds, usual)
    given = {
        "folder": str(folder),
        "seconds": seconds,
        "steps": 1 << 20,
        "last": last,
        "killed": list(range(num_ranks - kill, num_ranks)),
        "every": every,
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1",
        "--nproc-per-node",
        str(num_ranks),
    ]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += [restarted.__file__, json.dumps(given)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Without it no restarted worker finds the others: their keys are the first attempt's.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
        try:
            return _watched(process, num_ranks, window, folder, patience)
        finally:
            process.send_signal(signal.SIGTERM)  # it ends its workers
            try:
                process.wait(_END)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _watched(
    process: subprocess.Popen[bytes], num_ranks: int, window: float, folder: Path, patience: float
) -> OutageRun:
    begun, died = time.monotonic(), 0.0
    while True:
        time.sleep(0.2)
        ends = [float(path.read_text() or "0") for path in folder.glob("end-*")]
        died = max(ends, default=0.0)
        steps = _steps_of(folder / "steps", num_ranks)
        now = time.monotonic()
        if died and steps and steps[-1][1] > died + window:
            return OutageRun(num_ranks, died, steps)
        if process.poll() is not None or now - max(begun, died) > patience:
            text = (folder / "log").read_bytes()[-3000:].decode(errors="replace")
            raise RuntimeError(f"torchrun took no step after a rank's death:\n{text}")


def _steps_of(file: Path, num_ranks: int) -> list[tuple[int, float, int]]:
    """Steps that count: of each number the first time that it was done."""
    found: dict[int, float] = {}
    for line in file.read_text().splitlines(keepends=True) if file.exists() else []:
        if line.endswith("\n"):
            number, when = line.split()
            found.setdefault(int(number), float(when))
    return [(number, when, num_ranks) for number, when in sorted(found.items())]
