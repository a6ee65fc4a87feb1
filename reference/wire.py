"""Moving rows between the ranks of a torch.distributed group: gloo on CPU, NCCL on CUDA.

Everything travels as bytes, so every dtype passes and no bit of a value changes. This file knows ranks and
rows; what the rows mean is the business of all_to_all.py and all_to_all_low_latency.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import require


@dataclass(frozen=True)
class Wire:
    """The living ranks of an expert-parallel group of `num_ranks`.

    `members[i]` is the expert-parallel rank of member `i` of `group`, ascending. A rank that is not a member
    is masked: it sends and receives nothing. Errors of the transport (a dead peer, a time-out of the group)
    come through as torch raises them.
    """

    group: dist.ProcessGroup
    rank: int
    num_ranks: int
    members: tuple[int, ...]

    def __post_init__(self) -> None:
        ordered = list(self.members) == sorted(set(self.members))
        require(
            ordered and all(0 <= m < self.num_ranks for m in self.members), f"members: got {self.members}"
        )
        require(self.rank in self.members, f"rank: got {self.rank}; allowed: one of {self.members}")

    @classmethod
    def whole(cls, group: dist.ProcessGroup) -> Wire:
        """A wire without masked ranks."""
        num_ranks = group.size()
        return cls(group, group.rank(), num_ranks, tuple(range(num_ranks)))

    def all_gather(self, t: Tensor) -> dict[int, Tensor]:
        """Every member's `t`, by expert-parallel rank. Shape and dtype must be the same on all members."""
        mine = _as_bytes(t, 1, t.numel())
        everyone = [torch.empty_like(mine) for _ in self.members]
        dist.all_gather(everyone, mine, group=self.group)
        return {m: raw.view(t.dtype).view(t.shape) for m, raw in zip(self.members, everyone, strict=True)}

    def all_to_all_rows(self, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """Send the first `send_counts[0]` rows to rank 0, the next `send_counts[1]` to rank 1 and so on.

        `rows` [S, ...]: any dtype. Both counts are per expert-parallel rank, zero for masked ranks. Returns
        the rows received, [N, ...], by ascending source rank.
        """
        return self.start_all_to_all_rows(rows, send_counts, recv_counts).wait()

    def start_all_to_all_rows(
        self, rows: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> RowsUnderway:
        """The first half of `all_to_all_rows`: what is returned gives the rows when it is waited for."""
        self._check_counts(send_counts, recv_counts)
        require(rows.shape[0] == sum(send_counts), f"rows: got {rows.shape[0]}; allowed: {sum(send_counts)}")
        sent = _as_bytes(rows, rows.shape[0], math.prod(rows.shape[1:]))
        received = sent.new_empty(sum(recv_counts), sent.shape[1])
        work = dist.all_to_all_single(
            received,
            sent,
            [recv_counts[m] for m in self.members],
            [send_counts[m] for m in self.members],
            group=self.group,
            async_op=True,
        )
        return RowsUnderway(work, sent, received.view(rows.dtype).view(received.shape[0], *rows.shape[1:]))

    def _check_counts(self, *counts: Sequence[int]) -> None:
        for per_rank in counts:
            require(
                len(per_rank) == self.num_ranks, f"counts: got {len(per_rank)}; allowed: {self.num_ranks}"
            )
            masked = [r for r in range(self.num_ranks) if r not in self.members and per_rank[r] != 0]
            require(not masked, f"counts: rows for the masked ranks {masked}")


@dataclass
class RowsUnderway:
    """An exchange that was started. Keeps what is being sent alive until then."""

    work: dist.Work
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """The received rows. On CUDA the current stream waits, on CPU the caller."""
        self.work.wait()
        return self.received


def _as_bytes(t: Tensor, num_rows: int, width: int) -> Tensor:
    """A tensor of num_rows * width elements as [num_rows, bytes] uint8, not copied if contiguous."""
    # as_strided: sizes of 1 make any stride count as contiguous, and view(dtype) refuses odd ones.
    return t.contiguous().as_strided((num_rows, width), (width, 1)).view(torch.uint8)
