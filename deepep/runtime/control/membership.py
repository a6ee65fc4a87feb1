"""Membership: the ranks that take part, the private group between them, and what happens when one is missing.

After a failure the survivors agree on who is missing (settling.py), and raise PeerTimeoutError with the same
ranks. A missing rank is then masked by its peers, or comes back: it learns of the verdict in its next call,
and reports. The next operation builds a fresh group of the members.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from deepep.errors import FaultRecord, MismatchError, PeerTimeoutError
from deepep.runtime.control import connecting, liveness
from deepep.runtime.control.meeting import (
    ControlStore,
    Meeting,
    MeetingFailed,
    StoreError,
    Verdict,
    clear,
    join,
)
from deepep.runtime.control.settling import Progress, settle
from deepep.runtime.control.shrinking import Course, course
from deepep.runtime.control.transport import Connections, Link, LinkError, hang_up, private_group

LEFT_OUT = "masked by the other ranks, until all call low_latency_clean_mask_buffer"
"""The reason that a rank is given whom the others go on without."""
_QUIET = "quiet"
_MOVED = "moved"
"""Posted, and never removed, where the members have gone on with others whom they admitted."""


class Membership:
    """The ranks of one buffer and the link between those that are not masked.

    Used by the communication queue alone, after construction.
    """

    def __init__(
        self,
        store: ControlStore,
        connections: Connections,
        rank: int,
        num_ranks: int,
        timeout: float,
        vacant: Iterable[int] = (),
    ) -> None:
        """store: asked and left at once. connections: others to it, for what waits on it. vacant: ranks that
        no process has: they are masked, until it is another membership.
        """
        self._store = store
        self._connections = connections
        self.rank, self.num_ranks, self.timeout = rank, num_ranks, timeout
        self.grace = 1.0 + 0.05 * timeout
        self.device_type = "cpu"
        self._masked = self._vacant = frozenset(vacant)
        self._identities: dict[int, str] = {}
        self._is_made = False
        self._meeting: Meeting | None = None
        self._joining = threading.Lock()
        self._past: list[Meeting] = []
        self._pairs: list[Meeting] = []
        self._purposes: set[str] = set()
        self._control: Link | None = None
        self._payload: Link | None = None
        self._fault: FaultRecord | None = None
        self._fault_meeting: Meeting | None = None
        self._verdict: Verdict | None = None
        self._is_left_out = False
        self._returns = False
        self.settled_by: Membership | None = None
        """Another of these ranks, which settles who is missing here (`follow`)."""
        self.followers: tuple[Membership, ...] = ()
        """Those whom this one settles it for."""
        self.progress = Progress(started=time.monotonic())

    # members

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part, ascending."""
        return tuple(r for r in range(self.num_ranks) if r not in self._masked)

    @property
    def live(self) -> int:
        """The same as bits: bit r is rank r."""
        return sum(1 << rank for rank in self.members)

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
        """Takes in `rank` again from the next operation on, and holds no earlier fault against it.

        A link that the others have given up meanwhile, which this rank may not know, is given up here too.
        """
        if rank in self._vacant:
            return
        if rank in self._masked or (self._fault is not None and rank in self._fault.waited_on):
            self._fault = self._fault_meeting = None
        if rank == self.rank:
            self._is_left_out = False
        if rank in self._masked:
            self._masked -= {rank}
            self.leave_link()
        elif self._control is not None and self._is_given_up():
            self.disconnect()
        if self._control is None:
            self._forget()

    def vacate(self, ranks: Iterable[int]) -> None:
        """Leaves out ranks for good: no process of this membership will take them again."""
        for rank in ranks:
            self.mask(rank)
        self._vacant |= set(ranks)

    def among(
        self,
        members: Iterable[int],
        store: ControlStore,
        connections: Connections,
        identities: Mapping[int, str],
    ) -> Membership:
        """Another membership of this rank, among other members, who meet in a store of their own.

        identities: processes of those who are new, as far as they are known.
        """
        vacant = set(range(self.num_ranks)) - set(members)
        made = Membership(store, connections, self.rank, self.num_ranks, self.timeout, vacant)
        made.device_type = self.device_type
        here = {rank: self._identities[rank] for rank in self.members if rank in self._identities}
        made.introduce({**here, **identities})
        return made

    def beside(self, other: Membership, name: str, members: Iterable[int]) -> Membership:
        """Another membership of `other`'s rank, among members of this one, in whose store they meet, and of
        whom it knows the processes; its first operation connects them. name: that nobody used here before.
        """
        store, connections = self._store.under(name), self._connections.rooted()
        made = other.among(members, store, connections, self._identities)
        made._is_made = True
        return made

    def move(self) -> None:
        """Ends here, on a member that has gone on in another membership: who was masked may still come."""
        self.disconnect()
        with contextlib.suppress(StoreError):
            self._store.set(_MOVED, "")
        self.finish()

    def _left_behind(self) -> PeerTimeoutError | None:
        """The error of a rank without which the others have moved."""
        if not self._store.has(_MOVED):
            return None
        reason = "masked while the others admitted a process: come back by invitation"
        return self.blame((self.rank,), len(self.members) - 1, reason)

    @property
    def place(self) -> str:
        """The address at which another process finds the store."""
        return self._store.place

    def rooted(self, prefix: str) -> tuple[ControlStore, Connections]:
        """The store under another prefix alone, and connections to it."""
        return self._store.rooted(prefix), self._connections.rooted()

    def _forget(self) -> None:
        """Knows of the members' last meeting: how that ended is not raised in this rank's next call."""
        purpose, store = f"link/{self._people()}", self._store
        number = store.get(f"{purpose}/number")
        if number is not None:
            last = store.under(f"{purpose}/{number.decode()}")
            if last.has("verdict"):
                last.set(f"known/{self.rank}", "")

    def _people(self) -> str:
        return "-".join(map(str, self.members))

    def begin(self, operation: str) -> None:
        """An operation begins: its deadline counts from here."""
        self._verdict = None
        self.progress.operation = operation
        self.progress.restart()

    # meetings

    def exchange(self, stage: str, value: str, reason: str) -> dict[int, bytes]:
        """Posts `value` for a stage of the construction's meeting; every member's.

        Raises PeerTimeoutError, with `reason` if some do not post in time; the same on all.
        """
        with self._failing():
            meeting = self._meeting or self._join_next()
            return meeting.exchange(stage, value, self._deadline, reason)

    def gathering(self, purpose: str) -> Callable[[str, str], dict[int, bytes]]:
        """A meeting of the members beside their link: a function that takes a stage and this rank's value,
        and returns every member's. Raises PeerTimeoutError.
        """
        try:
            meeting = self._join(purpose, concerns_this=lambda verdict: True)
        except MeetingFailed as failed:
            raise self._blame(failed.verdict) from None
        except StoreError as error:
            raise self.store_lost(error) from None

        def gather(stage: str, value: str) -> dict[int, bytes]:
            try:
                return meeting.exchange(stage, value, self._deadline, f"they did not {purpose}")
            except MeetingFailed as failed:
                raise self._blame(failed.verdict) from None
            except StoreError as error:
                raise self.store_lost(error) from None

        return gather

    def _join(self, purpose: str, concerns_this: Callable[[Verdict], bool]) -> Meeting:
        purpose = f"{purpose}/{self._people()}"
        self._purposes.add(purpose)
        return join(self._store, purpose, self.rank, self.members, self.is_dead, concerns_this)

    def _join_next(self) -> Meeting:
        """The next meeting that a link comes from; the very first is that of the construction."""
        with self._joining:
            if self._meeting is not None or self._is_made:
                if self._meeting is not None:
                    self._past.append(self._meeting)
                self._meeting = self._join("link", concerns_this=lambda verdict: True)
                return self._meeting
            # A rank that raised the end of each construction to which it did not come would never catch up.
            self._meeting = join(
                self._store,
                "construct",
                self.rank,
                self.members,
                self.is_dead,
                concerns_this=lambda verdict: verdict.withdrew and self.rank not in verdict.missing,
            )
            self._store = self._meeting.store
            return self._meeting

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turns the end of the meeting, and of the store, into PeerTimeoutError."""
        try:
            yield
        except MeetingFailed as failed:
            raise self._adopt(failed.verdict) from None
        except StoreError as error:
            raise self.store_lost(error) from None

    @property
    def _deadline(self) -> float:
        return self.progress.started + self.timeout

    def introduce(self, identities: Mapping[int, str]) -> None:
        """Exchanges the ranks' processes, by `liveness.identity`."""
        self._identities = dict(identities)

    def depart(self, is_quiet: bool) -> None:
        """Posts that this rank takes part in nothing from now on, so that nobody waits for it.

        is_quiet: and that nothing of it writes to its peers' memory any more.
        """
        with contextlib.suppress(StoreError):  # without a store, peers learn when their connections end
            self._store.set(f"departed/{self.rank}", _QUIET if is_quiet else "")

    def is_dead(self, rank: int) -> bool:
        """True if nobody needs to wait for `rank`: its process is gone, or it has departed."""
        if self.settled_by is not None and self.settled_by.is_alarmed:
            return True  # who has met the fault there does not come here before it is settled
        if self._store.has(f"departed/{rank}"):
            return True
        return liveness.is_dead(self._identities.get(rank, ""), self._identities.get(self.rank, ""))

    def check_members(self) -> None:
        """Raises LinkError if a member is dead, or one has met a fault: what a device waits for may never
        come, and no connection of the host's says so.
        """
        gone = [rank for rank in self.members if rank != self.rank and self.is_dead(rank)]
        if gone:
            raise LinkError(f"{gone} are gone")
        if self._meeting is not None and self._meeting.is_alarmed:
            raise LinkError("another rank has met a fault")

    def is_over(self, rank: int) -> bool:
        """True if nothing of `rank` can write to its peers' memory any more: it has departed, and said so, or
        its process is gone, with all threads. Beyond doubt, unlike `is_dead`.
        """
        mine = self._identities.get(self.rank, "")
        if liveness.is_gone(self._identities.get(rank, ""), mine):
            return True
        with contextlib.suppress(StoreError):
            return self._store.get(f"departed/{rank}") == _QUIET.encode()
        return False

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
        self._forgive()
        self.progress.phase, self.progress.sequence = "connect", 0
        people = self._people()
        try:
            if self._meeting is not None and (error := self._left_behind()) is not None:
                raise error
            self._store.set(f"members/{self.rank}", people)
            meeting = self._join_next()
            # Who has waited for a follower's operation until the deadline comes here after it.
            deadline = self._deadline + (self.grace if self.followers else 0.0)
            try:
                reason = "they did not come to connect"
                meeting.exchange("arrived", self.progress.operation, deadline, reason)
            except MeetingFailed as failed:
                self._check_same_members(failed.verdict.missing, people)
                raise
            group = connecting.connect(meeting, self._connections, self.timeout, deadline)
            self._control = self._payload = Link(group, self.rank, self.num_ranks, members)
            if self.device_type != "cpu":
                # NCCL waits on it in the group's first operation, and may later: it is not given back.
                store = PrefixStore(f"{meeting.store.prefix}/{self.device_type}", self._connections.take())
                index, size = members.index(self.rank), len(members)
                group = private_group(store, index, size, self.timeout, self.device_type)
                self._payload = Link(group, self.rank, self.num_ranks, members)
            self._store.set(f"members/{self.rank}", "")
        except LinkError as error:
            raise self.fault(error) from None
        except MeetingFailed as failed:
            raise self._adopt(failed.verdict) from None
        except StoreError as error:
            raise self.store_lost(error) from None
        self._returns = False
        for past in [past for past in self._past if set(past.members) <= set(members)]:
            past.remove()  # whoever came here needs nothing of what was before
            self._past.remove(past)

    def pair(self, peer: int, name: str) -> dist.ProcessGroup:
        """A private group with one other member, of CPU tensors, in ascending order; both of them make it.

        name: that nobody has used. Raises LinkError if the other does not come, StoreError.
        """
        members = (min(self.rank, peer), max(self.rank, peer))
        store = self._store.under(f"pairs/{name}/{members[0]}-{members[1]}")
        meeting = Meeting(store, self.rank, members, self.is_dead, is_last=lambda: True)
        self._pairs.append(meeting)
        return connecting.connect(meeting, self._connections, self.timeout, self._deadline)

    def _forgive(self) -> None:
        """Forgets the last fault if all members that it named know of it: they have come back.

        Else raises it again.
        """
        if self._fault is None:
            return
        if self._is_left_out:
            with self._failing():
                self._is_left_out = not self._is_awaited()
            if self._is_left_out:
                raise PeerTimeoutError(self._fault, f"{LEFT_OUT}, since then")
        named = set(self._fault.waited_on) & set(self.members)
        meeting = self._fault_meeting
        with self._failing():
            if named and (meeting is None or not all(meeting.has_reported(rank) for rank in named)):
                raise PeerTimeoutError(self._fault, "missing since then: mask, or destroy the buffer")
        self._fault = self._fault_meeting = None

    def _check_same_members(self, missing: tuple[int, ...], people: str) -> None:
        for rank in missing:
            theirs = (self._store.get(f"members/{rank}") or b"").decode()
            if theirs not in (people, "") and not self.is_dead(rank):  # empty: not come yet
                raise MismatchError(
                    "unmasked ranks",
                    theirs.replace("-", ", "),
                    f"{people.replace('-', ', ')}, as on rank {self.rank}",
                    rank,
                )

    def leave_link(self) -> None:
        """Gives up a link that works, because the members change, and lets the others know."""
        if self._control is not None:
            assert self._meeting is not None
            self._meeting.post("left", "")
            self.disconnect()

    def await_leaving(self, ranks: Iterable[int], deadline: float) -> None:
        """Waits until `ranks` have given up the link that works, or are dead."""
        meeting = self._meeting
        assert meeting is not None
        while time.monotonic() < deadline and meeting.is_last():
            if all(meeting.store.has(f"left/{rank}") or self.is_dead(rank) for rank in ranks):
                return
            time.sleep(0.005)

    def _is_given_up(self) -> bool:
        """True if others gave the link up: they have changed the members, or settled a fault."""
        meeting = self._meeting
        assert meeting is not None
        return meeting.store.has("verdict") or self._is_left(meeting)

    def _is_left(self, meeting: Meeting) -> bool:
        return any(meeting.store.has(f"left/{rank}") for rank in self.members)

    def rejoin(self) -> bool:
        """After a LinkError: whether the others gave the link up, having changed the members, or have settled
        a fault and wait for this rank on another. Then it is dropped here too.

        So a rank that was masked, and did not know, finds its way back once it is no longer.
        """
        meeting = self._meeting
        if meeting is None or self.settled_by is not None:
            return False
        with self._failing():
            verdict = meeting.verdict()
            is_blamed = verdict is not None and self.rank in verdict.missing
            is_alone = verdict is None and not meeting.is_last()  # what the others posted is removed
            again = is_alone or self._is_left(meeting) or (is_blamed and self._is_awaited())
        if again:
            self._returns = True
            self.disconnect()
        return again

    def _is_awaited(self) -> bool:
        """True if the members have a meeting for their next link, which this rank has not come to."""
        purpose, store = f"link/{self._people()}", self._store
        number = store.get(f"{purpose}/number")
        if number is None:
            return False
        last = store.under(f"{purpose}/{number.decode()}")
        return not last.has(f"known/{self.rank}") and not last.has("verdict")

    def disconnect(self) -> None:
        """Drops the connections. Peers that wait on them fail at once."""
        for follower in self.followers:
            follower.disconnect()
        for link in {id(x): x for x in (self._control, self._payload) if x is not None}.values():
            hang_up(link.group)
        self._control = self._payload = None

    def finish(self) -> None:
        """Removes from the store what this rank has posted, after all ranks have come to their end."""
        with contextlib.suppress(StoreError):
            for meeting in (*self._past, *self._pairs, self._meeting):
                if meeting is not None:
                    meeting.remove()
            for purpose in self._purposes:
                clear(self._store, purpose, self.rank, self.num_ranks)
            self._store.remove(f"members/{self.rank}")

    # faults

    def fault(self, error: LinkError) -> PeerTimeoutError:
        """Settles with the other survivors who is missing; the error that all of them raise. Where another
        membership settles it, that of this rank alone.
        """
        self.disconnect()
        if self.settled_by is not None:
            return self.blame((), 0, str(error))
        try:
            meeting = self._meeting
            assert meeting is not None
            if (moved := self._left_behind()) is not None:
                return moved
            verdict = settle(meeting, self.members, self.progress, self._deadline, self.grace, str(error))
            return self._adopt(verdict)
        except StoreError as lost:
            return self.store_lost(lost, f"{error}; and ")

    def withdraw(self, reason: str) -> None:
        """Ends the present meeting, or the one that the others are about to come to, because this rank raises
        something that they do not know of: they raise PeerTimeoutError with its name, at once.

        May be called beside the queue, when the caller of an operation does not wait for it any more.
        """
        verdict = Verdict((self.rank,), len(self.members) - 1, reason, withdrew=True)
        try:
            with self._joining:
                meeting = self._meeting
            if meeting is None or (self._control is None and meeting.verdict() is not None):
                meeting = self._join_next()
            ended = meeting.end(verdict)
            meeting.report()
            self._adopt(ended)
        except (MeetingFailed, StoreError):
            self.disconnect()

    def _adopt(self, verdict: Verdict) -> PeerTimeoutError:
        """Takes over how the meeting ended: the error for it. A rank that it names says that it knows."""
        meeting = self._meeting
        self.disconnect()
        if meeting is not None and self.rank in verdict.missing:
            with contextlib.suppress(StoreError):
                meeting.report()
        error = self._blame(verdict)
        self._fault, self._fault_meeting, self._verdict = error.record, meeting, verdict
        return error

    def shrink(self, fault: PeerTimeoutError) -> Course:
        """After `fault` in low latency: masks the missing ranks, if the survivors go on without them.

        Raises it, or the error of a rank that the others go on without. That rank masks nobody, nor does one
        that finds its way back to others who have changed the members, before it has a link again.
        """
        if self._returns:
            raise fault
        taken = self.go_on(fault, course)
        if taken is Course.LEFT_OUT:
            self._is_left_out = self._returns = True
            raise PeerTimeoutError(fault.record, f"{fault.reason}; {LEFT_OUT}")
        return taken

    def go_on(
        self,
        fault: PeerTimeoutError,
        decide: Callable[[Meeting, Verdict, tuple[int, ...]], Course],
        evicts: bool = False,
    ) -> Course:
        """The course after `fault` that `decide` finds, the same or one that fits on all survivors: they mask
        the missing ranks. evicts: for good, which these find in the store whenever they look, though the
        others be gone. Raises `fault` where none is found, or nothing is settled.
        """
        meeting, verdict = self._fault_meeting, self._verdict
        self._verdict = None
        try:
            if evicts and self._store.has(f"evicted/{self.rank}"):
                return Course.LEFT_OUT
            if meeting is None or verdict is None:
                raise fault
            taken = decide(meeting, verdict, self.members)
            missing = set(verdict.missing) if verdict.seen < len(self.members) else set()
            if evicts and taken not in (Course.RAISE, Course.LEFT_OUT):
                for rank in missing:
                    self._store.set(f"evicted/{rank}", "")
        except StoreError as error:
            raise self.store_lost(error) from None
        if taken is Course.RAISE:
            raise fault
        if taken is not Course.LEFT_OUT:
            self._masked |= missing
            self._fault = self._fault_meeting = None
        return taken

    @property
    def is_alarmed(self) -> bool:
        """True once a member has met a fault, until it is settled."""
        meeting = self._meeting
        return meeting is not None and meeting.is_alarmed and meeting.verdict() is None

    def follow(self, members: tuple[int, ...]) -> None:
        """Goes on with `members`, as `settled_by` has settled it: on all of them, whatever each has met here,
        over another link, and without holding anything of before against anybody.
        """
        self.disconnect()
        self._masked |= set(range(self.num_ranks)) - set(members)
        self._fault = self._fault_meeting = self._verdict = None
        self._forget()

    def give_up(self, operation: str, fault: PeerTimeoutError) -> PeerTimeoutError:
        """Gives up the link because of what this rank has met beside it, as if it had failed; the error that
        all members raise, or that of a fault which is settled already.

        Who is to come has had time since that operation began; if there is no link, some more, for all meet
        at the next one.
        """
        if self._verdict is not None:
            return self._blame(self._verdict)
        self.begin(operation)
        now = time.monotonic()
        self.progress.started = now - fault.record.seconds
        if not self.connected:
            self.progress.started = max(self.progress.started, now + self.grace - self.timeout)
        try:
            self.control()
        except PeerTimeoutError as unconnected:
            return unconnected
        self.progress.sequence += 1
        self.progress.phase = "forward or backward"
        return self.fault(LinkError(str(fault)))

    def _blame(self, verdict: Verdict) -> PeerTimeoutError:
        return self.blame(verdict.missing, verdict.seen, verdict.reason)

    def store_lost(self, error: StoreError, before: str = "") -> PeerTimeoutError:
        """The error of this rank alone, naming whom it can see to be dead: nothing can be settled."""
        self.disconnect()
        mine = self._identities.get(self.rank, "")
        dead = tuple(rank for rank in self.members if liveness.is_dead(self._identities.get(rank, ""), mine))
        return self.blame(dead, len(self.members) - len(dead), f"{before}the store failed: {error}")

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
