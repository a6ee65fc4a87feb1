"""Membership: the ranks that take part, the private group between them, and what happens when one is missing.

torch's gloo groups do not survive a failure: one dead peer closes the connections of all. So a failure is
settled through the store, which must outlive any rank (torchrun's agent holds it, or the parent process):

1. Whoever sees its transport fail drops its connections, so that all others see it too, and posts a report.
2. It waits for the other members' reports until its operation's deadline. Who has not reported by then is
missing. 3. The first to conclude posts the verdict; all others adopt it. All raise PeerTimeoutError with the
same ranks.

A missing rank is then masked by its peers, and the next operation builds a fresh group of those that are
left.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from deepep.errors import FaultRecord, MismatchError, PeerTimeoutError
from deepep.runtime.control import liveness
from deepep.runtime.control.transport import Link, LinkError, hang_up, private_group


@dataclass
class Progress:
    """This rank's position: operation and phase as users read them, when the operation began."""

    operation: str = "construct"
    phase: str = "meet"
    sequence: int = 0
    started: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the operation began, or its part that runs now."""
        return time.monotonic() - self.started

    def restart(self) -> None:
        """The deadline counts from here."""
        self.started = time.monotonic()


class Absent(Exception):
    """Some ranks did not post in time."""

    def __init__(self, missing: tuple[int, ...], seen: dict[int, bytes]) -> None:
        super().__init__(f"ranks {missing} did not post")
        self.missing, self.seen = missing, seen


class Membership:
    """The ranks of one buffer and the link between those that are not masked.

    Used by the communication queue alone, after construction.
    """

    def __init__(
        self, store: Store, rank: int, num_ranks: int, timeout: float, device_type: str = "cpu"
    ) -> None:
        # Ranks construct their buffers on a group in the same order, so each one's count names the buffer.
        generation = store.add(f"deepep/buffers/{rank}", 1)
        self._store = PrefixStore(f"deepep/{generation}", store)
        self.rank, self.num_ranks, self.timeout = rank, num_ranks, timeout
        self.grace = 1.0 + 0.05 * timeout
        self._device_type = device_type
        self._masked: frozenset[int] = frozenset()
        self._identities: dict[int, str] = {}
        self._name = ""
        self._control: Link | None = None
        self._payload: Link | None = None
        self._fault: FaultRecord | None = None
        self.progress = Progress(started=time.monotonic())

    # members

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part, ascending."""
        return tuple(r for r in range(self.num_ranks) if r not in self._masked)

    @property
    def masked(self) -> frozenset[int]:
        """The ranks that do not."""
        return self._masked

    def mask(self, rank: int) -> None:
        """Leaves out `rank` from the next operation on."""
        if rank not in self._masked:
            self._masked |= {rank}
            self.leave_link()

    def unmask(self, rank: int) -> None:
        """Takes in `rank` again from the next operation on, and holds no earlier fault against it."""
        blamed = self._fault is not None and rank in self._fault.waited_on
        if rank in self._masked or blamed:
            self._masked -= {rank}
            self._fault = None
            self.leave_link()

    def begin(self, operation: str) -> None:
        """An operation begins: its deadline counts from here."""
        self.progress.operation = operation
        self.progress.restart()

    # rendezvous

    def next_meeting(self, purpose: str) -> str:
        """A name under which the members, who all count their attempts, meet for `purpose` this time."""
        people = "-".join(map(str, self.members))
        attempt = self._store.add(f"attempts/{purpose}/{people}/{self.rank}", 1)
        return f"{purpose}/{people}/{attempt}"

    def meet(self, name: str, value: str, ranks: Iterable[int]) -> dict[int, bytes]:
        """Posts `value` under `name` and returns what each of `ranks` posted.

        Raises Absent at the deadline.
        """
        self._store.set(f"{name}/{self.rank}", value)
        return self._collect(name, tuple(ranks), self.progress.started + self.timeout)

    def _collect(
        self, name: str, ranks: tuple[int, ...], deadline: float, until: str = ""
    ) -> dict[int, bytes]:
        """Collects what `ranks` post under `name`.

        Ends early, with what is there, once the key `until` exists. Raises Absent at the deadline, or before
        if those who are missing are known to be dead.
        """
        missing = list(ranks)
        seen: dict[int, bytes] = {}
        # Asked again and again, because a store's own wait blocks its connection, and cannot wait for "one
        # of".
        pause = 0.001
        while True:
            for rank in list(missing):
                if self._store.check([f"{name}/{rank}"]):
                    seen[rank] = self._store.get(f"{name}/{rank}")
                    missing.remove(rank)
            if not missing or (until and self._store.check([until])):
                return seen
            if time.monotonic() >= deadline or all(self._is_dead(rank) for rank in missing):
                raise Absent(tuple(missing), seen)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    def introduce(self, identities: dict[int, str]) -> None:
        """Exchanges the ranks' processes, by `liveness.identity`."""
        self._identities = identities

    def depart(self) -> None:
        """Posts that this rank takes part in nothing from now on, so that nobody waits for it."""
        with contextlib.suppress(dist.DistError):  # without a store, peers learn when their connections end
            self._store.set(f"departed/{self.rank}", "")

    def _is_dead(self, rank: int) -> bool:
        if self._store.check([f"departed/{rank}"]):
            return True
        return liveness.is_dead(self._identities.get(rank, ""), self._identities.get(self.rank, ""))

    # links

    @property
    def connected(self) -> bool:
        """True if there is a link: not so after a fault, until the next operation."""
        return self._control is not None

    def control(self) -> Link:
        """The link that headers travel on (host memory), built if need be. Raises PeerTimeoutError."""
        if self._control is None:
            self._connect()
        assert self._control is not None
        return self._control

    def payload(self) -> Link:
        """The link that rows travel on, made before the operation's control exchange."""
        if self._payload is None:
            raise LinkError("the link was lost since the operation began")
        return self._payload

    def _connect(self) -> None:
        members = self.members
        if self._fault is not None and set(self._fault.waited_on) & set(members):
            raise PeerTimeoutError(self._fault, "missing since then: mask, or destroy the buffer")
        self._fault = None
        self.progress.phase = "connect"
        people = "-".join(map(str, members))
        self._name = self.next_meeting("link")
        self._store.set(f"members/{self.rank}", people)
        try:
            self.meet(self._name, "", members)
        except Absent as absent:
            self._check_same_members(absent.missing, people)
            error = self.blame(absent.missing, len(absent.seen), "they did not come to connect")
            self._fault = error.record
            raise error from None
        except dist.DistError as error:
            raise self.blame((), 0, f"the store failed: {error}") from error
        try:
            self._control = self._link("cpu")
            self._payload = self._control if self._device_type == "cpu" else self._link(self._device_type)
        except LinkError as error:
            raise self.fault(error) from None
        self._store.set(f"members/{self.rank}", "")
        self.progress.sequence = 0

    def _link(self, device_type: str) -> Link:
        members = self.members
        store = PrefixStore(f"{self._name}/{device_type}", self._store)
        group = private_group(store, members.index(self.rank), len(members), self.timeout, device_type)
        return Link(group, self.rank, self.num_ranks, members)

    def _check_same_members(self, missing: tuple[int, ...], people: str) -> None:
        for rank in missing:
            if self._store.check([f"members/{rank}"]):
                theirs = self._store.get(f"members/{rank}").decode()
                if theirs not in (people, ""):  # empty: not come yet
                    raise MismatchError(
                        "unmasked ranks",
                        theirs.replace("-", ", "),
                        f"{people.replace('-', ', ')}, as on rank {self.rank}",
                        rank,
                    )

    def leave_link(self) -> None:
        """Gives up a link that works, because the members change, and lets the others know."""
        if self._control is not None:
            self._store.set(f"{self._name}/left/{self.rank}", "")
            self.disconnect()

    def rejoin(self) -> bool:
        """After a LinkError: whether others gave the link up, having changed the members. Then it is dropped
        here too.

        So a rank that was masked, and did not know, finds its way back once it is no longer.
        """
        left = any(self._store.check([f"{self._name}/left/{rank}"]) for rank in self.members)
        if left:
            self.disconnect()
        return left

    def disconnect(self) -> None:
        """Drops the connections. Peers that wait on them fail at once."""
        for link in {id(x): x for x in (self._control, self._payload) if x is not None}.values():
            hang_up(link.group)
        self._control = self._payload = None

    # faults

    def fault(self, error: LinkError) -> PeerTimeoutError:
        """Settles with the other survivors who is missing; the error that all of them raise."""
        self.disconnect()
        try:
            settled = self._settle(str(error))
        except dist.DistError as lost:
            settled = self.blame((), 0, f"{error}; and the store failed: {lost}")
        self._fault = settled.record
        return settled

    def _settle(self, reason: str) -> PeerTimeoutError:
        name, progress = f"fault/{self._name}", self.progress
        seconds = progress.seconds
        report = {"at": [progress.sequence, progress.operation, progress.phase], "seconds": seconds}
        self._store.set(f"{name}/{self.rank}", json.dumps(report))
        deadline = max(progress.started + self.timeout, time.monotonic()) + self.grace
        try:
            seen = self._collect(name, self.members, deadline, until=f"{name}/verdict")
            missing = _latest({rank: json.loads(raw) for rank, raw in seen.items()})
        except Absent as absent:
            seen, missing = absent.seen, absent.missing
        verdict = json.dumps({"missing": missing, "seen": len(seen)})
        settled = json.loads(self._store.compare_set(f"{name}/verdict", "", verdict))
        return self.blame(tuple(settled["missing"]), settled["seen"], reason)

    def blame(self, missing: tuple[int, ...], seen: int, reason: str) -> PeerTimeoutError:
        """The error for this rank's place, with `missing` as those responsible."""
        progress = self.progress
        record = FaultRecord(
            operation=progress.operation,
            phase=progress.phase,
            rank=self.rank,
            waited_on=missing,
            expected=len(self.members),
            seen=seen,
            seconds=progress.seconds,
        )
        return PeerTimeoutError(record, reason)


def _latest(reports: dict[int, dict[str, object]]) -> tuple[int, ...]:
    """Everybody reported in the end: the cause is whoever came to the operation after the others had given
    up.

    Those have waited much less than the longest wait. Where all waited alike, nobody can be named.
    """
    waits = {rank: float(str(report["seconds"])) for rank, report in reports.items()}
    longest = max(waits.values())
    return tuple(sorted(rank for rank, seconds in waits.items() if seconds < longest / 2))
