"""Connecting: the group between the ranks of a meeting is built by all of them, or given up by all and tried
again, until the deadline.

gloo's constructor cannot be interrupted, and fails now and then though nobody is to blame: a connection is
lost among the many that are made at once, one rank runs out of time for it, and the others find theirs
closed. So it runs in a thread of its own, which is left behind where it does not end; and only when every
rank has said that it has its connections is there a link.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from deepep.runtime.control.meeting import Meeting, MeetingFailed
from deepep.runtime.control.transport import Connections, LinkError, hang_up, private_group, set_timeout

_FIRST_PATIENCE = 2.0  # seconds of the first try, at least; every further one has twice as many
_TRIES = 8  # as many, and the first takes at most this part of the time-out

Build = Callable[[Store, int, int, float], dist.ProcessGroup]
"""Makes the group of a store with a fresh prefix: this rank's position, the size, the seconds it may take."""


def gloo_group(store: Store, position: int, size: int, seconds: float) -> dist.ProcessGroup:
    """The group of CPU tensors that links consist of."""
    return private_group(store, position, size, seconds, "cpu")


class Attempt:
    """A group that is being built by a thread."""

    def __init__(self, build: Callable[[], dist.ProcessGroup]) -> None:
        self.group: dist.ProcessGroup | None = None
        self.error = ""
        self._given_up = False
        self._lock = threading.Lock()
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(build,), name="deepep-connect", daemon=True).start()

    def _run(self, build: Callable[[], dist.ProcessGroup]) -> None:
        try:
            group = build()
        except Exception as error:  # gloo's, or the store's
            self.error = str(error).partition("\n")[0]
        else:
            with self._lock:
                if not self._given_up:
                    self.group = group
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Waits for the end; whether it has come."""
        return self._done.wait(seconds)

    def give_up(self) -> None:
        """Closes the group, now or when it is there."""
        with self._lock:
            self._given_up = True
            group, self.group = self.group, None
        if group is not None:
            hang_up(group)


def connect(
    meeting: Meeting, connections: Connections, timeout: float, deadline: float, build: Build = gloo_group
) -> dist.ProcessGroup:
    """The group of a meeting's members, in ascending order.

    connections: to the store, for gloo, which waits on it, under the meeting's name; each try has one of its
    own. Raises LinkError at the deadline, or before if a member is dead or has raised one; MeetingFailed if
    the meeting has ended.
    """
    size, position = len(meeting.members), meeting.members.index(meeting.rank)

    def make(number: int, seconds: float) -> dist.ProcessGroup:
        with connections.lease() as store:
            prefix = f"{meeting.store.prefix}/{number}"
            return build(PrefixStore(prefix, store), position, size, seconds)

    if size == 1:
        return make(0, timeout)
    patience = max(_FIRST_PATIENCE, timeout / _TRIES)
    failed = ""
    for number in range(_TRIES):
        until = min(deadline, time.monotonic() + patience)
        seconds = max(until - time.monotonic(), 0.001)
        attempt = Attempt(partial(make, number, seconds))
        try:
            failed = _agree(meeting, number, attempt, until, deadline)
        except BaseException:
            attempt.give_up()
            raise
        meeting.store.remove(f"{number}/0/{position}")  # gloo's: this rank's address, which all have read
        if not failed:
            assert attempt.group is not None
            set_timeout(attempt.group, timeout)
            return attempt.group
        attempt.give_up()
        patience *= 2
        time.sleep(0.01 * 2**number)
    raise LinkError(failed)


def _agree(meeting: Meeting, number: int, attempt: Attempt, until: float, deadline: float) -> str:
    """Waits until every member has its connections, or one has not; why it has not then, else nothing."""
    stage = f"made/{number}"
    missing = list(meeting.members)
    posted, failed = False, ""
    pause = 0.001
    is_over = False  # then this is the last look, at what was posted until then, however late it is made
    while True:
        if not posted and (attempt.wait(pause) or failed or time.monotonic() >= until):
            failed = failed or ("" if attempt.group is not None else attempt.error or "not in time")
            meeting.post(stage, failed)
            posted = True
        for rank in list(missing):
            theirs = meeting.store.get(f"{stage}/{rank}")
            if theirs is not None:
                missing.remove(rank)
                failed = failed or theirs.decode()
        if not missing:
            return failed
        verdict = meeting.verdict()
        if verdict is not None:
            raise MeetingFailed(verdict)
        if is_over:
            raise LinkError(failed or attempt.error or "connections were not made in time")
        if posted:
            time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
        is_late = time.monotonic() >= deadline
        is_over = is_late or meeting.is_alarmed or any(meeting.is_dead(rank) for rank in missing)
