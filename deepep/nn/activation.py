"""SwiGLU's activation, silu(gate) * up: one kernel forward and one backward on CUDA in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepep.nn import kernels
from deepep.nn.operators import operator


def gated(h: Tensor) -> Tensor:
    """h [.., 2F], the gate in the first F columns -> [.., F].

    In bfloat16 on CUDA computed in float32 and rounded once; elsewhere in the dtype of h.
    """
    if h.is_cuda and h.dtype == torch.bfloat16:
        return swiglu(h)
    return _gated(h)


def _gated(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


@operator("swiglu")
def swiglu(h: Tensor) -> Tensor:
    """h [.., 2F] -> [.., F]."""
    if not _served(h):
        return _gated(h.float()).to(h.dtype)
    out = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
    if out.numel():
        kernels.launch("swiglu", h, **_sizes(out), h=h, out=out)
    return out


@swiglu.register_fake
def _(h: Tensor) -> Tensor:
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


@operator("swiglu_backward")
def swiglu_backward(h: Tensor, grad: Tensor) -> Tensor:
    """The gradient of h [.., 2F], given that of the output [.., F]."""
    grad = grad.contiguous()
    if not (_served(h) and kernels.serve(grad)):
        return _differentiated(h, grad)
    out = torch.empty_like(h)
    if out.numel():
        kernels.launch("swiglu_backward", h, **_sizes(grad), h=h, grad=grad, out=out)
    return out


@swiglu_backward.register_fake
def _(h: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(h)


def _differentiated(h: Tensor, grad: Tensor) -> Tensor:
    """In float32, rounded once; of operators that can be differentiated again."""
    gate, up = h.float().chunk(2, dim=-1)
    wide, s = grad.float(), torch.sigmoid(gate)
    slope = s * (1 + gate * (1 - s))
    return torch.cat([wide * up * slope, wide * (gate * s)], dim=-1).to(h.dtype)


def _served(h: Tensor) -> bool:
    return h.dtype == torch.bfloat16 and kernels.serve(h) and h.shape[-1] % kernels.UNIT == 0


def _sizes(rows: Tensor) -> dict[str, int]:
    return {"num_rows": rows.numel() // rows.shape[-1], "width": rows.shape[-1]}


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (h,) = ctx.saved_tensors
    return _differentiated(h, grad) if torch.is_grad_enabled() else swiglu_backward(h, grad)


swiglu.register_autograd(_backward, setup_context=_save)
