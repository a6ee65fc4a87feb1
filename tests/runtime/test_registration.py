"""Registrations: what a member of a run finds in the store of processes that would take part."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from deepep.errors import MismatchError
from deepep.runtime.control import liveness
from deepep.runtime.control.invitation import Invitation
from deepep.runtime.control.meeting import ControlStore, StoreError
from deepep.runtime.control.registration import Newcomer, Registrations


class Counted(ControlStore):
    """A store that counts the calls."""

    calls = 0
    is_lost = False

    def _call(self, call: Any, key: str) -> Any:
        self.calls += 1
        if self.is_lost:
            raise StoreError("gone")
        return super()._call(call, key)


@pytest.fixture
def store() -> Counted:
    return Counted(HashStore(), "run")


def test_one_key_a_step_unless_there_is_news(store: Counted) -> None:
    seen = Registrations(store, 4)
    assert seen.look({1}) == []
    store.calls = 0
    assert seen.look({1}) == []
    assert store.calls == 1
    newcomer = Newcomer(store, 1, {"config": "a"})
    assert [found.rank for found in seen.look({1})] == [1]
    newcomer.close()
    assert seen.look({1}) == []
    store.calls = 0
    assert seen.look({1}) == []
    assert store.calls == 2  # there is a word of news, an old one


def test_a_rank_may_become_vacant_later(store: Counted) -> None:
    seen, _ = Registrations(store, 4), Newcomer(store, 1, {})
    assert seen.look({2}) == []
    assert [found.rank for found in seen.look({1, 2})] == [1]


def test_who_differs_is_told(store: Counted) -> None:
    seen, newcomer = Registrations(store, 4), Newcomer(store, 1, {"config": "a", "parameters": "b"})
    (found,) = seen.look({1})
    found.check({"config": "a"}, 0)
    with pytest.raises(MismatchError, match="rank 1: parameters: got b; allowed: c, as on rank 0") as caught:
        found.check({"config": "a", "parameters": "c"}, 0)
    seen.refuse(found, caught.value)
    with pytest.raises(MismatchError, match="got b; allowed: c"):
        newcomer.wait(time.monotonic() + 60.0)
    assert seen.look({1}) == []


def test_an_invitation_serves_once(store: Counted) -> None:
    seen, newcomer = Registrations(store, 4), Newcomer(store, 1, {})
    invitation = Invitation("7", (1,), (0, 2), 4, "", "", {}, {1: "somebody"})
    seen.post(invitation)
    assert newcomer.wait(time.monotonic()) is None
    registrations = seen.look({1})
    seen.call(registrations, "7")
    assert newcomer.wait(time.monotonic() + 60.0) == invitation == seen.invitation("7")
    assert newcomer.wait(time.monotonic() + 0.05) is None
    seen.settle(registrations, "7", [])
    assert seen.look({1}) == registrations
    seen.settle(registrations, "7", [1])
    assert seen.look({1}) == []
    with pytest.raises(StoreError):
        seen.invitation("7")


def test_the_last_process_has_the_rank(store: Counted) -> None:
    seen, first = Registrations(store, 4), Newcomer(store, 1, {"config": "first"})
    Newcomer(store, 1, {"config": "second"})
    first.close()
    assert [found.statement for found in seen.look({1})] == [{"config": "second"}]


def test_who_is_dead_or_of_another_version_is_passed_over(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        here = liveness.identity().split()
        theirs = f"{here[0]} {here[1]} {process.pid} 1"
        monkeypatch.setattr(liveness, "identity", lambda: theirs)
        Newcomer(store, 1, {})
        monkeypatch.undo()
        process.kill()
    store.set("registered/2", '{"rank": 2, "color": "red"}')
    store.set("registered/3", "[")
    assert Registrations(store, 4).look({1, 2, 3}) == []
    assert not store.has("registered/1")


def test_steps_go_on_without_a_store(store: Counted) -> None:
    seen = Registrations(store, 4)
    store.is_lost = True
    assert seen.look({1}) == []
    store.calls = 0
    assert seen.look({1}) == []
    assert store.calls == 0
