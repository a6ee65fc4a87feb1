"""Point-to-point transfers of bytes over a private process group, and the driver of what waits for them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.collectives.grouped_calls import make_grouped
from deepep.runtime.control.transport import Link, transport

Transfer = tuple[Tensor, int]
"""A message, uint8, and the rank that it goes to or comes from."""
Steps = Generator[list[Any], None, None]
"""A schedule of one piece: yields works, and goes on once they are done."""

MANY_UNITS = 64 << 10
"""Bytes of the ranks' exponents up to which one round of messages is faster than the transport's rounds."""


class PointToPoint:
    """Messages between a link's members, by their places in it. bytes_sent: of payload, by this rank."""

    def __init__(self, link: Link) -> None:
        self.rank, self.num_ranks = link.members.index(link.rank), len(link.members)
        self.group = link.group
        self.bytes_sent = 0

    def exchange(self, sends: Iterable[Transfer], receives: Iterable[Transfer], tag: int) -> list[Any]:
        """Starts all of these; the works to wait for. Empty messages do not travel."""
        sends = [(message, rank) for message, rank in sends if message.numel()]
        receives = [(message, rank) for message, rank in receives if message.numel()]
        self.bytes_sent += sum(message.numel() for message, _ in sends)
        first = (sends or receives)[0][0] if sends or receives else None
        if first is None:
            return []
        with transport():
            calls = [partial(self.group.recv, [message], rank, tag) for message, rank in receives]
            calls += [partial(self.group.send, [message], rank, tag) for message, rank in sends]
            if first.is_cuda:
                works = [make_grouped(self.group, first.device, calls)]
            else:
                works = [call() for call in calls]
        # A work of gloo keeps no tensor alive; and on CUDA another piece could be given a message's memory
        # before NCCL's stream has read it.
        return [(work, sends, receives) for work in works]

    def all_reduce(self, values: Tensor, op: dist.ReduceOp) -> list[Any]:
        """The transport's own, in place. Counted as a ring would send it."""
        if not values.numel():
            return []
        size, ranks = values.numel() * values.element_size(), self.num_ranks
        self.bytes_sent += 2 * size * (ranks - 1) // ranks
        options = dist.AllreduceOptions()
        options.reduceOp = op
        with transport():
            return [self.group.allreduce([values], options)]


def drive(pieces: Sequence[Steps]) -> None:
    """Runs schedules side by side: while the works of one are waited for, those of the others are under way.

    In an order that depends on nothing but their number, so all ranks start the same works in the same
    order. Raises LinkError.
    """
    running = [(piece, next(piece, None)) for piece in pieces]
    while running:
        left = []
        for piece, works in running:
            for entry in works or ():
                work = entry[0] if isinstance(entry, tuple) else entry
                with transport():
                    work.wait()
            if works is not None:
                left.append((piece, next(piece, None)))
        running = left


def empty_message(size: int, device: torch.device) -> Tensor:
    """Room for a message."""
    return torch.empty(size, dtype=torch.uint8, device=device)
