"""A world in one process: ranks as threads, for rules and backends that need no rank processes."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepep.sim.worlds.outcomes import Outcome, Status, failure_of
from deepep.sim.worlds.rank_process import RankContext


@dataclass
class _Meeting:
    """State that the ranks of one virtual group share."""

    barrier: threading.Barrier
    objects: list[Any]


@dataclass(frozen=True)
class VirtualGroup:
    """The process-group of ranks that are threads of one process: enough to exchange addresses and to agree.

    Attributes:
        rank, num_ranks: this rank, and R.
    """

    rank: int
    num_ranks: int
    _meeting: _Meeting = field(repr=False, compare=False)

    @staticmethod
    def create(num_ranks: int) -> list[VirtualGroup]:
        """One group seen by each of its ranks, by rank."""
        meeting = _Meeting(threading.Barrier(num_ranks), [None] * num_ranks)
        return [VirtualGroup(rank, num_ranks, meeting) for rank in range(num_ranks)]

    def barrier(self, timeout: float | None = None) -> None:
        """Waits for all ranks.

        Raises:
            threading.BrokenBarrierError: a rank failed, or did not arrive within `timeout` seconds; from then
                on the group is broken for good.
        """
        self._meeting.barrier.wait(timeout)

    def all_gather_object(self, value: Any, timeout: float | None = None) -> list[Any]:
        """Every rank's value, by rank; the objects themselves, not copies.

        Raises:
            threading.BrokenBarrierError: as `barrier`.
        """
        self._meeting.objects[self.rank] = value
        self.barrier(timeout)
        gathered = list(self._meeting.objects)
        self.barrier(timeout)  # the list is not written again before everyone has read it
        return gathered

    def abort(self) -> None:
        """Breaks the group: whoever waits in it, or ever will, gets a BrokenBarrierError."""
        self._meeting.barrier.abort()


class ThreadWorld:
    """The interface of `World`, with ranks as threads; `ctx.group` is a VirtualGroup.

    A thread cannot be killed: a rank that hangs is reported, and its thread left behind (as a daemon).
    """

    def __init__(self, num_ranks: int, *, timeout: float = 60.0, device: torch.device | str = "cpu") -> None:
        if num_ranks < 1:
            raise ValueError(f"num_ranks: got {num_ranks}; allowed: 1 or more")
        self.num_ranks = num_ranks
        self.timeout = timeout
        self.device = torch.device(device)
        self._contexts: list[RankContext] = []

    def __enter__(self) -> ThreadWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts = []

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        per_rank: Sequence[tuple[Any, ...]] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Calls `fn(ctx, *args, *per_rank[rank], **kwargs)` on every rank and returns the results by rank.

        Raises:
            WorldError, WorldTimeout: as `World.run`.
        """
        outcomes = self.try_run(fn, *args, timeout=timeout, per_rank=per_rank, **kwargs)
        if not all(o.ok for o in outcomes):
            raise failure_of(outcomes, f"{getattr(fn, '__name__', fn)!s} on {self.num_ranks} threads")
        return [o.value for o in outcomes]

    def try_run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        per_rank: Sequence[tuple[Any, ...]] | None = None,
        **kwargs: Any,
    ) -> list[Outcome]:
        """As `run`, but returns how each rank ended instead of raising."""
        if not self._contexts:
            groups = VirtualGroup.create(self.num_ranks)
            self._contexts = [RankContext(group.rank, self.num_ranks, group, self.device) for group in groups]
        started = time.monotonic()
        outcomes: list[Outcome | None] = [None] * self.num_ranks

        def work(context: RankContext) -> None:
            own = per_rank[context.rank] if per_rank is not None else ()
            try:
                value = fn(context, *args, *own, **kwargs)
            except BaseException as error:  # whatever it is, the caller has to learn of it
                context.group.abort()
                seconds = time.monotonic() - started
                trace = traceback.format_exc()
                outcomes[context.rank] = Outcome(
                    context.rank, Status.RAISED, error=error, traceback=trace, seconds=seconds
                )
            else:
                seconds = time.monotonic() - started
                outcomes[context.rank] = Outcome(context.rank, Status.RETURNED, value=value, seconds=seconds)

        threads = [
            threading.Thread(target=work, args=(c,), name=f"deepep-rank-{c.rank}", daemon=True)
            for c in self._contexts
        ]
        for thread in threads:
            thread.start()
        deadline = started + (self.timeout if timeout is None else timeout)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        ended = [
            o if o is not None else Outcome(rank, Status.HUNG, seconds=time.monotonic() - started)
            for rank, o in enumerate(outcomes)
        ]
        if not all(o.ok for o in ended):
            self._contexts[0].group.abort()
            self._contexts = []  # the next run gets a new group and empty scratch
        return ended
