"""Reduce-scatter: every rank gets one part of the sum, which it forms itself. One round.

R ranks, N elements a part. Part r is rank r's; a lossy codec rounds addends once, and sums not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.collectives import codecs
from deepep.collectives.codecs import FIXED, PLAIN, FixedPoint, Messages
from deepep.collectives.schedules import ADDEND
from deepep.collectives.transport import PointToPoint, Steps, drive, empty_message


def reduce_scatter(
    net: PointToPoint,
    out: Tensor,
    parts: Tensor,
    codec: str,
    divisor: int,
    dice: tuple[int, int, int] | None,
) -> None:
    """Writes to `out` [N] the sum over the ranks of their `parts` [R, N] for this rank, divided.

    In fixed point the sum does not depend on the order; else ranks ascending, in float32, or float64.
    """
    drive([_steps(net, out, parts, codec, divisor, dice)])


def _steps(
    net: PointToPoint,
    out: Tensor,
    parts: Tensor,
    codec: str,
    divisor: int,
    dice: tuple[int, int, int] | None,
) -> Steps:
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    is_fixed = codec == FIXED and wide == torch.float32
    name = PLAIN if is_fixed or wide == torch.float64 else codec

    def messages(sender: int) -> Messages:
        key = None if dice is None or name == PLAIN else codecs.rounding_key(*dice, sender, ADDEND)
        return Messages(name, out.dtype, key)

    count = out.numel()
    mine = [messages(net.rank).encode(part.to(wide), rank * count) for rank, part in enumerate(parts)]
    addends = [
        mine[rank] if rank == net.rank else empty_message(messages(rank).size(count), out.device)
        for rank in range(net.num_ranks)
    ]
    others = [rank for rank in range(net.num_ranks) if rank != net.rank]
    yield net.exchange([(mine[rank], rank) for rank in others], [(addends[rank], rank) for rank in others], 0)
    if is_fixed:
        out.copy_(FixedPoint.sum([addend.view(out.dtype).float() for addend in addends], float(divisor)))
        return
    total = torch.empty(count, dtype=wide, device=out.device)
    for rank, addend in enumerate(addends):
        messages(rank).decode(addend, total, add=rank > 0)
    out.copy_(torch.div(total, total.new_full((), divisor)))
