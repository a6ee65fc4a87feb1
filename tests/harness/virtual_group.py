"""Ranks in virtual time with the library's own control plane: meetings, membership, links, operations.

Virtual are the clock, the store, which takes a drawn time for every call, gloo, whose connections may fail by
themselves, and deaths. One thread a rank; its communication queue runs its jobs at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepep.runtime.completion import Completion, HostCompletion
from deepep.runtime.control import agreement, connecting, issue, liveness, meeting, membership, settling
from deepep.runtime.control.comm_queue import CommQueue
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.meeting import ControlStore
from deepep.runtime.control.membership import Membership
from deepep.runtime.control.transport import Connections, LinkError
from deepep.runtime.requests import Schedule as Timing
from harness.virtual_time import Gone, Schedule

TIMEOUT = 4.0
FLAKY = 8
"""One of so many first and second tries of a rank to connect fails, with nobody to blame."""


class VirtualStore:
    """A store that serves one call after the other, each after a drawn time, and answers after another."""

    def __init__(self, schedule: Schedule) -> None:
        self.data: dict[str, bytes] = {}
        self._schedule = schedule

    def _serve(self, call: Callable[[], Any]) -> Any:
        self._schedule.step()
        answer = call()
        self._schedule.step()
        return answer

    def set(self, key: str, value: str) -> None:
        self._serve(lambda: self.data.__setitem__(key, value.encode()))

    def get(self, key: str) -> bytes:
        return self._serve(lambda: self.data[key])

    def check(self, keys: list[str]) -> bool:
        return self._serve(lambda: all(key in self.data for key in keys))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        def call() -> bytes:
            held = self.data.get(key)
            if held == expected.encode() or (held is None and not expected):
                self.data[key] = desired.encode()
            return self.data.get(key, expected.encode())

        return self._serve(call)

    def delete_key(self, key: str) -> bool:
        return self._serve(lambda: self.data.pop(key, None) is not None)


class Wires:
    """Connections of a group's members, who are told apart by their positions, in a try of that number."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.came: set[int] = set()
        self.ranks: set[int] = set()
        self.is_closed = False
        self.rounds: dict[int, dict[int, torch.Tensor]] = {}
        self.done = [0] * size


class VirtualGroup:
    """One member's end of them."""

    def __init__(self, wires: Wires, position: int, seconds: float) -> None:
        self.wires, self.position, self.seconds = wires, position, seconds


class InlineQueue(CommQueue):
    """Runs each job when it is submitted."""

    def submit(self, job: Callable[[], None], tensors: Iterable[torch.Tensor | None] = ()) -> Completion:
        future: Future[None] = Future()
        try:
            job()
        except Gone:
            raise
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        return HostCompletion(future)

    def wait_for(self, after: Completion | None, owns_outputs: bool) -> None:
        pass

    def allocating(self, on_queue: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def close(self, seconds: float) -> bool:
        return True


class VirtualRanks:
    """Ranks of one group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, schedule: Schedule, num_ranks: int) -> None:
        self.schedule, self.num_ranks = schedule, num_ranks
        self.store = VirtualStore(schedule)
        store: Any = self.store
        self._stores = [(ControlStore(store, "deepep"), Connections(store)) for _ in range(num_ranks)]
        self._wires: dict[str, Wires] = {}
        clock = SimpleNamespace(monotonic=lambda: schedule.now, sleep=schedule.sleep)
        for module in (meeting, membership, settling, connecting):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(connecting, "PrefixStore", lambda prefix, store: prefix)
        monkeypatch.setattr(connecting, "private_group", self._connect)
        monkeypatch.setattr(connecting, "Attempt", lambda build: VirtualAttempt(build, self))
        monkeypatch.setattr(connecting, "set_timeout", self._set_timeout)
        for module in (membership, connecting):
            monkeypatch.setattr(module, "hang_up", self._hang_up)
        monkeypatch.setattr(membership.Link, "all_gather", lambda link, t: self._all_gather(link, t))
        monkeypatch.setattr(issue, "ThreadQueue", lambda *_: InlineQueue())
        monkeypatch.setattr(liveness, "identity", lambda: f"here all {schedule.current} 0")
        monkeypatch.setattr(liveness, "is_dead", self._is_dead)

    def _is_dead(self, theirs: str, mine: str) -> bool:
        return bool(theirs) and self.schedule.is_dead(int(theirs.split()[2]))

    def _connect(self, store: Any, position: int, size: int, seconds: float, device_type: str) -> Any:
        wires = self._wires.setdefault(store, Wires(int(store.rpartition("/")[2]), size))
        wires.came.add(position)
        wires.ranks.add(self.schedule.current)
        return VirtualGroup(wires, position, seconds)

    def _set_timeout(self, group: VirtualGroup, seconds: float) -> None:
        group.seconds = seconds

    def _hang_up(self, group: VirtualGroup) -> None:
        group.wires.is_closed = True
        self.schedule.step()

    def hang_up_of(self, rank: int) -> None:
        """Closes what a rank that is no more had open."""
        for wires in self._wires.values():
            wires.is_closed |= rank in wires.ranks

    def _all_gather(self, link: Any, t: torch.Tensor) -> dict[int, torch.Tensor]:
        group: VirtualGroup = link.group
        wires = group.wires
        self.schedule.step()
        if wires.is_closed:
            raise LinkError("Connection closed by peer")
        number = wires.done[group.position]
        wires.done[group.position] += 1
        given = wires.rounds.setdefault(number, {})
        given[group.position] = t.clone()

        def is_over() -> bool:
            return len(given) == wires.size or wires.is_closed

        came = self.schedule.wait(is_over, group.seconds)
        if len(given) < wires.size:
            raise LinkError("Connection closed by peer" if came else "Timed out waiting")
        return dict(zip(link.members, (given[p] for p in range(wires.size)), strict=True))

    def construct(self, rank: int, problem: Any = None) -> ControlPlane:
        """Constructs as construction.construct does, without an engine."""
        ours = Membership(*self._stores[rank], rank, self.num_ranks, TIMEOUT)
        agreement.agree(ours, "arrived", {}, problem, {"backend": "virtual"})
        session: Any = SimpleNamespace(
            device=torch.device("cpu"), rank=rank, num_ranks=self.num_ranks, stream=None
        )
        control = ControlPlane(session, ours, {"backend": "virtual"}, masks=True)
        try:
            control.agree({"reduction": "none"})
        except BaseException:
            control.close(0.0)
            raise
        return control

    def barrier(self, control: ControlPlane) -> None:
        """An operation of those that are not masked."""
        control.barrier(Timing())
        self.schedule.refresh()


class VirtualAttempt:
    """An attempt to connect: it ends when all members have come to it, unless it is drawn to fail."""

    def __init__(self, build: Callable[[], VirtualGroup], ranks: VirtualRanks) -> None:
        self._schedule = ranks.schedule
        self._built: VirtualGroup = build()
        self.group: VirtualGroup | None = None
        is_lost = self._built.wires.number < 2 and self._schedule.random.randrange(FLAKY) == 0
        self.error = "connectFullMesh failed, Connection closed by peer" if is_lost else ""
        self._ends = self._schedule.now + self._schedule.random.uniform(0.0, 0.05)

    def wait(self, seconds: float) -> bool:
        wires = self._built.wires

        def is_over() -> bool:
            came = bool(self.error) or wires.is_closed or len(wires.came) == wires.size
            return came and self._schedule.now >= self._ends

        if not self._schedule.wait(is_over, seconds):
            return False
        if not self.error and not wires.is_closed:
            self.group = self._built
        return True

    def give_up(self) -> None:
        self._built.wires.is_closed = True
