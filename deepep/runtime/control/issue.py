"""The control plane: issues one rank's operations in order, each behind its control exchange.

It owns the queue (where communication runs), the membership (between whom) and the bookkeeping between calls:
sequence numbers, an un-called hook, the end. A backend gives it the body of each operation.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NoReturn

import torch

from deepep.errors import ArgumentError, DeepEPError, DestroyedError, HookPendingError
from deepep.runtime.ambient import job_modes
from deepep.runtime.completion import Completion
from deepep.runtime.control import agreement, processes
from deepep.runtime.control.agreement import NO_LIMIT, Header
from deepep.runtime.control.comm_queue import CommQueue, StreamQueue, ThreadQueue
from deepep.runtime.control.issuing import Issuing
from deepep.runtime.control.meeting import StoreError
from deepep.runtime.control.membership import Membership
from deepep.runtime.control.retrying import Retries
from deepep.runtime.control.settling import Progress
from deepep.runtime.control.shrinking import ACKNOWLEDGE
from deepep.runtime.control.transport import Link, LinkError
from deepep.runtime.control.waits import WaitRecorder
from deepep.runtime.engine import Observer
from deepep.runtime.requests import Hook, Operation, Schedule
from deepep.runtime.session import Session

LAST_MOMENT = 0.5  # seconds that an abandoned operation has for reaching its peers


class ControlPlane:
    """One per engine. Calls may come from several threads; each operation is issued as a whole."""

    def __init__(
        self,
        session: Session,
        membership: Membership,
        about: Mapping[str, int | str],
        masks: bool = False,
    ) -> None:
        """about: what is being constructed; part of what the ranks have to state alike.

        masks: low-latency operations on the host go on without ranks that are missing.
        """
        self.session, self.membership, self._about = session, membership, about
        self.statement = about
        membership.device_type = session.device.type
        self.rank, self.num_ranks, self.timeout = session.rank, session.num_ranks, membership.timeout
        self.queue: CommQueue
        if session.stream is not None:
            self.queue = StreamQueue(session.stream)
        else:
            self.queue = ThreadQueue(f"deepep-rank-{self.rank}", processes.weak_method(self.interrupt))
        self._retries = Retries(membership, shrinks=masks and session.stream is None)
        self.observer: Observer | None = None
        self.waits = WaitRecorder(self.rank, self.num_ranks, rows=session.stream is None)
        self.issuing = Issuing(processes.weak_method(self.withdraw))
        self._unreceived: str | None = None
        self.pending_hook: Hook | None = None
        self._followers: tuple[ControlPlane, ...] = ()
        self._end = ""
        self._told: BaseException | None = None
        self._departs = False
        processes.leak_in_children(self)

    # construction

    def agree(self, statement: Mapping[str, int | str]) -> None:
        """Connects the ranks, if all of them construct the same thing; else all raise."""
        self.statement = {**self._about, **statement}
        self.meet("construct")
        self._departs = True

    def meet(self, operation: str) -> None:
        """Connects the ranks of the present membership, if all of them state the same."""
        self.membership.begin(operation)
        agreement.agree(self.membership, "engine", self.statement, None)
        self.membership.control()

    def go_on_with(self, membership: Membership) -> None:
        """Uses another membership of this rank from now on. Inside the queue."""
        membership.device_type = self.session.device.type
        self.membership = membership
        self._retries = Retries(membership, self._retries.shrinks)

    # operations

    @property
    def progress(self) -> Progress:
        """This rank's position."""
        return self.membership.progress

    def enter(self, phase: str) -> None:
        """Inside a body: the next phase begins."""
        self.progress.phase = phase
        if self.observer is not None:
            self.observer(self.progress.operation, phase)

    def perform(
        self,
        operation: Operation,
        schedule: Schedule,
        body: Callable[[Link, dict[int, int]], None],
        *,
        agreed: Mapping[str, int],
        inspect: Callable[[], None] | None = None,
        num_tokens: int = 0,
        limit: int = NO_LIMIT,
        tensors: Iterable[torch.Tensor | None] = (),
    ) -> Completion:
        """Issues an operation: control exchange, then `body(payload link, limits by rank)`.

        inspect: checks of values, run once `schedule.after` has passed; what it refuses, all ranks refuse.
        """
        self.check_alive()
        if self.pending_hook is not None:
            self.refuse(operation, self.hook_pending_error(), schedule)

        def job() -> None:
            problem = self._inspect(schedule, inspect)
            self._retries.owes_word = self._retries.shrinks

            def attempt() -> None:
                limits = self._control(operation, problem, agreed, num_tokens, limit)
                body(self._payload(), limits)

            self._retries.attempt(operation, attempt, attempt)
            if schedule.hook and self._retries.shrinks:
                self._retries.first_half = attempt

        return self.queue.submit(self._guarded(job), tensors)

    def proceed(
        self,
        phase: str,
        schedule: Schedule,
        body: Callable[[Link], None],
        tensors: Iterable[torch.Tensor | None] = (),
    ) -> Completion:
        """Issues a further part of the operation issued last, without a control exchange."""
        self.check_alive()

        def attempt() -> None:
            self.enter(phase)
            body(self._payload())

        def job() -> None:
            self.queue.wait_for(None, schedule.allocate_on_comm_stream)
            self.progress.restart()
            begin, self._retries.first_half = self._retries.first_half, None
            if begin is None:
                attempt()
                return

            def again() -> None:
                begin()
                attempt()

            self._retries.attempt(None, attempt, again)

        return self.queue.submit(self._guarded(job), tensors)

    def locally(
        self,
        job: Callable[[], None],
        schedule: Schedule,
        tensors: Iterable[torch.Tensor | None] = (),
    ) -> Completion:
        """Runs a job that does not communicate, in its turn."""
        self.check_alive()

        def waiting() -> None:
            self.queue.wait_for(schedule.after, schedule.allocate_on_comm_stream)
            job()

        return self.queue.submit(self._guarded(waiting), tensors)

    def refuse(self, operation: Operation, problem: ArgumentError, schedule: Schedule) -> NoReturn:
        """Takes part in `operation` only to say that it cannot;
        raises what all raise, or `problem` at once.
        """
        self.check_alive()
        problem = problem.at(self.rank)

        def attempt() -> None:
            self._control(operation, problem, {}, 0, NO_LIMIT)

        def job() -> None:
            try:
                self._retries.attempt(operation, attempt, attempt)
            finally:
                self._retries.owes_word = False  # the others had this in its place

        completion = self.queue.submit(self._guarded(job))
        if not (schedule.asynchronous or schedule.hook):
            try:
                completion.host_wait()
            except ArgumentError:
                raise
            except DeepEPError as unanswered:
                raise problem from unanswered
        raise problem

    def barrier(
        self,
        schedule: Schedule,
        arguments: Mapping[str, int] | None = None,
        operation: Operation = Operation.BARRIER,
    ) -> None:
        """Returns once every rank has called it, as the same operation; `arguments` must agree."""
        with self.issuing:
            completion = self.perform(operation, schedule, lambda link, limits: None, agreed=arguments or {})
            self.finish(schedule, completion)

    def gather(self, values: torch.Tensor, agreed: Mapping[str, int]) -> dict[int, torch.Tensor]:
        """Every member's `values`, by rank: on the host, of one dtype and shape, which `agreed` says."""
        found: dict[int, torch.Tensor] = {}

        def body(link: Link, limits: dict[int, int]) -> None:
            self.enter("words")
            found.update(self.membership.control().all_gather(values))

        with self.issuing:
            self.perform(Operation.GATHER, Schedule(), body, agreed=agreed).host_wait()
        return found

    def mask(self, rank: int, masked: bool) -> None:
        """Leaves a rank out from the next operation on, or takes it in again."""
        change = self.membership.mask if masked else self.membership.unmask
        with self.issuing:
            self.locally(lambda: change(rank), Schedule()).host_wait()

    def lead(self, followers: Iterable[ControlPlane]) -> None:
        """Settles faults of these, of the same ranks, from now on (`follow`); of no others."""
        before, self._followers = self._followers, tuple(followers)
        for follower in before:
            follower.membership.settled_by = None
        for follower in self._followers:
            follower.membership.settled_by = self.membership
        self.membership.followers = tuple(follower.membership for follower in self._followers)

    def follow(self, members: tuple[int, ...]) -> None:
        """Goes on with `members`, after a fault that another has settled for this one."""
        with self.issuing:
            self.locally(lambda: self.membership.follow(members), Schedule()).host_wait()

    def go_beside(self, leader: Membership, name: str, members: Iterable[int]) -> None:
        """Goes on among `members` of another membership, over a link of its own that the next operation
        makes: called on all of them, and with one name. Who was masked here is, or is not, as it is there.
        """

        def go() -> None:
            previous = self.membership
            self.go_on_with(leader.beside(previous, name, members))
            previous.move()

        with self.issuing:
            self.locally(go, Schedule()).host_wait()

    @property
    def masked(self) -> frozenset[int]:
        """The ranks that are left out."""
        return self.membership.masked

    def finish(self, schedule: Schedule, completion: Completion) -> Completion | None:
        """Waits for a synchronous operation; gives back the completion of an asynchronous one."""
        if schedule.asynchronous:
            return completion
        completion.current_stream_wait()
        return None

    # hooks

    def hook(
        self,
        operation: Operation,
        sent: Completion,
        receive: Callable[[], None],
        tensors: Iterable[torch.Tensor | None] = (),
    ) -> Hook:
        """The receive half of an operation that has sent. Until it is called, no other may begin.

        Calling it again does nothing.
        """
        is_called = False

        def hook() -> None:
            nonlocal is_called
            with self.issuing:
                if is_called:
                    return
                self.check_alive()
                is_called = True
                self.forget_hook()
                sent.current_stream_wait()
                received = self.proceed("receive", Schedule(), lambda link: receive(), tensors)
            received.current_stream_wait()

        self.await_hook(operation, hook)
        return hook

    def await_hook(self, operation: Operation, hook: Hook) -> None:
        """An operation has sent, and its hook receives: no other may begin before that is taken."""
        self._unreceived, self.pending_hook = operation.label, hook

    def forget_hook(self) -> None:
        """Other operations may begin."""
        self._unreceived = self.pending_hook = None

    def hook_pending_error(self) -> ArgumentError:
        """The refusal of an operation while a hook was not called."""
        return HookPendingError(
            "hook",
            f"a new operation while the hook of {self._unreceived} had not been called",
            "the hook called first",
            self.rank,
        )

    # what this rank alone raises

    def withdraw(self, error: BaseException) -> None:
        """Has the others raise PeerTimeoutError with this rank's name, after what was issued before.

        It raises `error` in a call, which they do not know of.
        """
        if self._end or self._told is error:
            return
        self._told = error
        reason = self._reason(error)
        with contextlib.suppress(DeepEPError):
            self.queue.submit(lambda: self.membership.withdraw(reason)).host_wait()

    def interrupt(self, error: BaseException) -> None:
        """The same when this rank no longer waits for an operation under way: at once."""
        if self._end or self._told is error:
            return
        self._told = error
        self.membership.withdraw(self._reason(error))

    def _reason(self, error: BaseException) -> str:
        return agreement.reason(self.rank, error)

    # the end

    def check_alive(self) -> None:
        """Raises DestroyedError after the end."""
        if self._end:
            raise DestroyedError(f"rank {self.rank}: {self._end}")

    def leave(self, is_quiet: bool = False) -> tuple[int, ...]:
        """A last exchange, so that no rank closes while another still reads; then close. The ranks that came
        to it: all members, or none.

        is_quiet: nothing of this rank writes to its peers' memory any more.
        """
        with self.issuing:
            if self._end:
                return ()
            self._unreceived = self.pending_hook = None
            all_came = len(self.membership.members) == 1
            if not all_came and self.membership.connected:
                with contextlib.suppress(DeepEPError):  # whoever is missing then is not missed any more
                    self.perform(
                        Operation.DESTROY, Schedule(), lambda link, limits: None, agreed={}
                    ).host_wait()
                    all_came = True
            self.close(self.timeout, is_quiet)
            if not all_came:
                return ()
            self.membership.finish()
            return self.membership.members

    def abandon(self, is_quiet: bool = False) -> None:
        """Leaves after a failure of this rank: peers learn that it will not come.

        Nothing is waited for, but for a moment what is under way.
        """
        self.close(min(self.timeout, LAST_MOMENT), is_quiet)

    def close(self, seconds: float, is_quiet: bool = False) -> None:
        """Ends after what was issued, or after `seconds`. Idempotent."""
        with self.issuing:
            if self._end:
                return
            self._end = "the buffer was destroyed"
            self._unreceived = self.pending_hook = None
            if not self.queue.close(seconds):
                self.membership.disconnect()  # or a thread of ours would still wait when the process ends
                self.queue.close(LAST_MOMENT)
            if self._departs:
                self.membership.depart(is_quiet)
            self.membership.disconnect()

    def forked(self) -> None:
        """In a child of this rank's process: the connections are the parent's, and the queue's thread too."""
        self._end = "this process is a fork of the one that the buffer belongs to"
        self.issuing.renew()

    # inside the queue

    def acknowledge(self) -> None:
        """In the body of a low-latency operation, once this rank has its rows: waits until every rank has.

        So no rank is more than one operation behind when a fault is settled. Without masks it does nothing.
        """
        if self._retries.owes_word:
            self.enter(ACKNOWLEDGE)
            self._retries.acknowledge()

    def _guarded(self, job: Callable[[], None]) -> Callable[[], None]:
        def guarded() -> None:
            try:
                with job_modes():
                    job()
            except LinkError as error:
                raise self.membership.fault(error) from None
            except StoreError as error:
                raise self.membership.store_lost(error) from None
            except DeepEPError:
                raise  # agreed between the ranks, or local: the link is as good as before
            except BaseException as error:
                # Unforeseen, and known to this rank alone: let the others fail now rather than at their
                # deadline.
                self._told = error
                self.membership.withdraw(self._reason(error))
                raise

        return guarded

    def _inspect(self, schedule: Schedule, inspect: Callable[[], None] | None) -> ArgumentError | None:
        try:
            self.queue.wait_for(schedule.after, schedule.allocate_on_comm_stream)
        except ArgumentError as error:
            return error.at(self.rank)  # the layout's, say: its cause is the cause here
        except DeepEPError as error:
            return ArgumentError("previous_event", f"one that failed ({error})", "one that succeeded")
        if inspect is not None:
            try:
                inspect()
            except ArgumentError as error:
                return error
        return None

    def _control(
        self,
        operation: Operation,
        problem: ArgumentError | None,
        agreed: Mapping[str, int],
        num_tokens: int,
        limit: int,
    ) -> dict[int, int]:
        try:
            return self._exchange(operation, problem, agreed, num_tokens, limit)
        except LinkError:
            if not self.membership.rejoin():
                raise
            return self._exchange(operation, problem, agreed, num_tokens, limit)

    def _exchange(
        self,
        operation: Operation,
        problem: ArgumentError | None,
        agreed: Mapping[str, int],
        num_tokens: int,
        limit: int,
    ) -> dict[int, int]:
        self.membership.begin(operation.label)
        link = self.membership.control()
        self.enter("control")
        self.progress.sequence += 1
        header = Header(operation, self.progress.sequence, agreed, num_tokens, limit)
        header = replace(header, busy=self.waits.busy(), asks=self.waits.asks)
        came = time.perf_counter_ns()

        def arrived(busy: dict[int, int], asked: bool) -> None:
            self.waits.arrived(operation.label, busy, asked, time.perf_counter_ns() - came)

        return agreement.exchange(link, header, problem, arrived)

    def _payload(self) -> Link:
        """The link that rows travel on; it notes waits by peer in operations that measure them."""
        link = self.membership.payload()
        if not self.waits.by_peer:
            return link
        return replace(link, waits=self.waits, operation=self.progress.operation)
