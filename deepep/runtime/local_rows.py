"""LocalRows: what a rank does with received rows on its own, one row for every lane that names its experts.

A received row has K top-k entries ("lanes"), of which those that name local experts each get a row in the
expanded layout. `slots` [N, K] int64 says which, -1 for the others. A backend with kernels for this has them
in a subclass; the bodies here are torch alone, run anywhere, and never wait for a device.

Shapes: N rows received, K lanes, L local experts, X expanded rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

BF16_NAN, FLOAT32_NAN = (
    0x7FFF,
    0x7FFFFFFF,
)  # every NaN of a sum, as Hopper's conversions and additions leave it


class LocalRows:
    """See the module."""

    def sort(self, topk_idx: Tensor, slots: Tensor, counts: Tensor) -> None:
        """Writes slots [N, K], without gaps, and counts [L] int32: lanes of each expert.

        topk_idx [N, K]: local expert or -1. In the order of experts, then rows, then lanes.
        """
        flat, num_local = topk_idx.flatten(), counts.shape[0]
        bins = torch.where(flat < 0, num_local, flat).long()
        order = torch.sort(bins, stable=True).indices
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        slots.copy_(torch.where(flat < 0, -1, places).view(topk_idx.shape))
        ones = torch.ones(1, dtype=torch.int32, device=bins.device).expand(len(bins))
        found = torch.zeros(num_local + 1, dtype=torch.int32, device=bins.device).index_add_(0, bins, ones)
        counts.copy_(found[:num_local])

    def spread(self, x: Tensor, slots: Tensor, out: Tensor) -> None:
        """Writes row n of x [N, H] to the rows slots[n] of `out` [X, H], bit by bit; others stay."""
        row, lane = (slots >= 0).nonzero(as_tuple=True)
        out.view(torch.int64)[slots[row, lane]] = x.view(torch.int64)[row]

    def reduce(self, y: Tensor, slots: Tensor, out: Tensor, biases: tuple[Tensor, ...] = ()) -> None:
        """Writes to out [N, H]: 0.0 + biases + the rows slots[n] of y [X, H], lanes ascending; in float32
        (float64 for float64), rounded once.
        """
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        total = torch.zeros(out.shape, dtype=wide, device=out.device)
        for bias in biases:
            total += bias.to(wide)
        if y.shape[0]:
            for lane in slots.unbind(1):
                term = y.index_select(0, lane.clamp(min=0)).to(wide)
                total = torch.where((lane >= 0).unsqueeze(1), total + term, total)
        out.copy_(total)
        settle_nans(out, total)


def settle_nans(out: Tensor, value: Tensor) -> None:
    """Gives every NaN of a sum `value`, rounded to `out`, the one pattern that all backends leave."""
    if out.dtype == torch.bfloat16:
        out.view(torch.int16).masked_fill_(value.isnan(), BF16_NAN)
    elif out.dtype == torch.float32:
        out.view(torch.int32).masked_fill_(value.isnan(), FLOAT32_NAN)
