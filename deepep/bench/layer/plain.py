"""The layer as a user of plain torch would write it, and its matrix products alone.

Expert parallelism by `all_to_all_single`: one row per (token, expert) travels, sorted by expert; how many
rows go where is exchanged first, and waited for. A receiver sorts by its experts, multiplies in groups, and
sends the rows back the way they came.

Shapes: R ranks, E experts, L of them here, K top-k, T tokens, H hidden, F width, P rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepep.nn.moe import ExpertParallelMoE

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_product(device: torch.device) -> Product:
    """(rows [P, A], weights [L, A, B], ends [L] int32) -> [P, B]: torch's own; on the CPU one mm each."""
    if device.type == "cpu":
        return _loop
    made: Callable[..., Tensor] | None = getattr(nn.functional, "grouped_mm", None)
    if made is None:
        found: Product = torch._grouped_mm
        return lambda rows, weights, ends: found(rows, weights, ends)
    return lambda rows, weights, ends: made(rows, weights, offs=ends)


def _loop(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """2-D x 3-D -> [P, B], 2-D x 2-D (columns in groups) -> [L, A, B]."""
    cuts = ends.tolist()[:-1]
    if weights.ndim == 3:
        parts = torch.tensor_split(rows, cuts)
        return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])
    columns, parts = torch.tensor_split(rows, cuts, dim=1), torch.tensor_split(weights, cuts)
    return torch.stack([column @ part for column, part in zip(columns, parts, strict=True)])


class Swap(torch.autograd.Function):
    """An all_to_all of rows, whose gradient is the one back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.way_back = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        back: Tensor = Swap.apply(grads[0].contiguous(), *ctx.way_back)
        return back, None, None, None


class PlainLayer:
    """The layer `moe` in plain torch: its router and its experts' parameters, none of its exchanges."""

    def __init__(self, group: Any, moe: ExpertParallelMoE) -> None:
        self.group, self.moe = group, moe
        self.ranks = dist.get_world_size(group)
        self.product = grouped_product(moe.experts.down.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]."""
        moe, local = self.moe, self.moe.num_local_experts
        routing = moe.router(x)
        experts = routing.topk_idx.flatten()  # [T * K]
        order = experts.argsort(stable=True)
        ones = torch.ones_like(experts)
        wanted = torch.zeros(moe.num_experts, dtype=experts.dtype, device=x.device)
        wanted.scatter_add_(0, experts, ones)
        given = torch.empty_like(wanted)  # [R * L]
        dist.all_to_all_single(given, wanted, group=self.group)
        tables = torch.stack([wanted, given]).view(2, self.ranks, local)
        sent, received = tables.sum(2).tolist()  # the one wait for the device
        rows = x.index_select(0, order // moe.num_topk)
        rows = Swap.apply(rows, sent, received, self.group)  # by source rank, then by expert
        numbers = torch.arange(local, device=x.device).repeat(self.ranks)
        by_expert = numbers.repeat_interleave(given, output_size=sum(received)).argsort(stable=True)
        ends = tables[1].sum(0).cumsum(0).int()
        rows = self._experts(rows.index_select(0, by_expert), ends)
        rows = rows.index_select(0, _inverse(by_expert))
        rows = Swap.apply(rows, received, sent, self.group)
        rows = rows.index_select(0, _inverse(order)).view(*routing.topk_idx.shape, -1)  # [T, K, H]
        weights = routing.topk_weights.to(rows.dtype).unsqueeze(1)  # [T, 1, K]
        return torch.bmm(weights, rows).squeeze(1)

    def _experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        experts = self.moe.experts
        gate, up = self.product(rows, experts.gate_up, ends).chunk(2, dim=1)
        return self.product(nn.functional.silu(gate) * up, experts.down, ends)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


class Products:
    """The matrix products of the layer on this rank, with the rows per expert that it receives.

    counts: [L] int64 on the CPU.
    """

    def __init__(self, moe: ExpertParallelMoE, counts: Tensor) -> None:
        self.gate_up, self.down = moe.experts.gate_up.detach(), moe.experts.down.detach()
        device, dtype = self.down.device, self.down.dtype
        width, hidden = self.down.shape[1:]
        rows = int(counts.sum())
        self.product = grouped_product(device)
        self.ends = counts.cumsum(0).int().to(device)
        self.x, self.grad = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))  # [P, H]
        self.a = torch.randn(rows, width, device=device).to(dtype)  # [P, F]
        self.grad_h = torch.randn(rows, 2 * width, device=device).to(dtype)  # [P, 2F]

    def forward(self) -> None:
        """Two products."""
        self.product(self.x, self.gate_up, self.ends)
        self.product(self.a, self.down, self.ends)

    def forward_backward(self) -> None:
        """Six: those, and one for the rows' and one for the weights' gradient of each."""
        self.forward()
        self.product(self.grad, self.down.transpose(1, 2), self.ends)
        self.product(self.a.t(), self.grad, self.ends)
        self.product(self.grad_h, self.gate_up.transpose(1, 2), self.ends)
        self.product(self.x.t(), self.grad_h, self.ends)
