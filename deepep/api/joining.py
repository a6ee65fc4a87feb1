"""Joining: a Buffer's ranks change while it works. A new process takes a vacant rank, or a rank goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.distributed_c10d import Store

from deepep.api import arguments
from deepep.api.arguments import AT_ONCE
from deepep.api.lifetime import BufferLifetime
from deepep.errors import ArgumentError, ArgumentTypeError, ModeError
from deepep.runtime.checks import check_int
from deepep.runtime.control import admission
from deepep.runtime.control.invitation import Invitation
from deepep.runtime.labels import with_label
from deepep.runtime.requests import Operation
from deepep.runtime.traffic_lanes import VARIABLES

if TYPE_CHECKING:
    from typing_extensions import Self


class Joining(BufferLifetime):
    """Ranks that join and go. Needs enable_shrink.

    A rank is vacant if its process has died, or left, and it is masked on all others; or if the buffer was
    made for more ranks than its group has (max_num_ranks). For E experts, R counts vacant ranks too: their
    experts receive nothing until somebody comes.
    """

    @with_label
    def invite(self, ranks: Sequence[int]) -> str:
        """An invitation of masked ranks, one line of text, the same on all members; collective.

        Start a process for each, hand it over, have it call `Buffer.join(invitation, rank)`, and call
        `admit(invitation)` on all members. It serves once, and only as long as the members stay the same.

        Raises RangeError for ranks that are not masked, ModeError without enable_shrink.
        """
        return self._engine.invite(self._changing(Operation.INVITE, ranks))

    @with_label
    def admit(self, invitation: str) -> None:
        """Takes in those who are invited: returns when they have come and are connected; collective.

        From then on the members' masks are those of the invitation, and a rank that is masked can come back
        by invitation alone. Operations begin on a new link; handles of high-throughput dispatches from before
        still hold. On CUDA memory is made anew, outside of graphs, and a cached dispatch takes a handle of
        the same ranks alone; graphs captured before go on among those who were members then.

        Raises PeerTimeoutError with the ranks that did not come in time, MismatchError if what they construct
        is not what the members have: the same on all, the members go on as before, and may invite again.
        Raises RangeError for another text, or if the members have changed since.
        """
        self._check_changes()
        try:
            text = _text(invitation)
        except ArgumentTypeError as error:
            self._refuse(Operation.ADMIT, error, AT_ONCE)
        self._engine.admit(text)

    @with_label
    def dismiss(self, ranks: Sequence[int]) -> None:
        """Lets ranks go: their buffers are destroyed, the others go on without them. Collective: all members
        call it, those who go among them.

        A process can take the rank again by invitation. Raises RangeError for ranks that are masked, or all.
        """
        going = self._changing(Operation.DISMISS, ranks)
        self._engine.dismiss(going)
        if self.rank in going:
            self._destroyed = True
            self._finalizer.detach()
            self._abandon()
            self._scratch.clear()

    @classmethod
    def join(
        cls,
        invitation: str,
        rank: int,
        *,
        store: Store | None = None,
        device: str | torch.device | None = None,
        timeout: float | None = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
    ) -> Self:
        """A new process's Buffer, as `rank` of those who invite it. Collective with their `admit`.

        store: any connection to the store that their group met through. None: the invitation says where it
        is, if it is a TCPStore or a FileStore. The other arguments are the constructor's; what has to be the
        same on all ranks comes with the invitation. `group` of such a buffer has no connections: it serves no
        collective of torch.distributed.

        Raises RangeError for another text, a rank that is not invited, or a store that cannot be found;
        PeerTimeoutError if the others do not come.
        """
        invited = Invitation.decode(_text(invitation))
        rank = check_int("rank", rank, 0, invited.num_ranks - 1)
        options: Any = invited.options
        return cls(
            admission.enter(invited, rank, store, arguments.timeout_of(timeout)),
            num_nvl_bytes,
            num_rdma_bytes,
            bool(options["low_latency"]),
            enable_shrink=True,
            backend=invited.backend,
            device=device,
            timeout=timeout,
            symmetric_bytes=options["symmetric_bytes"] or None,
            reduction=options["reduction"],
            ranks_per_domain=options["ranks_per_domain"] or None,
            max_num_ranks=options["num_ranks"] or None,
            **{name: options[name] for name in VARIABLES if options[name] >= 0},
        )

    def _changing(self, operation: Operation, ranks: Sequence[int]) -> tuple[int, ...]:
        self._check_changes()
        try:
            if not isinstance(ranks, (tuple, list, range)):
                raise ArgumentTypeError("ranks", type(ranks).__name__, "a list of ranks")
            return tuple(check_int("ranks", rank, 0, self.group_size - 1) for rank in ranks)
        except ArgumentError as error:
            self._refuse(operation, error, AT_ONCE)

    def _check_changes(self) -> None:
        self._check_alive()
        if not self.enable_shrink:
            allowed = "a buffer constructed with enable_shrink=True"
            raise ModeError("enable_shrink", "False", allowed, self.rank)


def _text(invitation: object) -> str:
    if not isinstance(invitation, str):
        raise ArgumentTypeError("invitation", type(invitation).__name__, "a str")
    return invitation
