"""Implementations under test: each takes cases and tells what every rank got.

oracle       the reference's global view, in this process
all_to_all   the reference's all_to_all implementation, in a world of processes
buffer       deepep.Buffer, in a world of processes, on any of its backends
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from deepep.sim import oracle
from deepep.sim.all_to_all_runs import run_all_to_all
from deepep.sim.buffer_runs import run_buffer
from deepep.sim.cases import Case
from deepep.sim.observed import RankView
from deepep.sim.rank_process import RankContext
from deepep.sim.world import PendingRun, World


class Subject(Protocol):
    """Something that can run cases."""

    name: str

    def adapt(self, case: Case) -> Case:
        """The nearest case that this implementation can run."""

    def observe(self, cases: Sequence[Case]) -> list[list[RankView]]:
        """What each rank got, by case and rank. All cases have the same number of ranks."""


class Oracle:
    """The reference's global view."""

    name = "oracle"

    def adapt(self, case: Case) -> Case:
        return case

    def observe(self, cases: Sequence[Case]) -> list[list[RankView]]:
        return [oracle.observe(case) for case in cases]


class InWorld:
    """An implementation that runs in worlds of rank processes: one world per number of ranks.

    Args:
        name: for people.
        run_rank: what one rank does: `run_rank(ctx, case)` gives its view.
        world_of: the world of so many ranks; default: worlds of its own.
        adapt: the nearest case that it can run.
        timeout: seconds for a batch of cases.
    """

    def __init__(
        self,
        name: str,
        run_rank: Callable[[RankContext, Case], RankView],
        world_of: Callable[[int], World] | None = None,
        *,
        adapt: Callable[[Case], Case] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.name = name
        self.timeout = timeout
        self._run_rank = run_rank
        self._adapt = adapt
        self._own: dict[int, World] = {}
        self._world_of = world_of or self._own_world

    def adapt(self, case: Case) -> Case:
        return case if self._adapt is None else self._adapt(case)

    def observe(self, cases: Sequence[Case]) -> list[list[RankView]]:
        return self.finish(self.start(cases))

    def start(self, cases: Sequence[Case]) -> PendingRun | None:
        """Sends a batch to its world and returns at once, so that the caller can work beside it."""
        if not cases:
            return None
        (num_ranks,) = {case.num_ranks for case in cases}
        return self._world_of(num_ranks).submit(_run_batch, self._run_rank, list(cases), timeout=self.timeout)

    def finish(self, pending: PendingRun | None) -> list[list[RankView]]:
        """The views of a batch that was started, by case and rank."""
        if pending is None:
            return []
        by_rank = pending.results()
        return [list(views) for views in zip(*by_rank, strict=True)]

    def close(self) -> None:
        """Ends the worlds that it made itself."""
        for world in self._own.values():
            world.close()
        self._own.clear()

    def _own_world(self, num_ranks: int) -> World:
        return self._own.setdefault(num_ranks, World(num_ranks))


def _run_batch(ctx: RankContext, run_rank: Any, cases: list[Case]) -> list[RankView]:
    return [run_rank(ctx, case) for case in cases]


def all_to_all(world_of: Callable[[int], World] | None = None) -> InWorld:
    """The reference's all_to_all implementation over gloo."""
    return InWorld("all_to_all", run_all_to_all, world_of)


def buffer(world_of: Callable[[int], World] | None = None, backend: str | None = None) -> InWorld:
    """deepep.Buffer, on the backend named (None: the one it chooses by itself)."""

    def run_rank(ctx: RankContext, case: Case) -> RankView:
        return run_buffer(ctx, case, backend)

    return InWorld(f"buffer ({backend})" if backend else "buffer", run_rank, world_of, adapt=as_buffer_call)


def as_buffer_call(case: Case) -> Case:
    """The nearest case in terms of V1's interface: nodes of eight ranks, and one way of reducing."""
    return case.with_options(ranks_per_node=8, reduce="token")
