"""Checks of what the CUDA kernels need of their inputs beyond what every backend does."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep._core import MAX_TOPK
from deepep.backends.cuda.launch import MAX_LOCAL_EXPERTS
from deepep.errors import ArgumentTypeError, DeviceError, LayoutError, RangeError
from deepep.runtime.requests import CombineRequest, DispatchRequest


def check_dispatch(request: DispatchRequest, device: torch.device, num_ranks: int) -> None:
    """Raises RangeError, DeviceError or LayoutError."""
    _check_rows("x", request.x, device)
    if request.route is not None:
        return
    name, experts = "num_experts", request.num_experts
    if request.layout is not None:
        name, experts = "num_tokens_per_expert", request.layout.num_tokens_per_expert.shape[0]
    local = experts // num_ranks
    if local > MAX_LOCAL_EXPERTS:
        allowed = f"at most {MAX_LOCAL_EXPERTS} experts per rank"
        raise RangeError(name, f"{local} experts per rank", allowed)


def check_combine(request: CombineRequest, device: torch.device) -> None:
    """Raises ArgumentTypeError, RangeError, DeviceError or LayoutError."""
    if request.x.dtype != torch.bfloat16:
        raise ArgumentTypeError("x", str(request.x.dtype), "torch.bfloat16")
    _check_rows("x", request.x, device)
    for bias in request.biases:
        _check_rows("bias", bias, device)
    if request.num_topk > MAX_TOPK:
        raise RangeError("topk_weights", f"K = {request.num_topk}", f"at most {MAX_TOPK}")


def _check_rows(name: str, rows: Tensor, device: torch.device) -> None:
    if rows.device != device:
        raise DeviceError(name, str(rows.device), str(device))
    if rows.data_ptr() % 16 != 0:
        raise LayoutError(name, "rows that do not start at a multiple of 16 bytes", "aligned rows")
