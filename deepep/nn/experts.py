"""Grouped SwiGLU experts over the rows a rank received, as operators that torch.compile traces through.

A received row may be wanted by several local experts. `expert_rows` lists the (row, top-k entry) pairs
sorted by expert, `expand_rows` makes one row per pair, `grouped_mm` multiplies each expert's rows by that
expert's matrix, and `reduce_rows` sums the pairs of a row again. expand and reduce are each other's
backward, as dispatch and combine are one level up. Sums run over top-k entries ascending, so results do not
depend on the device or on atomics.

Shapes: N received rows, K top-k, P pairs (entries that are not -1), L local experts, H hidden, F expert
hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepep.nn.operators import operator


@operator("expert_rows")
def expert_rows(topk_idx: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the entries of `topk_idx` [N, K] (local expert or -1) by expert, then row, then k.

    Returns pairs [P] int64: row * K + k of each valid entry; counts [L] int64 on the CPU: pairs of each
    expert; slots [N, K] int64: where in `pairs` an entry stands, -1 for entries that are -1.
    """
    flat = topk_idx.flatten()
    order = torch.sort(flat, stable=True).indices  # the -1 entries first
    counts = torch.bincount(flat + 1, minlength=num_local_experts + 1).cpu()  # [1 + L]
    pairs = order[int(counts[0]) :].clone()
    slots = torch.full_like(flat, -1, dtype=torch.int64)
    slots[pairs] = torch.arange(len(pairs), device=flat.device)
    return pairs, counts[1:].clone(), slots.view(topk_idx.shape)


@expert_rows.register_fake
def _(topk_idx: Tensor, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        topk_idx.new_empty(num_pairs, dtype=torch.int64),
        torch.empty(num_local_experts, dtype=torch.int64),
        torch.empty_like(topk_idx, dtype=torch.int64),
    )


@operator("expand_rows")
def expand_rows(x: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    """x [N, H] -> [P, H]: row `pairs[p] // K` for every pair p."""
    return x.index_select(0, pairs // slots.shape[1])


@expand_rows.register_fake
def _(x: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(pairs.shape[0], x.shape[1])


@operator("reduce_rows")
def reduce_rows(y: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    """y [P, H] -> [N, H]: the sum of a row's pairs, k ascending, in float32 at least, rounded once to y's
    dtype.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    total = y.new_zeros(slots.shape[0], y.shape[1], dtype=wide)
    for k in range(slots.shape[1]):
        rows = (slots[:, k] >= 0).nonzero().squeeze(1)  # each row once: no two addends race for one sum
        total.index_add_(0, rows, y.index_select(0, slots[rows, k]).to(wide))
    return total.to(y.dtype)


@reduce_rows.register_fake
def _(y: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return y.new_empty(slots.shape[0], y.shape[1])


def _save_rows(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


expand_rows.register_autograd(
    lambda ctx, grad: (reduce_rows(grad, *ctx.saved_tensors), None, None), setup_context=_save_rows
)
reduce_rows.register_autograd(
    lambda ctx, grad: (expand_rows(grad, *ctx.saved_tensors), None, None), setup_context=_save_rows
)


@operator("grouped_mm")
def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [P, A], weight [L, A, B], counts [L] on the CPU, summing to P -> [P, B]: each expert's rows times
    its matrix.
    """
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, (rows, target) in enumerate(_split(counts, x, out)):
        torch.mm(rows, weight[expert], out=target)
    return out


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@operator("grouped_mm_weight_grad")
def grouped_mm_weight_grad(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    """x [P, A], grad [P, B] -> [L, A, B]: the gradient of `grouped_mm` with respect to its weights."""
    out = x.new_empty(counts.shape[0], x.shape[1], grad.shape[1])
    for expert, (rows, grads) in enumerate(_split(counts, x, grad)):
        torch.mm(rows.t(), grads, out=out[expert])
    return out


@grouped_mm_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], grad.shape[1])


def _split(counts: Tensor, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    sizes = counts.tolist()
    return zip(*(t.split(sizes) for t in tensors), strict=True)


def _save_grouped_mm(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grouped_mm(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_mm_weight_grad(x, grad, counts) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_grouped_mm)


class GroupedSwiGLU(nn.Module):
    """L experts y = (silu(x W_gate) * (x W_up)) W_down over rows sorted by expert.

    gate_up: [L, H, 2F], the gate in the first F columns. down: [L, F, H].
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden: int,
        expert_hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.gate_up = nn.Parameter(
            torch.empty(num_local_experts, hidden, 2 * expert_hidden, device=device, dtype=dtype)
        )
        self.down = nn.Parameter(
            torch.empty(num_local_experts, expert_hidden, hidden, device=device, dtype=dtype)
        )

    def reset_parameters(self, seed: int, first_expert: int) -> None:
        """Draws every expert from its own generator, so that a model is the same however many ranks share
        it.
        """
        for local in range(self.num_local_experts):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + first_expert + local)
            for weight in (self.gate_up[local], self.down[local]):
                _fan_in_normal(weight, generator)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [P, H] sorted by expert, counts [L] int64 on the CPU -> [P, H]."""
        gate, up = grouped_mm(x, self.gate_up, counts).chunk(2, dim=1)
        return grouped_mm(nn.functional.silu(gate) * up, self.down, counts)


class SwiGLU(nn.Module):
    """One dense SwiGLU on [.., H]: the shared expert every token visits, kept on every rank."""

    def __init__(
        self,
        hidden: int,
        expert_hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(hidden, 2 * expert_hidden, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(expert_hidden, hidden, device=device, dtype=dtype))

    def reset_parameters(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in (self.gate_up, self.down):
            _fan_in_normal(weight, generator)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (x @ self.gate_up).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up) @ self.down


@torch.no_grad()
def _fan_in_normal(weight: Tensor, generator: torch.Generator) -> None:
    """Normal with variance 1 / fan-in, drawn in float32 on the CPU: the same numbers on every device and
    dtype.
    """
    weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[0] ** 0.5)
