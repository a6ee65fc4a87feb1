"""A router's logits of bfloat16 rows and weights on CUDA: products on tensor cores, sums in float32.

A product of two bfloat16 numbers is exact in float32, so nothing is lost against casting both first; that
takes four times as long. In the backward the gradient, which is float32, is split into two bfloat16 parts:
their sum has 16 digits, twice as many as what is made of them.

Shapes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep.nn.operators import operator


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H], weight [E, H] -> [T, E] in float32, or float64 for float64 rows."""
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and _HAS_WIDE_PRODUCT:
        return wide_product(x, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ weight.to(wide).t()


#: torch.mm with a dtype of the output; torch 2.8 has it.
_HAS_WIDE_PRODUCT = hasattr(torch.ops.aten.mm, "dtype")


@operator("wide_product")
def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H], weight [E, H], bfloat16 on CUDA -> [T, E] float32."""
    return torch.ops.aten.mm.dtype(x, weight.t(), torch.float32)


@wide_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@operator("wide_product_backward")
def wide_product_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """grad [T, E] float32 -> the gradients of x [T, H] and of weight [E, H]."""
    high = grad.to(x.dtype)
    parts = torch.cat([high, (grad - high).to(x.dtype)], dim=1)  # [T, 2E]
    by_x = parts @ torch.cat([weight, weight])
    by_weight = torch.ops.aten.mm.dtype(parts.t(), x, torch.float32)  # [2E, H]
    return by_x, (by_weight[: len(weight)] + by_weight[len(weight) :]).to(weight.dtype)


@wide_product_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return wide_product_backward(grad, x, weight)
    return (grad @ weight.float()).to(x.dtype), (grad.t() @ x.float()).to(weight.dtype)


wide_product.register_autograd(_backward, setup_context=_save)
