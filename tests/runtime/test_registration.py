"""Registrations: what a member of a run finds in the store of processes that would take part."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from deepep.errors import MismatchError, RangeError
from deepep.runtime.control import admission, liveness, registration
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
    newcomer = Newcomer(store, 1, {"config": "a"}, time.monotonic() + 60.0)
    assert [found.rank for found in seen.look({1})] == [1]
    newcomer.close()
    assert seen.look({1}) == []
    store.calls = 0
    assert seen.look({1}) == []
    assert store.calls == 2  # there is a word of news, an old one


def test_a_rank_may_become_vacant_later(store: Counted) -> None:
    seen, _ = Registrations(store, 4), Newcomer(store, 1, {}, time.monotonic() + 60.0)
    assert seen.look({2}) == []
    assert [found.rank for found in seen.look({1, 2})] == [1]


def test_who_differs_is_told(store: Counted) -> None:
    seen, newcomer = (
        Registrations(store, 4),
        Newcomer(store, 1, {"config": "a", "parameters": "b"}, time.monotonic() + 60.0),
    )
    (found,) = seen.look({1})
    found.check({"config": "a"}, 0)
    with pytest.raises(MismatchError, match="rank 1: parameters: got b; allowed: c, as on rank 0") as caught:
        found.check({"config": "a", "parameters": "c"}, 0)
    seen.refuse(found, caught.value)
    with pytest.raises(MismatchError, match="got b; allowed: c"):
        newcomer.wait(time.monotonic() + 60.0)
    assert seen.look({1}) == []


def test_an_invitation_serves_once(store: Counted) -> None:
    seen, newcomer = Registrations(store, 4), Newcomer(store, 1, {}, time.monotonic() + 60.0)
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


def registered(
    store: Counted, identity: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 60.0
) -> Newcomer:
    """A newcomer for rank 1 as a process with this identity registers it."""
    with monkeypatch.context() as patched:
        patched.setattr(liveness, "identity", lambda: identity)
        patched.setattr(liveness, "process_name", lambda: f"process of {identity.split()[0]}")
        return Newcomer(store, 1, {}, time.monotonic() + seconds)


def test_a_second_process_of_this_host_is_refused_with_both_named(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = liveness.identity().split()
    with subprocess.Popen(["sleep", "60"]) as process:
        start = liveness._start_time(process.pid)
        first = registered(store, f"{here[0]} {here[1]} {process.pid} {start}", monkeypatch)
        with pytest.raises(RangeError, match=r"rank 1: rank: got 1 for process .*: process of .* has"):
            Newcomer(store, 1, {}, time.monotonic() + 60.0)
        assert [found.name for found in Registrations(store, 4).look({1})] == [first._made.name]
        process.kill()
        process.wait()
    second = Newcomer(store, 1, {}, time.monotonic() + 60.0)
    first.close()
    assert [found.name for found in Registrations(store, 4).look({1})] == [second._made.name]


def test_a_second_process_of_another_host_is_refused_while_the_first_waits(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = registered(store, "host-a ns 1 1", monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.wait, time.monotonic() + 60.0)
        with pytest.raises(RangeError, match=r"process of host-b; .*: process of host-a has registered"):
            registered(store, "host-b ns 1 1", monkeypatch)
        Registrations(store, 4).refuse(first._made, RangeError("config", "a", "b"))  # it still listens
        with pytest.raises(RangeError, match="config"):
            waiting.result()
    first.close()
    assert registered(store, "host-b ns 1 1", monkeypatch)._made.process.endswith("host-b")


def test_who_does_not_answer_loses_its_rank_and_learns_to_whom(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "_ANSWERS_WITHIN", 0.05)
    silent = registered(store, "host-a ns 1 1", monkeypatch)
    second = registered(store, "host-b ns 1 1", monkeypatch)
    assert [found.name for found in Registrations(store, 4).look({1})] == [second._made.name]
    with pytest.raises(RangeError, match=r"process of host-a; .*: process of host-b has registered"):
        silent.wait(time.monotonic() + 60.0)


def test_a_store_that_does_not_replace_is_no_store(store: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "settle", lambda key, expected, desired: expected.encode())
    with pytest.raises(StoreError, match="compare_set"):
        Newcomer(store, 1, {}, time.monotonic() + 60.0)


def test_who_has_been_called_is_joining_and_keeps_its_rank(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "_ANSWERS_WITHIN", 0.0)
    registered(store, "host-a ns 1 1", monkeypatch)
    seen = Registrations(store, 4)
    seen.call(seen.look({1}), "7")
    with pytest.raises(RangeError, match="host-a has registered"):
        registered(store, "host-b ns 1 1", monkeypatch, seconds=0.1)


def test_who_is_no_longer_called_has_time_to_answer(store: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """An admission that failed may have taken longer than a silent process has."""
    first, seen, clock = registered(store, "host-a ns 1 1", monkeypatch), Registrations(store, 4), [0.0]
    found = seen.look({1})
    seen.call(found, "7")

    def sleep(seconds: float) -> None:
        clock[0] += 2.0
        if clock[0] == 4.0:
            seen.settle(found, "7", ())
        elif clock[0] == 6.0:
            asking = store.get(f"asked/{first._made.name}")
            assert asking is not None
            store.set(f"waits/{asking.decode()}", "")

    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep)
    monkeypatch.setattr(registration, "time", fake)
    with pytest.raises(RangeError, match="host-a has registered"):
        registered(store, "host-b ns 1 1", monkeypatch)
    assert [each.name for each in seen.look({1})] == [first._made.name]


def test_a_question_that_another_process_replaces_is_asked_again(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "_ANSWERS_WITHIN", 20.0)
    first, post, asked = registered(store, "host-a ns 1 1", monkeypatch), store.set, []

    def replaced(key: str, value: str) -> None:
        if key.startswith("asked/"):
            asked.append(value)
            value = "a third one" if len(asked) == 1 else value
        post(key, value)

    monkeypatch.setattr(store, "set", replaced)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.wait, time.monotonic() + 60.0)
        with pytest.raises(RangeError, match="host-a has registered"):
            registered(store, "host-b ns 1 1", monkeypatch)
        Registrations(store, 4).refuse(first._made, RangeError("config", "a", "b"))
        with pytest.raises(RangeError, match="config"):
            waiting.result()


def test_a_second_process_of_this_host_does_not_join_by_the_same_invitation() -> None:
    base, invitation = HashStore(), Invitation("7", (1,), (0, 2), 4, "", "", {}, {})
    here = liveness.identity().split()
    with subprocess.Popen(["sleep", "60"]) as process:
        start = liveness._start_time(process.pid)
        claim = json.dumps([f"{here[0]} {here[1]} {process.pid} {start}", "process of another shell"])
        admission.meeting_store(base, invitation).set("claim/1", claim)
        with pytest.raises(
            RangeError, match=r"rank 1: .* for process \d+ on .*: process of another shell is"
        ):
            admission.enter(invitation, 1, base, 60.0)
        process.kill()
        process.wait()
    for _ in range(2):  # the place of one that is gone; and a second try of its own
        assert admission.enter(invitation, 1, base, 60.0).rank() == 1


def test_who_is_dead_or_of_another_version_is_passed_over(
    store: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        here = liveness.identity().split()
        theirs = f"{here[0]} {here[1]} {process.pid} 1"
        monkeypatch.setattr(liveness, "identity", lambda: theirs)
        Newcomer(store, 1, {}, time.monotonic() + 60.0)
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
