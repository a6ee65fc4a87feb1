"""Calls of a Buffer with a rank's arguments in one piece: for tests of memory, streams and graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep.reference import high_throughput as oracle
from deepep.reference.layout import dispatch_layout


@dataclass(frozen=True)
class Given:
    """One rank's arguments of a dispatch: x [T, H] bf16, idx [T, K] int64, weights [T, K] float32."""

    x: Tensor
    idx: Tensor
    weights: Tensor
    num_experts: int


def draw(
    seed: int, rank: int, num_tokens: int, *, hidden: int = 7168, num_experts: int = 256, topk: int = 8
) -> Given:
    """Arguments on the CPU, the same on whoever draws them."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    idx = torch.rand((num_tokens, num_experts), generator=generator).topk(topk, dim=1).indices
    x = torch.randn((num_tokens, hidden), generator=generator).to(torch.bfloat16)
    return Given(x, idx, torch.rand((num_tokens, topk), generator=generator), num_experts)


def on_device(given: Given, device: torch.device) -> Given:
    """The same on a device."""
    return Given(given.x.to(device), given.idx.to(device), given.weights.to(device), given.num_experts)


def draw_on_device(
    seed: int,
    rank: int,
    num_tokens: int,
    device: torch.device,
    *,
    hidden: int = 7168,
    num_experts: int = 256,
    topk: int = 8,
) -> Given:
    """As `draw`, by the device's own generator: fast, and the same only on the same kind of device."""
    generator = torch.Generator(device).manual_seed(1000 * seed + rank)
    idx = torch.rand((num_tokens, num_experts), generator=generator, device=device).topk(topk, dim=1).indices
    x = torch.randn((num_tokens, hidden), generator=generator, device=device).to(torch.bfloat16)
    weights = torch.rand((num_tokens, topk), generator=generator, device=device)
    return Given(x, idx, weights, num_experts)


def laid_out(scales: Tensor, layout: str) -> Tensor:
    """The same [T, P] on the same device, with other strides: "column",
    "padded" or "every other"; for any other name as they are.
    """
    tokens, columns = scales.shape
    if layout == "column":
        return scales.t().contiguous().t()
    if layout == "padded":
        wide = scales.new_full((tokens, columns + 3), -1)
        wide[:, :columns] = scales
        return wide[:, :columns]
    if layout == "every other":
        wide = scales.new_full((tokens, 2 * columns), -1)
        wide[:, ::2] = scales
        return wide[:, ::2]
    return scales


def dispatch(buffer: Any, given: Given, layout: Sequence[Any] | None = None, **how: Any) -> Any:
    """A layout, if none is given, and a dispatch: what `Buffer.dispatch` returns."""
    made = layout if layout is not None else buffer.get_dispatch_layout(given.idx, given.num_experts)
    return buffer.dispatch(
        given.x,
        num_tokens_per_rank=made[0],
        num_tokens_per_rdma_rank=made[1],
        num_tokens_per_expert=made[2],
        is_token_in_rank=made[3],
        topk_idx=given.idx,
        topk_weights=given.weights,
        **how,
    )


def expected(givens: Sequence[Given]) -> list[tuple[Tensor, Tensor]]:
    """By rank: the rows received, and the sums when each rank returns its rows times two."""
    layouts = [dispatch_layout(given.idx, given.num_experts, len(givens)) for given in givens]
    received = oracle.dispatch(
        [
            oracle.DispatchInput(
                given.x,
                layout.is_token_in_rank,
                topk_idx=given.idx,
                topk_weights=given.weights,
                num_tokens_per_expert=layout.num_tokens_per_expert,
            )
            for given, layout in zip(givens, layouts, strict=True)
        ],
        givens[0].num_experts,
    )
    sums = oracle.combine(
        [out.recv_x * 2 for out in received], [layout.is_token_in_rank for layout in layouts]
    )
    return [(out.recv_x, total.x) for out, total in zip(received, sums, strict=True)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits, on whatever devices."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.device != b.device:
        a, b = a.cpu(), b.cpu()
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
