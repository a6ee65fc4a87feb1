"""Functions of the kernels around the local experts, in plain torch, operation by operation: the same bits.

Shapes: N received rows, K top-k entries, P pairs, L local experts, H channels of a row, F expert hidden.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def sorted_pairs(topk_idx: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """pairs [P], slots [N, K], ends [L]: by expert, then row, then k."""
    entries = topk_idx.flatten().tolist()
    order = sorted((e, i) for i, e in enumerate(entries) if e >= 0)
    slots = torch.full((len(entries),), -1, dtype=torch.int64)
    for slot, (_, i) in enumerate(order):
        slots[i] = slot
    ends = [sum(e <= expert for e, _ in order) for expert in range(num_local_experts)]
    pairs = torch.tensor([i for _, i in order], dtype=torch.int64)
    return pairs, slots.view(topk_idx.shape), torch.tensor(ends, dtype=torch.int32)


def reduced(y: Tensor, weights: Tensor | None, slots: Tensor) -> Tensor:
    """y [P, H] bf16 -> [N, H]: the sum of weight * row, both rounded, in float32, k ascending."""
    total = torch.zeros(slots.shape[0], y.shape[1])
    for n, k in itertools.product(*map(range, slots.shape)):
        if slots[n, k] >= 0:
            row = y[slots[n, k]]
            total[n] += (row if weights is None else row * weights[n, k].bfloat16()).float()
    return total.bfloat16()


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) in float32, as csrc/kernels/rows/silu.hpp has it."""

    def constant(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=x.device)

    a, shift = x.abs(), constant(12582912.0)
    shifted = a * constant(-1.44269504) + shift
    n = shifted - shift
    r = (-a + n * constant(-0.693359375)) + n * constant(2.12194440e-4)
    total = torch.full_like(r, 1.0) * (constant(1.0) / constant(720.0))
    for term in (120.0, 24.0, 6.0, 2.0, 1.0, 1.0):
        total = total * r + constant(1.0) / constant(term)
    t = (total.view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)
    t = torch.where(a <= 86.0, t, 0.0)
    return torch.where(x < 0, t, 1.0) / (1.0 + t)


def gated(h: Tensor) -> Tensor:
    """h [.., 2F] bf16 -> silu(gate) * up [.., F] bf16."""
    gate, up = h.float().chunk(2, -1)
    return (gate * logistic(gate) * up).bfloat16()


def gate_gradients(h: Tensor, grad: Tensor) -> Tensor:
    """The gradient of h [.., 2F] bf16, of that of the output [.., F]."""
    gate, up = h.float().chunk(2, -1)
    wide, s = grad.float(), logistic(gate)
    slope = s * (1.0 + gate * (1.0 - s))
    return torch.cat([wide * up * slope, wide * (gate * s)], -1).bfloat16()
