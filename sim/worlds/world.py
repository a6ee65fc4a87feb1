"""A world of rank processes that lives across examples.

`World(4)` keeps four processes with a torch process group between them and runs a function on all of
them, again and again. What makes it fit for fuzzing and for fault tests:

- ranks are forked from a server that has torch loaded already, so a world is up in a fraction of a second;
- functions and arguments travel by value (cloudpickle): lambdas, closures, a test module's functions;
- the rendezvous store survives the death of any rank;
- a rank that dies is noticed through its process handle at once, not by a time-out of the others;
- a rank that hangs or crashes is reported with the Python stack it is in;
- after a failure nothing of the old world is reused: the next run starts on fresh processes.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from torch._C._distributed_c10d import TCPStore

from deepep.runtime.control import processes
from deepep.runtime.control.transport import serve_store
from deepep.sim.links.emulated import EmulatedNetwork
from deepep.sim.worlds.folder import OwnFolder
from deepep.sim.worlds.outcomes import Outcome, Status, failure_of
from deepep.sim.worlds.rank_handle import RankHandle
from deepep.sim.worlds.rank_process import RankContext, RankSpec
from deepep.sim.worlds.travel import pack

__all__ = ["PendingRun", "RankContext", "World"]

_open_worlds: weakref.WeakSet[World] = weakref.WeakSet()


class World:
    """`num_ranks` processes, one rank each, with a process group between them.

    Args:
        num_ranks: R, at least 1.
        backend: torch.distributed backend: "gloo" on CPU, "nccl" with rank r on GPU r modulo the number of
            GPUs (deepep.sim.worlds.gpus).
        timeout: seconds a run may take unless the run says otherwise; also the process group's own time-out.
        grace: seconds the other ranks get to end by themselves once one rank has failed in `run`.
        store: where the ranks meet: "file", a file in a folder of the world's own, or "tcp", a TCPStore that
            this process serves, as torchrun does. Both survive any rank. A client of the latter looks up its
            peer's name, which takes five seconds where no name server answers.
        network: an emulated one for the ranks to be in (deepep.sim.links.emulated), which meet in a file.

    A world starts on first use, is started again after a failure, and is closed by `close`, by leaving its
    `with` block, or at interpreter exit. One run at a time; only `kill`, `stop` and `resume` may be called
    from other threads.
    """

    def __init__(
        self,
        num_ranks: int,
        backend: str = "gloo",
        *,
        timeout: float = 60.0,
        grace: float = 2.0,
        store: str = "file",
        network: EmulatedNetwork | None = None,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"num_ranks: got {num_ranks}; allowed: 1 or more")
        if store not in ("file", "tcp"):
            raise ValueError(f"store: got {store!r}; allowed: 'file', 'tcp'")
        if network is not None and (store != "file" or network.cluster.num_ranks != num_ranks):
            raise ValueError("network: allowed: one of as many ranks, with store='file'")
        self.num_ranks = num_ranks
        self.backend = backend
        self.network = network
        self.timeout = timeout
        self.grace = grace
        #: How often this world's processes were started: 1 after the first run, more after failures.
        self.generation = 0
        self._ranks: list[RankHandle] = []
        self._store_kind = store
        self._store: TCPStore | None = None
        self._folder: OwnFolder | None = None
        self._pending: PendingRun | None = None
        self._creator = os.getpid()
        _open_worlds.add(self)
        processes.leak_in_children(self)

    # life

    def __enter__(self) -> World:
        self.ensure_started()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def ranks(self) -> list[RankHandle]:
        """The rank processes (attributes `rank`, `pid`, `alive`), started if they are not."""
        self.ensure_started()
        return self._ranks

    @property
    def healthy(self) -> bool:
        """True if every rank process is there and between runs."""
        return bool(self._ranks) and self._pending is None and all(r.alive for r in self._ranks)

    @property
    def busy(self) -> bool:
        """True if a run is in progress whose results have not been taken."""
        return self._pending is not None

    def ensure_started(self) -> None:
        """Starts the rank processes if none run, or if one of them is gone.

        Raises:
            WorldError: a rank did not come up.
        """
        if self._pending is not None or self.healthy:
            return
        self.discard()
        self.generation += 1
        self._folder = OwnFolder("deepep-world-")
        place = f"file:{self._folder.name}/store"
        if self._store_kind == "tcp":
            self._store = serve_store(loopback=True, timeout=self.timeout)
            place = f"tcp:{self._store.port}"
        specs = [
            RankSpec(
                rank=rank,
                num_ranks=self.num_ranks,
                backend=self.backend,
                store=place,
                timeout=self.timeout,
                environment=dict(os.environ),
                stack_file=str(Path(self._folder.name) / f"stack-{rank}"),
                namespace=self.network.namespaces[rank] if self.network is not None else "",
            )
            for rank in range(self.num_ranks)
        ]
        self._ranks = [RankHandle(spec) for spec in specs]
        PendingRun(self, self.timeout, f"starting {self.num_ranks} ranks ({self.backend})").results()

    def close(self) -> None:
        """Lets the ranks leave in order, ends those that do not within two seconds. Idempotent."""
        if self.healthy:
            for rank in self._ranks:
                rank.send(b"")
            deadline = time.monotonic() + 2.0
            for rank in self._ranks:
                rank.process.join(max(0.0, deadline - time.monotonic()))
        self.discard()

    def forked(self) -> None:
        """In a child of this process: the ranks are the parent's."""
        for rank in self._ranks:
            rank.forked()

    def discard(self) -> None:
        """Ends the rank processes without asking them. The next run starts new ones."""
        for rank in self._ranks:
            rank.end()
        self._ranks = []
        self._pending = None
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    # runs

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
            WorldError: a rank raised; `.failures` has the exceptions by rank, the message the traceback.
            RankDied: a rank's process ended.
            WorldTimeout: a rank did not return within `timeout` seconds; the message has its stack.

        After any of these the world is rebuilt on its next use: the run's collectives may be half done.
        """
        return self.submit(fn, *args, timeout=timeout, per_rank=per_rank, **kwargs).results()

    def try_run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        per_rank: Sequence[tuple[Any, ...]] | None = None,
        not_awaited: Collection[int] = (),
        **kwargs: Any,
    ) -> list[Outcome]:
        """As `run`, but waits for every rank to end somehow, and returns how each did instead of raising.

        For fault tests: the rank that is killed has the status "died", the others what they returned or
        raised. Ranks in `not_awaited` count as hung if they still run when all others have ended.
        """
        pending = self.submit(fn, *args, timeout=timeout, per_rank=per_rank, **kwargs)
        return pending.outcomes(not_awaited=not_awaited)

    def submit(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        per_rank: Sequence[tuple[Any, ...]] | None = None,
        **kwargs: Any,
    ) -> PendingRun:
        """Starts a run and returns at once. Its `results()` or `outcomes()` must be taken before the next."""
        if self._pending is not None:
            raise RuntimeError("a run is in progress: take its results() first")
        if per_rank is not None and len(per_rank) != self.num_ranks:
            raise ValueError(
                f"per_rank: got {len(per_rank)} entries; allowed: one per rank ({self.num_ranks})"
            )
        self.ensure_started()
        shared = pack((fn, args, kwargs))
        own = [pack(tuple(p)) for p in per_rank] if per_rank is not None else [b""] * self.num_ranks
        what = f"{getattr(fn, '__name__', fn)!s} on {self.num_ranks} ranks"
        pending = PendingRun(self, self.timeout if timeout is None else timeout, what)
        self._pending = pending
        for rank, extra in zip(self._ranks, own, strict=True):
            rank.send(len(shared).to_bytes(8, "little") + shared + extra)
        return pending

    # faults from outside

    def kill(self, rank: int) -> None:
        """Kills a rank's process (SIGKILL), also while a run is in progress; on return it is gone."""
        self._signal(rank, signal.SIGKILL)
        wait([self._ranks[rank].process.sentinel])

    def stop(self, rank: int) -> None:
        """Freezes a rank's process (SIGSTOP) until `resume`."""
        self._signal(rank, signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        """Lets a frozen rank go on."""
        self._signal(rank, signal.SIGCONT)

    def _signal(self, rank: int, number: int) -> None:
        if not self._ranks:
            raise RuntimeError("the world has not started")
        self._ranks[rank].signal(number)


class PendingRun:
    """A run in progress: what `World.submit` returns."""

    def __init__(self, world: World, timeout: float, what: str) -> None:
        self._world = world
        self._what = what
        self._started = time.monotonic()
        self._timeout = timeout

    def results(self) -> list[Any]:
        """Waits for all ranks and returns what they returned, by rank; raises as `World.run` does."""
        outcomes = self.outcomes(fail_fast=True)
        if not all(o.ok for o in outcomes):
            raise failure_of(outcomes, self._what)
        return [o.value for o in outcomes]

    def outcomes(self, *, fail_fast: bool = False, not_awaited: Collection[int] = ()) -> list[Outcome]:
        """Waits until every rank has returned, raised or died, or time is up; returns which did what.

        With `fail_fast` the ranks that still run when one has failed get only the world's grace. Ranks in
        `not_awaited` count as hung if they still run when all others have ended.
        """
        world = self._world
        deadline = self._started + self._timeout
        done: dict[int, Outcome] = {}
        while not done.keys() >= set(range(world.num_ranks)) - set(not_awaited):
            waiting = [r for r in world._ranks if r.rank not in done]
            ready = wait(
                [w for r in waiting for w in (r.connection, r.process.sentinel)],
                max(0.0, deadline - time.monotonic()),
            )
            if not ready:
                break
            for rank in waiting:
                if rank.connection in ready or rank.process.sentinel in ready:
                    done[rank.rank] = outcome = rank.receive(time.monotonic() - self._started)
                    if fail_fast and not outcome.ok:
                        deadline = min(deadline, time.monotonic() + world.grace)
        seconds = time.monotonic() - self._started
        for rank in world._ranks:
            if rank.rank not in done:
                stack = "" if rank.rank in not_awaited else rank.stack()
                done[rank.rank] = Outcome(rank.rank, Status.HUNG, traceback=stack, seconds=seconds)
        world._pending = None
        outcomes = [done[rank] for rank in range(world.num_ranks)]
        if not all(o.ok for o in outcomes):
            world.discard()
        return outcomes


@atexit.register
def _close_all() -> None:
    for world in list(_open_worlds):
        if world._creator == os.getpid():
            world.close()
