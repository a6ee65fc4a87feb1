"""StepOperations: what a communicator does for training steps that ranks leave and join."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch.distributed as dist

from deepep.errors import ArgumentError, EvictedError, PeerTimeoutError
from deepep.runtime.control import admission
from deepep.runtime.control.agreement import NO_LIMIT
from deepep.runtime.control.committing import course_of_step
from deepep.runtime.control.invitation import Invitation
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.registration import Registrations
from deepep.runtime.control.shrinking import Course
from deepep.runtime.control.transport import Link, LinkError, transport
from deepep.runtime.engine import Engine
from deepep.runtime.requests import Operation, Schedule

_FIRST_LOOK, _LONGEST_PAUSE = 0.002, 0.5
"""Seconds of waiting for the device before the first look at who is missing, and ten times between two."""


class StepOperations:
    """Commits, and changes of the members, on a control plane that a subclass has. All but `registrations`
    and `is_connected` are collective.
    """

    _control: ControlPlane
    _hosts: dict[int, str]  # by rank
    _facts: dict[str, str]  # this rank's, for the others

    @property
    def members(self) -> tuple[int, ...]:
        """The group's ranks that take part, ascending: all, but for those that `survive` left out."""
        return self._control.membership.members

    @property
    def vacant(self) -> frozenset[int]:
        """The ranks that do not."""
        return self._control.membership.masked

    @property
    def is_connected(self) -> bool:
        """True if no fault has broken the members' link."""
        return self._control.membership.connected

    def commit(self, step: int, news: int = 0) -> int:
        """Returns once every member has come here: each has its sums of this step.

        news: a number above 0 that all learn of this rank, by which they all do the same next; returns the
        largest that anybody had. Raises PeerTimeoutError: then `survive` says whether the sums count.
        """
        found: dict[int, int] = {}
        with self._control.issuing:
            self._await_device()
            completion = self._control.perform(
                Operation.COMMIT,
                Schedule(),
                lambda link, limits: found.update(limits),
                agreed={"step": step},
                limit=news or NO_LIMIT,
            )
        completion.host_wait()
        return max(0, *found.values())

    def collective(
        self, call: Callable[[dist.ProcessGroup], dist.Work], about: int, device_type: str = "cpu"
    ) -> None:
        """Makes a collective of torch's on the members' private group. about: a number that is the same on
        all of them. device_type: of its tensors. Raises PeerTimeoutError.
        """

        def body(link: Link) -> None:
            group = self._control.membership.control().group if device_type == "cpu" else link.group
            with transport():
                call(group).wait()

        self._perform(Operation.COLLECTIVE, body, {"collective": about})

    def lead(self, engines: Iterable[Engine]) -> None:
        """Settles, from now on, what fails in the operations of these engines too, of the same ranks, so that
        both end with the same members: they raise PeerTimeoutError for `give_up` to take.
        """
        self._control.lead([engine.control_plane() for engine in engines])

    def give_up(self, error: PeerTimeoutError) -> PeerTimeoutError:
        """Gives up this step's operations because of what this rank has met beside them: the error for
        `survive`, as all members have it.
        """
        found: list[PeerTimeoutError] = []

        def job() -> None:
            found.append(self._control.membership.give_up(Operation.STEP.label, error))

        with self._control.issuing:
            self._control.locally(job, Schedule()).host_wait()
        return found[0]

    def survive(self, fault: PeerTimeoutError, min_members: int | None) -> Course:
        """Goes on after `fault` without the ranks that are missing: the course of this rank's step, which
        fits those of the others (runtime/control/committing.py). The next operation connects who is left.

        min_members: fewer do not go on; None: the majority of those who were there. Raises EvictedError on a
        rank that the others leave out; else `fault`, where it is not settled who is missing.
        """
        before = len(self.members)
        found: list[Course] = []

        def job() -> None:
            found.append(self._control.membership.go_on(fault, course_of_step, evicts=True))

        with self._control.issuing:
            self._control.locally(job, Schedule()).host_wait()
        if found[0] is Course.LEFT_OUT:
            raise EvictedError(fault.record, f"the others have gone on: {fault.reason}")
        least = before // 2 + 1 if min_members is None else min_members
        if len(self.members) < least:
            left = f"{len(self.members)} of {before} ranks are left, fewer than min_members={least}"
            raise PeerTimeoutError(fault.record, f"{left}; {fault.reason}")
        return found[0]

    # who joins

    def registrations(self, place: str) -> Registrations:
        """Registrations of processes that would take part, at a place in the group's store."""
        store, _ = self._control.membership.rooted(place)
        return Registrations(store, self._control.num_ranks)

    def admit(self, find: Callable[[], Invitation], token: int, statement: Mapping[str, str]) -> Invitation:
        """Takes in those whom a member has invited, once they have come and state the same; the invitation,
        which `find` finds, the same on all members.

        Raises MismatchError or PeerTimeoutError, on all members: then all is as before, unless the link is
        gone (`is_connected`), and it is a fault for `survive`, after which they may be there.
        """
        found: list[Invitation] = []

        def learn(met: dict[int, dict[str, Any]]) -> None:
            self._hosts.update((rank, str(facts["host"])) for rank, facts in met.items())

        def body(link: Link) -> None:
            found.append(find())
            admission.take_in(self._control, found[0], statement, self._facts, learn)

        self._perform(Operation.ADMIT, body, {"invitation": token})
        return found[0]

    def bring(self, engines: Iterable[Engine], members: Iterable[int]) -> None:
        """Has engines of these ranks, in one order on all of them, go on among `members`, who have admitted
        some that the engines do not know: their next operations connect them. Not collective, called on all.
        """
        for number, engine in enumerate(engines):
            engine.control_plane().go_beside(self._control.membership, f"exchanges/{number}", members)

    def hand_over(self, body: Callable[[Link], None], newcomers: int) -> None:
        """Runs `body` on the link of members and newcomers. newcomers: a number that stands for them."""
        self._perform(Operation.HAND_OVER, body, {"newcomers": newcomers})

    def refuse(self, problem: ArgumentError) -> NoReturn:
        """Takes part in a `hand_over` only to have all ranks raise `problem`."""
        with self._control.issuing:
            self._control.refuse(Operation.HAND_OVER, problem, Schedule())

    def _perform(self, operation: Operation, body: Callable[[Link], None], agreed: Mapping[str, int]) -> None:
        with self._control.issuing:
            self._control.check_alive()
            completion = self._control.perform(
                operation, Schedule(), lambda link, limits: body(link), agreed=agreed
            )
            self._await_device()
        completion.host_wait()

    def _await_device(self) -> None:
        """On CUDA, returns once the communication stream has done what it holds. A sum there that waits for a
        rank which has died would never end: raises PeerTimeoutError then, or after the time-out.
        """
        stream, membership = self._control.session.stream, self._control.membership
        if stream is None:
            return

        def job() -> None:
            begin = time.monotonic()
            pause = _FIRST_LOOK
            while not stream.query():
                waited = time.monotonic() - begin
                if waited > self._control.timeout:
                    raise LinkError("the device did not end its sums in time")
                if waited > _FIRST_LOOK:
                    membership.check_members()
                    pause = min(2 * pause, _LONGEST_PAUSE)
                time.sleep(pause / 10)
            self._check_device()

        self._control.locally(job, Schedule())

    def _check_device(self) -> None:
        """Raises LinkError if what the device has done has no result."""
