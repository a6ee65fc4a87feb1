"""Products of rows sorted by expert and each expert's matrix, and their gradients.

In bfloat16 on CUDA by torch's grouped product, in one launch; else expert by expert.

Shapes: P rows, L local experts, A and B columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepep.errors import ArgumentTypeError, ShapeError
from deepep.nn.operators import operator
from deepep.nn.rows import ends_of

#: Strides of what torch's grouped product takes are multiples of so many bytes.
_UNIT = 16


@cache
def _native() -> Callable[..., Tensor] | None:
    """torch's grouped product; None where it has none."""
    found = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    return found if callable(found) else None


@operator("grouped_mm")
def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """x [P, A], weight [L, A, B], counts [L] on the CPU -> [P, B]: each expert's rows times its matrix.

    counts add up to P. ends [L] int32, where each expert's rows end, on the device of x: made of counts, if
    not given. Raises ArgumentTypeError or ShapeError.
    """
    if x.dtype != weight.dtype:
        raise ArgumentTypeError("x", str(x.dtype), f"{weight.dtype}, the weights' dtype")
    if counts.shape != weight.shape[:1]:
        raise ShapeError("counts", str(list(counts.shape)), f"[{weight.shape[0]}]")
    sizes = _sizes(counts, len(x))
    native = _native()
    if native is not None and _is_native(x, weight):
        return native(x, weight, offs=ends_of(counts, x.device) if ends is None else ends)
    out = x.new_empty(x.shape[0], weight.shape[2])
    for expert, (rows, target) in enumerate(zip(x.split(sizes), out.split(sizes), strict=True)):
        torch.mm(rows, weight[expert], out=target)
    return out


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@operator("grouped_mm_weight_grad")
def grouped_mm_weight_grad(x: Tensor, grad: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """x [P, A], grad [P, B] -> [L, A, B]: the gradient of `grouped_mm` with respect to its weights."""
    sizes = _sizes(counts, len(x))
    native = _native()
    if native is not None and _is_native(x, grad):
        out = native(x.t(), grad, offs=ends_of(counts, x.device) if ends is None else ends)
        return out.contiguous()
    out = x.new_empty(counts.shape[0], x.shape[1], grad.shape[1])
    for expert, (rows, grads) in enumerate(zip(x.split(sizes), grad.split(sizes), strict=True)):
        torch.mm(rows.t(), grads, out=out[expert])
    return out


@grouped_mm_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], grad.shape[1])


def _is_native(*operands: Tensor) -> bool:
    """True if torch's grouped product takes these: rows and columns that begin at multiples of 16 bytes."""
    return all(
        t.is_cuda
        and t.dtype == torch.bfloat16
        and t.numel() > 0
        and 1 in t.stride()[-2:]
        and all(stride == 1 or stride * t.element_size() % _UNIT == 0 for stride in t.stride())
        and all(size * t.element_size() % _UNIT == 0 for size in t.shape[1:])
        and t.data_ptr() % _UNIT == 0
        for t in operands
    )


def _sizes(counts: Tensor, num_rows: int) -> list[int]:
    sizes: list[int] = counts.tolist()
    if sum(sizes) != num_rows or min(sizes, default=0) < 0:
        raise ShapeError("counts", str(sizes), f"counts from 0 of sum {num_rows}, the rows")
    return sizes


def _save_grouped_mm(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight, counts, ends = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grouped_mm(grad, weight.transpose(1, 2), counts, ends) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_mm_weight_grad(x, grad, counts, ends) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None, None


def _weight_grad_backward(ctx: Any, grad_weight: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, grad, counts, ends = ctx.saved_tensors
    by_x = grouped_mm(grad, grad_weight.transpose(1, 2), counts, ends) if ctx.needs_input_grad[0] else None
    by_grad = grouped_mm(x, grad_weight, counts, ends) if ctx.needs_input_grad[1] else None
    return by_x, by_grad, None, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_grouped_mm)
grouped_mm_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_grouped_mm)


def grouped_mm_to_ends(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` where the ends [L] int32 of each expert's rows are known on the device of x alone.

    Rows of x [P, A] behind the last end belong to nobody; those of the result, and of the gradient of x, have
    any value. Differentiable once. Waits for the device where torch's grouped product does not take the
    operands.
    """
    out: Tensor = _ToEnds.apply(x, weight, ends)
    return out


class _ToEnds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _multiply_to_ends(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad, native = grad.contiguous(), _native()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _multiply_to_ends(grad, weight.transpose(1, 2), ends)
        if ctx.needs_input_grad[1]:
            if native is not None and _is_native(x, grad):
                grad_weight = native(x.t(), grad, offs=ends).contiguous()
            else:
                counts, used = _counts_to(ends)
                grad_weight = grouped_mm_weight_grad.function(x[:used], grad[:used], counts)
        return grad_x, grad_weight, None


def _multiply_to_ends(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    native = _native()
    if native is not None and _is_native(x, weight):
        return native(x, weight, offs=ends)
    counts, used = _counts_to(ends)
    out = x.new_empty(x.shape[0], weight.shape[2])
    out[:used] = grouped_mm.function(x[:used], weight, counts)
    return out


def _counts_to(ends: Tensor) -> tuple[Tensor, int]:
    """Counts [L] int64 on the CPU, and their sum."""
    counts = ends.diff(prepend=ends.new_zeros(1)).to("cpu", torch.int64)
    return counts, int(counts.sum())
