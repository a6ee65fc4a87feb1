"""Meetings: who is late, and the connections to the store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from harness import constructions
from harness.rank_threads import Ranks

import deepep
from deepep.runtime.control import connecting, meeting, transport
from deepep.runtime.control.meeting import Absent, ControlStore, Meeting
from deepep.runtime.control.transport import Connections


class Clock:
    """A clock that moves when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowStore(ControlStore):
    """After the call of a number, `between` happens, before the caller goes on."""

    def __init__(self, number: int, between: Callable[[], None]) -> None:
        super().__init__(dist.HashStore(), "test")
        self._left, self._between = number, between

    def has(self, key: str) -> bool:
        found = super().has(key)
        self._left -= 1
        if self._left == 0:
            self._between()
        return found


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("is_dead", [False, True])
def test_what_was_posted_in_time_is_seen_however_late_one_looks(
    monkeypatch: pytest.MonkeyPatch, number: int, is_dead: bool
) -> None:
    """A rank has looked, and stands still until the deadline is over; meanwhile the other posts, in time."""
    clock, dead = Clock(), set()
    monkeypatch.setattr(meeting, "time", clock)

    def between() -> None:
        store.set("stage/1", "here")
        clock.now += 0.0 if is_dead else 100.0
        dead.update({1} if is_dead else ())

    store = SlowStore(number, between)
    met = Meeting(store, 0, (0, 1), dead.__contains__, lambda: True)
    assert met.exchange("stage", "me", 50.0, "they did not come") == {0: b"me", 1: b"here"}


def test_who_does_not_post_is_missing_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(meeting, "time", clock)
    met = Meeting(ControlStore(dist.HashStore(), "test"), 0, (0, 1), lambda rank: False, lambda: True)
    met.post("stage", "")
    with pytest.raises(Absent) as absent:
        met.collect("stage", (0, 1), 50.0)
    assert absent.value.missing == (1,)
    assert 50.0 <= clock.now < 51.0


def test_constructions_use_the_connections_that_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A new one reads all that a store in a file has ever held, so each construction would take longer."""
    made: list[Any] = []
    real = transport._another

    def another(store: Any) -> Any:
        made.append(store)
        return real(store)

    monkeypatch.setattr(transport, "_another", another)
    ranks, counts = Ranks(3, dist.FileStore(str(tmp_path / "store"), -1)), []

    def part(rank: int) -> None:
        buffer = deepep.Buffer(ranks.groups[rank], timeout=60.0, enable_shrink=True)
        buffer.runtime._control.barrier(deepep.runtime.requests.Schedule())
        buffer.destroy()

    for _ in range(4):
        assert ranks.run(part) == [None] * 3
        counts.append(len(made))
    assert counts == [6] * 4  # of each rank one that is asked, and one that is waited on


def test_a_connection_that_is_waited_on_is_not_given_to_another(tmp_path: Path) -> None:
    connections = Connections(dist.FileStore(str(tmp_path / "store"), -1))
    waits, entered = threading.Event(), threading.Event()
    lent: list[Any] = []

    def build() -> Any:
        with connections.lease() as store:
            lent.append(store)
            entered.set()
            waits.wait(60.0)

    attempt = connecting.Attempt(build)
    assert entered.wait(60.0)
    attempt.give_up()
    assert connections.take() is not lent[0]
    waits.set()
    assert attempt.wait(60.0)
    assert connections.take() is lent[0]


@pytest.mark.alone
def test_constructions_and_reconnections_in_a_row() -> None:
    """A moment of what `python tests/harness/constructions.py` does 20,000 times."""
    assert "none failed" in constructions.run(3, 60, 2, {"backend": "reference"})
