"""The oracle's wire over a link of the control plane, so that its transport errors are the link's."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepep.reference.wire import RowsUnderway, Wire
from deepep.runtime.control.transport import Link, transport
from deepep.runtime.control.waits import WaitRecorder

_ROWS = 0x0DEF  # a message tag


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


@dataclass(frozen=True)
class MeasuredWire(LinkWire):
    """A wire whose rows travel from peer to peer, so that each peer's can be waited for by itself.

    All members use it for an operation, or none: a collective and these messages would not meet.
    """

    waits: WaitRecorder | None = None
    operation: str = ""

    def start_all_to_all_rows(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> RowsUnderway:
        self._check_counts(send_counts, recv_counts)
        width = math.prod(rows.shape[1:])
        sent = rows.contiguous().as_strided((rows.shape[0], width), (width, 1)).view(torch.uint8)
        received = sent.new_empty(sum(recv_counts), sent.shape[1])
        leaving, coming = sent.split(list(send_counts)), received.split(list(recv_counts))
        started = MeasuredRows(
            None,  # type: ignore[arg-type]  # no one work stands for all of them
            sent,
            received.view(rows.dtype).view(received.shape[0], *rows.shape[1:]),
            self.waits,
            self.operation,
        )
        at = self.members.index(self.rank)
        coming[self.rank].copy_(leaving[self.rank])
        with transport():
            for peer in self.members[at + 1 :] + self.members[:at]:
                place = self.members.index(peer)
                if recv_counts[peer]:
                    started.receives[peer] = self.group.recv([coming[peer]], place, _ROWS)
                if send_counts[peer]:
                    started.sends.append(self.group.send([leaving[peer]], place, _ROWS))
        return started


@dataclass
class MeasuredRows(LinkRows):
    """Messages under way, by peer. A peer is charged with what its rows took beyond the ones before."""

    waits: WaitRecorder | None = None
    operation: str = ""
    receives: dict[int, Any] = field(default_factory=dict)
    sends: list[Any] = field(default_factory=list)

    def wait(self) -> torch.Tensor:
        assert self.waits is not None
        with transport():
            while self.receives:  # a work that is waited for once more waits for another message
                peer = next(iter(self.receives))
                work, began = self.receives.pop(peer), time.perf_counter_ns()
                work.wait()
                passed = time.perf_counter_ns() - began
                self.waits.waited_for(self.operation, "rows", peer, passed)
            began = time.perf_counter_ns()
            while self.sends:
                self.sends.pop().wait()
            self.waits.waited_to_send(time.perf_counter_ns() - began)
        return self.received


def wire_over(link: Link) -> LinkWire:
    """The wire between the members of `link`."""
    if link.waits is None:
        return LinkWire(link.group, link.rank, link.num_ranks, link.members)
    return MeasuredWire(link.group, link.rank, link.num_ranks, link.members, link.waits, link.operation)
