"""Sudden ends: a rank is killed or frozen at any moment of a buffer's life, and the others are judged.

A life is construction, a dispatch with its combine, the same in low latency, a reconnection, and destruction;
lives follow each other until a rank raises. What is promised: every other rank raises PeerTimeoutError that
names the lost one and nobody else, within the time-out, and works on once it is masked; in low latency the
library masks it, and nothing is raised.

The world's store has to be "tcp": a rank that is frozen while it holds the lock of a store in a file stops
all others, whatever they do.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from deepep.sim.cases.choices import Choices
from deepep.sim.faults.fault import Effect
from deepep.sim.faults.judge import GRACE
from deepep.sim.rules.checking import Violation
from deepep.sim.worlds.outcomes import Status
from deepep.sim.worlds.rank_process import RankContext
from deepep.sim.worlds.world import World

STAGES = ("construct", "dispatch", "combine", "low latency", "reconnect", "destroy")
_HIDDEN = 128


@dataclass(frozen=True)
class SuddenEnd:
    """A rank's end: `delay` seconds after it has begun a stage of its life number `life`, from 0."""

    effect: Effect
    rank: int
    stage: str
    life: int
    delay: float


@dataclass(frozen=True)
class Ended:
    """A survivor's account: the stage that raised, what, whom it names, after how many seconds; and whether
    it worked on. error: "" if the stage did not raise, and `waited_on` was masked in it. works: None where
    there was no buffer to work on with.
    """

    stage: str
    error: str
    message: str
    waited_on: tuple[int, ...]
    seconds: float
    works: bool | None


def draw_sudden_end(choices: Choices, num_ranks: int) -> SuddenEnd:
    """An end at a drawn moment."""
    return SuddenEnd(
        choices.pick((Effect.KILL, Effect.STALL)),
        choices.integer(0, num_ranks - 1),
        choices.pick(STAGES),
        choices.integer(0, 1),
        choices.integer(0, 30) / 1000,
    )


class Life:
    """One rank's buffer, stage by stage."""

    def __init__(self, ctx: RankContext, timeout: float) -> None:
        self._ctx, self._timeout = ctx, timeout
        self.buffer: Any = None
        self._received: Any = None

    def run(self, stage: str) -> None:
        """Goes through a stage."""
        from deepep import Buffer

        buffer, count = self.buffer, self._ctx.num_ranks
        idx = torch.arange(count, device="cpu")[None]
        x = torch.ones(1, _HIDDEN, dtype=torch.bfloat16, device="cpu")
        weights = torch.ones(1, count, dtype=torch.float32, device="cpu")
        if stage == "construct":
            self.buffer = Buffer(
                self._ctx.group, low_latency_mode=True, enable_shrink=True, timeout=self._timeout
            )
        elif stage == "dispatch":
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, count)
            self._received = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)
        elif stage == "combine":
            self.summed = buffer.combine(self._received[0], self._received[4])[0]
        elif stage == "low latency":
            rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 1, count, use_fp8=False)
            buffer.low_latency_combine(rows, idx, weights, handle)
        elif stage == "reconnect":
            for masked in (True, False):
                other = (self._ctx.rank + 1) % count
                buffer.low_latency_update_mask_buffer(other, masked)
            self.run("dispatch")
            self.run("combine")
        else:
            self.buffer = None
            buffer.destroy()

    def works_without(self, ranks: tuple[int, ...]) -> bool:
        """Masks `ranks`; whether the others' rows come then."""
        for rank in ranks:
            self.buffer.low_latency_update_mask_buffer(rank, True)
        self.run("dispatch")
        self.run("combine")
        return bool((self.summed == self._ctx.num_ranks - len(ranks)).all())


def live_until(ctx: RankContext, end: SuddenEnd, timeout: float) -> Ended:
    """One rank's part."""
    from deepep.errors import DeepEPError, PeerTimeoutError

    lives = 0
    while True:
        life = Life(ctx, timeout)
        for stage in STAGES:
            if (ctx.rank, stage, lives) == (end.rank, end.stage, end.life):
                number = signal.SIGKILL if end.effect is Effect.KILL else signal.SIGSTOP
                threading.Timer(end.delay, lambda number=number: os.kill(os.getpid(), number)).start()
            begun = time.monotonic()
            try:
                life.run(stage)
            except DeepEPError as error:
                seconds = time.monotonic() - begun
                named = error.record.waited_on if isinstance(error, PeerTimeoutError) else ()
                works = None
                if life.buffer is not None and named == (end.rank,):
                    works = life.works_without(named)
                return Ended(stage, type(error).__name__, str(error), named, seconds, works)
            masked = () if life.buffer is None else life.buffer.info.masked_ranks
            if masked:
                seconds = time.monotonic() - begun
                return Ended(stage, "", "", masked, seconds, life.works_without(masked))
        lives += 1


def judge_sudden_end(world: World, end: SuddenEnd, timeout: float) -> list[Ended]:
    """Runs lives until the end and what follows; the survivors' accounts.

    Raises:
        Violation: a promise was not kept.
    """
    outcomes = world.try_run(
        live_until,
        end,
        timeout,
        timeout=20 * (timeout + GRACE),
        not_awaited=(end.rank,) if end.effect is Effect.STALL else (),
    )
    survivors = []
    for outcome in outcomes:
        if outcome.rank == end.rank:
            wanted = Status.DIED if end.effect is Effect.KILL else Status.HUNG
            if outcome.status is not wanted:
                raise Violation(f"{end}: {outcome.describe()}", outcome.rank)
            continue
        if not outcome.ok:
            raise Violation(f"{end}: {outcome.describe()}", outcome.rank)
        demand_kept(end, outcome.rank, outcome.value, timeout)
        survivors.append(outcome.value)
    return survivors


def demand_kept(end: SuddenEnd, rank: int, ended: Ended, timeout: float) -> None:
    """Raises Violation unless a survivor's account is as promised."""
    is_kept = ended.error == "PeerTimeoutError" or (not ended.error and ended.stage == "low latency")
    if not is_kept or ended.waited_on != (end.rank,) or ended.works is False:
        raise Violation(f"{end}: rank {rank}: {ended}", rank)
    if ended.seconds > timeout + GRACE:
        raise Violation(f"{end}: rank {rank}: the error took {ended.seconds:.1f} s", rank)
