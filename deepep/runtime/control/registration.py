"""Registration: a process asks the members of a run, through their store, for a rank that is vacant.

It posts who it is and what it would bring, and then that there is news. One member looks at that one key;
what it finds there it checks, refuses, or has all members invite.

A rank is for one process. Another that asks for it is refused at once, with both named, if the first lives:
on one host that is seen, between hosts the first answers when it is asked.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from deepep.errors import ArgumentError, MismatchError, RangeError
from deepep.runtime.control import liveness
from deepep.runtime.control.agreement import decode_error, encode_error
from deepep.runtime.control.invitation import Invitation
from deepep.runtime.control.meeting import ControlStore, StoreError

_PAUSE = 0.01
_MOST_RIVALS = 100  # that come and go while one registers: more are a store that does not do as it says
_ANSWERS_WITHIN = 3.0
"""Seconds after which a process on another host that does not say that it waits is taken to be gone."""


@dataclass(frozen=True)
class Registration:
    """A process's wish to have `rank`. name: nobody else's. process: for people to find it by.

    statement: what all ranks have to pass alike.
    """

    rank: int
    name: str
    identity: str
    process: str
    statement: Mapping[str, str]

    @classmethod
    def decode(cls, raw: bytes) -> Registration | None:
        """The registration in a text; None for one of another version, say."""
        try:
            return cls(**json.loads(raw))
        except (ValueError, TypeError):
            return None

    def check(self, statement: Mapping[str, str], rank: int) -> None:
        """Raises MismatchError if this rank, a member, states another."""
        for what, value in statement.items():
            theirs = self.statement.get(what)
            if theirs != value:
                raise MismatchError(what, str(theirs), f"{value}, as on rank {rank}", self.rank)


class Registrations:
    """A run's registrations, as a member sees them. store: where they are posted."""

    def __init__(self, store: ControlStore, num_ranks: int) -> None:
        self._store, self._num_ranks = store, num_ranks
        self._news: bytes | None = None
        self._are_open = self._is_lost = False

    def look(self, vacant: Collection[int]) -> list[Registration]:
        """Registrations of live processes for ranks that are vacant. One key, unless there is news.

        A store that is lost has none: steps go on without it.
        """
        if self._is_lost:
            return []
        try:
            news = self._store.get("news")
            if news == self._news and not self._are_open:
                return []
            self._news = news
            found = self._found()
        except StoreError:
            self._is_lost = True
            return []
        self._are_open = bool(found)  # one for a rank that is missing, say, and nobody knows yet
        return [registration for registration in found if registration.rank in vacant]

    def _found(self) -> list[Registration]:
        mine, found = liveness.identity(), []
        for rank in range(self._num_ranks):
            raw = self._store.get(f"registered/{rank}")
            registration = None if raw is None else Registration.decode(raw)
            if registration is None:
                continue
            if liveness.is_dead(registration.identity, mine):
                self.forget(registration)
            else:
                found.append(registration)
        return found

    def forget(self, registration: Registration) -> None:
        """Removes a registration: it is served, or its process gone."""
        _remove(self._store, registration)

    def refuse(self, registration: Registration, problem: ArgumentError) -> None:
        """Has the process raise `problem`."""
        self._store.set(f"refused/{registration.name}", encode_error(problem).decode())
        self.forget(registration)

    def post(self, invitation: Invitation) -> None:
        """Has an invitation be found by its token."""
        self._store.set(f"invitation/{invitation.token}", invitation.encode())

    def invitation(self, token: str) -> Invitation:
        """The invitation that a member has posted. Raises StoreError if there is none."""
        raw = self._store.get(f"invitation/{token}")
        if raw is None:
            raise StoreError(f"invitation {token} is not there")
        return Invitation.decode(raw.decode())

    def call(self, registrations: Collection[Registration], token: str) -> None:
        """Has the processes come, by the invitation."""
        for registration in registrations:
            self._store.set(f"called/{registration.name}", token)

    def settle(self, registrations: Collection[Registration], token: str, gone: Collection[int]) -> None:
        """Removes what was posted for an admission, and registrations of the ranks that are `gone` from here:
        they have joined, or did not come.
        """
        self._store.remove(f"invitation/{token}")
        for registration in registrations:
            self._store.remove(f"called/{registration.name}")
            if registration.rank in gone:
                self.forget(registration)


class Newcomer:
    """A process that registers, and waits to be invited; until `close`."""

    def __init__(self, store: ControlStore, rank: int, statement: Mapping[str, str], deadline: float) -> None:
        """Registers. Raises RangeError at once if another process has registered for the rank, and lives.

        deadline: by time.monotonic(), until which one on another host is waited for, to say so.
        """
        self._store = store
        who = liveness.identity(), liveness.process_name()
        self._made = Registration(rank, uuid.uuid4().hex, *who, dict(statement))
        self._last: bytes | None = None
        self._claim(json.dumps(asdict(self._made)), deadline)
        store.set("news", self._made.name)

    def _claim(self, mine: str, deadline: float) -> None:
        """Posts the registration in the place of none, or of one whose process is gone."""
        expected = ""
        for _ in range(_MOST_RIVALS):
            held = self._store.settle(f"registered/{self._made.rank}", expected, mine).decode()
            if held == mine:
                return
            if held == expected:  # nothing is there any more
                expected = ""
                continue
            other = Registration.decode(held.encode())
            if other is not None and self._is_taken_by(other, deadline):
                raise self._refusal(self._made, other)
            expected = held
        raise StoreError("compare_set does not replace what it was to expect")

    def _is_taken_by(self, other: Registration, deadline: float) -> bool:
        mine = self._made.identity
        if other.identity == mine != "" or liveness.is_dead(other.identity, mine):
            return False
        if liveness.is_at_work_here(other.identity):
            return True
        silent_at = time.monotonic() + _ANSWERS_WITHIN
        try:
            while time.monotonic() < deadline:
                if self._store.has(f"waits/{self._made.name}"):
                    return True
                if self._store.has(f"called/{other.name}"):  # it is joining, and does not listen
                    silent_at = time.monotonic() + _ANSWERS_WITHIN
                elif time.monotonic() >= silent_at:
                    refusal = self._refusal(other, self._made)  # should it live after all
                    self._store.set(f"refused/{other.name}", encode_error(refusal).decode())
                    return False
                if not self._store.has(f"registered/{other.rank}"):
                    return False
                if not self._store.has(f"asked/{other.name}"):  # nor does another ask just now
                    self._store.set(f"asked/{other.name}", self._made.name)
                time.sleep(_PAUSE)
            return True
        finally:
            self._store.remove(f"waits/{self._made.name}")

    @staticmethod
    def _refusal(refused: Registration, other: Registration) -> RangeError:
        got = f"{refused.rank} for {refused.process}"
        allowed = f"one that no other process asks for: {other.process} has registered for it"
        return RangeError("rank", got, allowed, refused.rank)

    def wait(self, deadline: float) -> Invitation | None:
        """The next invitation; None if none has come by `deadline` (time.monotonic()). Raises what the
        members refuse this process for.
        """
        while time.monotonic() < deadline:
            refused = self._store.get(f"refused/{self._made.name}")
            if refused is not None:
                raise decode_error(refused)
            asking = self._store.get(f"asked/{self._made.name}")
            if asking is not None:
                self._store.set(f"waits/{asking.decode()}", "")
                self._store.remove(f"asked/{self._made.name}")
            token = self._store.get(f"called/{self._made.name}")
            raw = None if token in (None, self._last) else self._store.get(f"invitation/{token.decode()}")
            if raw is not None:
                self._last = token
                return Invitation.decode(raw.decode())
            time.sleep(_PAUSE)
        return None

    def close(self) -> None:
        """Takes back what was posted."""
        _remove(self._store, self._made)
        for what in ("refused", "called", "asked"):
            self._store.remove(f"{what}/{self._made.name}")


def _remove(store: ControlStore, registration: Registration) -> None:
    """Removes a registration, unless another has taken its place."""
    key = f"registered/{registration.rank}"
    raw = store.get(key)
    if raw is not None and Registration.decode(raw) == registration:
        store.remove(key)
