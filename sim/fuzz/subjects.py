"""Implementations under test: each takes cases and returns what every rank got.

core         the layout rules of csrc/layout, against the reference's, in this process
oracle       the reference's global view, in this process
all_to_all   the reference's all_to_all implementation, in worlds of processes
buffer       deepep.Buffer, in worlds of processes, on any of its backends
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

from deepep.sim.cases.case import Case
from deepep.sim.fuzz.all_to_all_runs import run_all_to_all
from deepep.sim.fuzz.buffer_runs import as_call_in_one_domain, as_call_of_some_buffer, run_buffer
from deepep.sim.rules import oracle
from deepep.sim.rules.checking import Violation
from deepep.sim.rules.observed import RankView
from deepep.sim.rules.oracle import GlobalView
from deepep.sim.rules.reference_rules import check_rules
from deepep.sim.worlds.rank_process import RankContext
from deepep.sim.worlds.world import PendingRun, World

RunRank = Callable[[RankContext, Case], RankView]


class Subject(ABC):
    """Something that can run cases, in two halves, so that worlds work beside the process that judges."""

    name: str
    #: Whether it gives views of its own, which relations between cases can be checked on.
    gives_views = True
    #: Seconds for a batch of cases.
    timeout = 60.0
    #: Fields of its views that it may leave out; None: whatever it likes.
    may_lack: Collection[str] | None = None

    def adapt(self, case: Case) -> Case:
        """The nearest case that this implementation can run."""
        return case

    @abstractmethod
    def start(self, cases: Sequence[Case]) -> Any:
        """Begins to run the cases, which all have the same number of ranks; what `finish` needs."""

    @abstractmethod
    def finish(self, started: Any) -> list[list[RankView]]:
        """Results, by case and rank.

        Raises:
            WorldError: a rank raised, died or hung.
            Violation: the implementation itself found something wrong.
        """

    def observe(self, cases: Sequence[Case]) -> list[list[RankView]]:
        """Both halves."""
        return self.finish(self.start(cases))

    def cancel(self, started: Any) -> None:  # noqa: B027
        """Lets go of what was started and will not be finished."""

    def reset(self) -> None:  # noqa: B027
        """Forgets everything that earlier cases may have left behind."""

    def close(self) -> None:  # noqa: B027
        """Releases what it holds."""


class InProcess(Subject):
    """An implementation that runs in this process: a function from a case to the view of each rank."""

    def __init__(
        self, name: str, observe_case: Callable[[Case], list[RankView]], *, gives_views: bool = True
    ) -> None:
        self.name = name
        self.gives_views = gives_views
        self._observe_case = observe_case

    def start(self, cases: Sequence[Case]) -> Any:
        return list(cases)

    def finish(self, started: Any) -> list[list[RankView]]:
        try:
            return [self._observe_case(case) for case in started]
        except Violation:
            raise
        except Exception as error:  # a case is a legal call: whatever it raises is a finding
            trace = "".join(traceback.format_exception(error))
            raise Violation(trace, rule=type(error).__name__) from error


class InWorld(Subject):
    """An implementation that runs in worlds of rank processes: one world per number of ranks.

    Args:
        name: for people.
        run_rank: what one rank does: `run_rank(ctx, case)` gives its view.
        world_of: the world of so many ranks; default: worlds of its own.
        adapt: the nearest case that it can run.
        timeout: seconds for a batch of cases.
        may_lack: fields of its views that it may leave out; None: whatever it likes.
        transport: of worlds of its own: "gloo" or "nccl".
    """

    def __init__(
        self,
        name: str,
        run_rank: RunRank,
        world_of: Callable[[int], World] | None = None,
        *,
        adapt: Callable[[Case], Case] | None = None,
        timeout: float = 60.0,
        may_lack: Collection[str] | None = None,
        transport: str = "gloo",
    ) -> None:
        self.name = name
        self.timeout = timeout
        self.may_lack = may_lack
        self._transport = transport
        self._run_rank = run_rank
        self._adapt = adapt
        self._own: dict[int, World] = {}
        self._used: dict[int, World] = {}
        self._world_of = world_of or self._own_world

    def adapt(self, case: Case) -> Case:
        return case if self._adapt is None else self._adapt(case)

    def start(self, cases: Sequence[Case]) -> PendingRun | Sequence[Case]:
        """In a world that is busy, with another subject's cases, `finish` does all the work."""
        if not cases or self._world(cases).busy:
            return cases
        return self._submit(cases)

    def finish(self, started: PendingRun | Sequence[Case]) -> list[list[RankView]]:
        if not isinstance(started, PendingRun):
            if not started:
                return []
            started = self._submit(started)
        return [list(views) for views in zip(*started.results(), strict=True)]

    def cancel(self, started: PendingRun | Sequence[Case]) -> None:
        if isinstance(started, PendingRun):
            started.outcomes()

    def reset(self) -> None:
        for world in self._used.values():
            world.discard()

    def close(self) -> None:
        for world in self._own.values():
            world.close()
        self._own.clear()

    def _submit(self, cases: Sequence[Case]) -> PendingRun:
        return self._world(cases).submit(_run_batch, self._run_rank, list(cases), timeout=self.timeout)

    def _world(self, cases: Sequence[Case]) -> World:
        (num_ranks,) = {case.num_ranks for case in cases}
        world = self._used[num_ranks] = self._world_of(num_ranks)
        return world

    def _own_world(self, num_ranks: int) -> World:
        if num_ranks not in self._own:
            self._own[num_ranks] = World(num_ranks, self._transport)
        return self._own[num_ranks]


def _run_batch(ctx: RankContext, run_rank: RunRank, cases: list[Case]) -> list[RankView]:
    return [run_rank(ctx, case) for case in cases]


def core() -> InProcess:
    """The layout core. It judges itself: it gives no views, but raises Violation."""
    from deepep.sim.rules.layout import PROPERTIES, Laid
    from deepep.sim.rules.windows import CROSSING_PROPERTIES

    def observe(case: Case) -> list[RankView]:
        laid = Laid(case)
        for holds in (*PROPERTIES, *CROSSING_PROPERTIES):
            try:
                holds(laid)
            except Violation as violation:
                name = holds.__name__.replace("_", " ")
                raise Violation(str(violation), violation.rank, violation.place, name) from None
        return [RankView() for _ in range(case.num_ranks)]

    return InProcess("core", observe, gives_views=False)


def reference(modules: GlobalView = oracle.REFERENCE) -> InProcess:
    """The reference's global view, and its rules that no operation shows."""

    def observe(case: Case) -> list[RankView]:
        check_rules(case, modules)
        return oracle.observe(case, modules)

    return InProcess("oracle", observe)


def all_to_all(world_of: Callable[[int], World] | None = None) -> InWorld:
    """The reference's all_to_all implementation over gloo."""
    return InWorld("all_to_all", run_all_to_all, world_of, may_lack=())


def buffer(world_of: Callable[[int], World] | None = None, backend: str | None = None) -> InWorld:
    """deepep.Buffer, on the backend named (None: the one it chooses by itself)."""

    def run_rank(ctx: RankContext, case: Case) -> RankView:
        return run_buffer(ctx, case, backend)

    return InWorld(
        f"buffer:{backend}" if backend else "buffer",
        run_rank,
        world_of,
        adapt=as_call_of_some_buffer if backend == "reference" else as_call_in_one_domain,
        may_lack=("src_rank", "src_token"),  # V1's interface does not say where a row comes from
        transport="nccl" if backend == "cuda" else "gloo",
    )
