"""The oracle's wire over a link of the control plane, so that its transport errors are the link's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepep.reference.wire import RowsUnderway, Wire
from deepep.runtime.control.transport import Link, transport


class LinkWire(Wire):
    """A Wire between the members of a link."""

    def all_gather(self, t: torch.Tensor) -> dict[int, torch.Tensor]:
        with transport():
            return super().all_gather(t)

    def start_all_to_all_rows(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> RowsUnderway:
        with transport():
            started = super().start_all_to_all_rows(rows, send_counts, recv_counts)
        return LinkRows(started.work, started.sent, started.received)


class LinkRows(RowsUnderway):
    """Rows under way over a link."""

    def wait(self) -> torch.Tensor:
        with transport():
            return super().wait()


def wire_over(link: Link) -> LinkWire:
    """The wire between the members of `link`."""
    return LinkWire(link.group, link.rank, link.num_ranks, link.members)
