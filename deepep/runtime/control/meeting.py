"""Meetings: numbered attempts of some ranks to do something together, through the store.

One rule says who learns what, and when: a meeting ends in one verdict, the first that is posted, and every
rank that takes part raises it, at once. A rank that fails posts the verdict itself, one that waits in vain
does so at its deadline. The next attempt is another meeting; its number comes from the store and not from
each rank's own count, so ranks that have missed an attempt find the others.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

from deepep.runtime.control.stores import base_of, place_of

_Value = TypeVar("_Value")
_MET = b"met"
MEMORY_STAGES = ("leave", "share", "ready")
"""The stages in which ranks build symmetric memory."""
_STAGES = ("known", "arrived", "engine", "report", "left", "departed", *MEMORY_STAGES)
"""Stages of meetings that failed may still be in the store when nobody remembers them."""
_SHARED = (
    *("verdict", "alarm", "arrived/outcome", "engine/outcome"),
    *(f"{stage}/outcome" for stage in MEMORY_STAGES),
)


class StoreError(Exception):
    """The store failed, or is gone. Internal; users see PeerTimeoutError."""


class ControlStore:
    """A store under a prefix, whose errors say that they are the store's."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store, self.prefix = store, prefix
        self.attended: dict[str, set[int]] = {}
        """Meetings for each purpose that this rank has come to through here, and left keys of."""

    def under(self, prefix: str) -> ControlStore:
        """The same store under a longer prefix."""
        return ControlStore(self._store, f"{self.prefix}/{prefix}")

    def rooted(self, prefix: str) -> ControlStore:
        """The store below all prefixes, under another."""
        return ControlStore(base_of(self._store), prefix)

    @property
    def place(self) -> str:
        """The address at which another process finds the store; empty if it cannot."""
        return place_of(self._store)

    def set(self, key: str, value: str) -> None:
        """Posts a value."""
        self._call(lambda name: self._store.set(name, value), key)

    def has(self, key: str) -> bool:
        """Says whether there is a value."""
        return bool(self._call(lambda name: self._store.check([name]), key))

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        return self._call(lambda name: self._store.get(name), key) if self.has(key) else None

    def settle(self, key: str, expected: str, desired: str) -> bytes:
        """Replaces `expected` (empty: nothing) by `desired`, if it is there; the value there is then."""
        return self._call(lambda name: self._store.compare_set(name, expected, desired), key)

    def remove(self, key: str) -> None:
        """Removes a value, if there is one and the store can."""
        with contextlib.suppress(Exception):  # not every store can
            self._store.delete_key(f"{self.prefix}/{key}")

    def _call(self, call: Callable[[str], _Value], key: str) -> _Value:
        try:
            return call(f"{self.prefix}/{key}")
        except Exception as error:  # a store may be anybody's code
            raise StoreError(f"{type(error).__name__}: {error}".partition("\n")[0]) from None


@dataclass(frozen=True)
class Verdict:
    """The end of a meeting.

    missing: the ranks held responsible. seen: ranks that had reported. withdrew: the rank responsible took
    part, and raised something of its own.
    """

    missing: tuple[int, ...]
    seen: int
    reason: str
    withdrew: bool = False

    def encode(self) -> str:
        """The verdict as a text for the store."""
        return json.dumps([self.missing, self.seen, self.reason[:1000], self.withdrew])

    @classmethod
    def decode(cls, raw: bytes) -> Verdict:
        """The verdict that `encode` made a text of."""
        missing, seen, reason, withdrew = json.loads(raw)
        return cls(tuple(missing), seen, reason, withdrew)


class MeetingFailed(Exception):
    """The meeting ended in a verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


class Absent(Exception):
    """Some ranks did not post in time."""

    def __init__(self, missing: tuple[int, ...], seen: dict[int, bytes]) -> None:
        super().__init__(f"ranks {missing} did not post")
        self.missing, self.seen = missing, seen


class Meeting:
    """One attempt of `members`, as `rank` takes part in it.

    store: under the meeting's name. is_dead: says of a rank that nobody needs to wait for it. is_last: says
    that there is no later meeting for the purpose.
    """

    def __init__(
        self,
        store: ControlStore,
        rank: int,
        members: tuple[int, ...],
        is_dead: Callable[[int], bool],
        is_last: Callable[[], bool],
    ) -> None:
        self.store, self.rank, self.members = store, rank, members
        self.is_dead, self.is_last = is_dead, is_last
        self._posted: set[str] = set()

    # posting

    def post(self, stage: str, value: str) -> None:
        """Posts this rank's value of a stage."""
        key = f"{stage}/{self.rank}"
        self._posted.add(key)
        self.store.set(key, value)

    def mark(self) -> None:
        """Notes that this rank knows of the meeting: its end is not raised here again."""
        self.post("known", "")

    @property
    def is_known(self) -> bool:
        """True if this rank has taken part, or knows of the end."""
        return self.store.has(f"known/{self.rank}")

    # waiting

    def exchange(self, stage: str, value: str, deadline: float, reason: str) -> dict[int, bytes]:
        """Posts this rank's value and returns every member's.

        Raises MeetingFailed: with `reason`, if some do not post until the deadline (by time.monotonic()), or
        are known to be dead; all members raise the same. A rank that comes when they have raised it, and what
        they posted is removed, is itself the one that was missing.
        """
        self.post(stage, value)
        try:
            seen = self.collect(stage, self.members, deadline)
        except Absent as absent:
            verdict = self.blame(absent, reason)
            if not self.is_last():
                raise MeetingFailed(verdict) from None
            if self._conclude(stage, verdict.encode()):  # another has seen all of them
                return self.collect(stage, self.members, float("inf"))
            raise MeetingFailed(self.end(verdict)) from None
        if not self._conclude(stage, _MET.decode()):
            raise MeetingFailed(self.end(Verdict((), len(seen), reason)))
        return seen

    def _conclude(self, stage: str, outcome: str) -> bool:
        """Settles how a stage ended; whether it did well. If not, the meeting ends as it did."""
        settled = self.store.settle(f"{stage}/outcome", "", outcome)
        if settled == _MET:
            return True
        self.store.settle("verdict", "", settled.decode())
        return False

    def collect(self, stage: str, ranks: Iterable[int], deadline: float) -> dict[int, bytes]:
        """Collects what `ranks` post of a stage.

        Raises Absent at the deadline, or before if those who are missing are known to be dead; MeetingFailed
        once the meeting has ended.
        """
        missing = list(ranks)
        seen: dict[int, bytes] = {}
        # Asked again and again: a store's own wait blocks its connection, and cannot wait for "one of".
        pause = 0.001
        is_over = False  # then this is the last look, at what was posted until then, however late it is made
        while True:
            for rank in list(missing):
                posted = self.store.get(f"{stage}/{rank}")
                if posted is not None:
                    seen[rank] = posted
                    missing.remove(rank)
            if not missing:
                return seen
            verdict = self.verdict()
            if verdict is not None:
                raise MeetingFailed(verdict)
            if is_over:
                raise Absent(tuple(missing), seen)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
            is_over = time.monotonic() >= deadline or all(self.is_dead(rank) for rank in missing)

    def blame(self, absent: Absent, reason: str) -> Verdict:
        """The verdict on those who did not post; on this rank, if the others have had meetings without it."""
        if self.is_last():
            return Verdict(absent.missing, len(absent.seen), reason)
        return Verdict((self.rank,), len(self.members) - 1, f"{reason}: the others have gone on")

    # the end

    def verdict(self) -> Verdict | None:
        """The end of the meeting; None if it has not come."""
        raw = self.store.get("verdict")
        return None if raw is None else Verdict.decode(raw)

    def end(self, verdict: Verdict) -> Verdict:
        """Ends the meeting with `verdict`, unless it has ended. Returns the verdict that holds."""
        return Verdict.decode(self.store.settle("verdict", "", verdict.encode()))

    def report(self, place: Mapping[str, object] | None = None) -> None:
        """Posts where this rank stood when it met a fault, or that it knows of one; and that there is one."""
        self.post("report", json.dumps(place or {}))
        self.store.set("alarm", "")

    @property
    def is_alarmed(self) -> bool:
        """True once a member has reported a fault."""
        return self.store.has("alarm")

    def has_reported(self, rank: int) -> bool:
        """Says whether `rank` knows of the fault: if it was blamed, it has come back."""
        return self.store.has(f"report/{rank}")

    def remove(self) -> None:
        """Removes what this rank has posted, and the rest if it is the lowest, after all have gone on.

        Only that it knows of the meeting stays, until it has gone on twice.
        """
        keys = self._posted - {f"known/{self.rank}"}
        if self.rank == min(self.members):
            keys = keys | set(_SHARED)
        for key in keys:
            self.store.remove(key)
        self._posted.clear()


def join(
    store: ControlStore,
    purpose: str,
    rank: int,
    members: tuple[int, ...],
    is_dead: Callable[[int], bool],
    concerns_this: Callable[[Verdict], bool],
) -> Meeting:
    """The meeting for `purpose` that is open, or the next one.

    Raises MeetingFailed if the last one ended without this rank, and `concerns_this` says that it is to be
    raised here.
    """
    latest = f"{purpose}/number"
    number = int(store.settle(latest, "", "1"))
    while True:
        is_last = partial(lambda number: store.get(latest) == number, str(number).encode())
        meeting = Meeting(store.under(f"{purpose}/{number}"), rank, members, is_dead, is_last)
        if not meeting.is_known:
            verdict = meeting.verdict()
            meeting.mark()
            # All that were at the last but one have raised its end, or are not going to.
            attended = store.attended.setdefault(purpose, set())
            for past in {number - 2, *(n for n in attended if n < number - 1)}:
                _remove(store, f"{purpose}/{past}", rank)
                attended.discard(past)
            attended.add(number)
            if verdict is None:
                return meeting
            if concerns_this(verdict):
                meeting.report()
                raise MeetingFailed(verdict)
        last, number = number, int(store.settle(latest, str(number), str(number + 1)))
        if number <= last:
            raise StoreError("compare_set does not replace what it was to expect")


def clear(store: ControlStore, purpose: str, rank: int, num_ranks: int) -> None:
    """Removes all that `rank` has left of the meetings for `purpose`, when there will be no other."""
    raw = store.get(f"{purpose}/number")
    if raw is not None:
        for number in {int(raw), int(raw) - 1, *store.attended.pop(purpose, ())}:
            _remove(store, f"{purpose}/{number}", rank)
        last = f"{purpose}/{raw.decode()}"
        if not any(store.has(f"{last}/known/{other}") for other in range(num_ranks)):
            store.remove(f"{purpose}/number")


def _remove(store: ControlStore, name: str, rank: int) -> None:
    for key in (*(f"{stage}/{rank}" for stage in _STAGES), *_SHARED):
        store.remove(f"{name}/{key}")
