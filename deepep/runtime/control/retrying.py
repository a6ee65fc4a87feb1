"""Retries: an operation under way when ranks went missing is made again by those that are left."""

from __future__ import annotations

from collections.abc import Callable

from deepep.errors import ArgumentError, PeerTimeoutError
from deepep.runtime.control import agreement
from deepep.runtime.control.agreement import Header
from deepep.runtime.control.membership import Membership
from deepep.runtime.control.shrinking import Course
from deepep.runtime.control.transport import LinkError
from deepep.runtime.requests import LOW_LATENCY, Operation


class Retry(Exception):
    """Raised inside an attempt: the operation is made again."""


class Retries:
    """Attempts at one rank's operations, inside the queue.

    shrinks: low-latency operations go on without ranks that are missing; else nothing is made again.
    first_half: of a hooked operation that has sent; it is made again together with the second.
    owes_word: the operation under way is one that the ranks acknowledge.
    """

    def __init__(self, membership: Membership, shrinks: bool) -> None:
        self._membership, self.shrinks = membership, shrinks
        self.first_half: Callable[[], None] | None = None
        self.owes_word = False

    def acknowledge(self) -> None:
        """Waits until every rank has its rows. Raises Retry, or what all of them raise."""
        progress = self._membership.progress
        try:
            header = Header(Operation.ACKNOWLEDGE, progress.sequence)
            agreement.exchange(self._membership.payload(), header, None)
        except ArgumentError:
            progress.sequence += 1  # a rank has refused its next operation, and not called its hook
            raise
        except LinkError as error:
            if self._membership.rejoin():  # one that has changed the members since has passed here
                return
            if self._membership.shrink(self._membership.fault(error)) is not Course.GO_ON:
                raise Retry from None

    def attempt(
        self, operation: Operation | None, first: Callable[[], object], again: Callable[[], object]
    ) -> None:
        """Runs `first`, and after a fault `again` as long as the survivors go on; `operation` None: they do
        if there are masks, as in low latency.
        """
        attempt = first
        while True:
            try:
                attempt()
                return
            except Retry:
                pass
            except (LinkError, PeerTimeoutError) as error:
                if not self.shrinks or (operation is not None and operation not in LOW_LATENCY):
                    raise
                fault = self._membership.fault(error) if isinstance(error, LinkError) else error
                if self._membership.shrink(fault) is Course.GO_ON:
                    return
            attempt = again
