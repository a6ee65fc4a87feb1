"""What the CUDA kernels ask of their inputs beyond what every backend does; and a glance, which spares the
usual calls all of it.

The checks that can say what is wrong take the better part of a call's host time. A glance knows the usual
call, and of anything else says only that it has to be looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.backends.cuda.launch import MAX_LOCAL_EXPERTS, MAX_TOPK
from deepep.errors import ArgumentTypeError, DeviceError, LayoutError, RangeError
from deepep.runtime import checks
from deepep.runtime.engine import Engine
from deepep.runtime.requests import CombineRequest, DispatchRequest, Layout

_ROW_DTYPES = frozenset(checks.ROW_DTYPES)
_BYTE_DTYPES = frozenset(checks.BYTE_DTYPES)
_BF16 = frozenset((torch.bfloat16,))


def check_dispatch(request: DispatchRequest, device: torch.device, num_ranks: int) -> None:
    """Raises RangeError, DeviceError or LayoutError."""
    _check_rows("x", request.x, device)
    if request.layout is not None:
        local = request.layout.num_tokens_per_expert.shape[0] // num_ranks
        if local > MAX_LOCAL_EXPERTS:
            allowed = f"at most {MAX_LOCAL_EXPERTS} experts per rank"
            raise RangeError("num_tokens_per_expert", f"{local} experts per rank", allowed)
    _check_topk("topk_idx", request.topk_idx)


def check_combine(request: CombineRequest, device: torch.device) -> None:
    """Raises ArgumentTypeError, RangeError, DeviceError or LayoutError."""
    if request.x.dtype != torch.bfloat16:
        raise ArgumentTypeError("x", str(request.x.dtype), "torch.bfloat16")
    _check_rows("x", request.x, device)
    for bias in request.biases:
        _check_rows("bias", bias, device)
    _check_topk("topk_weights", request.topk_weights)


def _check_rows(name: str, rows: Tensor, device: torch.device) -> None:
    if rows.device != device:
        raise DeviceError(name, str(rows.device), str(device))
    if rows.data_ptr() % 16 != 0:
        raise LayoutError(name, "rows that do not start at a multiple of 16 bytes", "aligned rows")


def _check_topk(name: str, entries: Tensor | None) -> None:
    if entries is not None and entries.shape[1] > MAX_TOPK:
        raise RangeError(name, f"K = {entries.shape[1]}", f"at most {MAX_TOPK}")


class Glance:
    """Knows the usual calls of one engine when it sees them."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine = engine
        self._device = device
        self._laid_out: tuple[Tensor, Layout] | None = None

    def remember(self, topk_idx: Tensor, layout: Layout) -> None:
        """A layout of ours: a dispatch with these very tensors needs no look at them. Keeps them until the
        next layout: only of tensors that live is it certain which they are.
        """
        self._laid_out = topk_idx, layout

    def sees_nothing_wrong(self, request: DispatchRequest | CombineRequest) -> bool:
        """Whether all checks would pass, as far as that can be told at a glance; False says nothing."""
        if isinstance(request, CombineRequest):
            return self._knows_combine(request)
        return self._knows_routing(request) and self._knows_rows(request)

    def _knows_combine(self, request: CombineRequest) -> bool:
        x, route = request.x, request.route
        return (
            route.engine is self._engine
            and request.topk_weights is None
            and not request.biases
            and self._are_rows(x, _BF16)
            and x.shape[0] == route.num_rows
        )

    def _knows_routing(self, request: DispatchRequest) -> bool:
        route, layout, known = request.route, request.layout, self._laid_out
        if route is not None:
            return route.engine is self._engine and request.x.shape[0] == route.num_tokens
        if layout is None or known is None:
            return False
        topk_idx, made = known
        return (
            request.topk_idx is topk_idx
            and layout.is_token_in_rank is made.is_token_in_rank
            and layout.num_tokens_per_rank is made.num_tokens_per_rank
            and layout.num_tokens_per_expert is made.num_tokens_per_expert
            and made.num_tokens_per_expert.shape[0] <= MAX_LOCAL_EXPERTS
            and self._are_weights(request.topk_weights, topk_idx)
            and _is_from(1, request.expert_alignment)
            and _is_from(0, request.num_worst_tokens)
            and request.x.shape[0] == topk_idx.shape[0]
        )

    def _knows_rows(self, request: DispatchRequest) -> bool:
        x, scales = request.x, request.scales
        if scales is None:
            return self._are_rows(x, _ROW_DTYPES)
        return (
            self._are_rows(x, _BYTE_DTYPES)
            and type(scales) is Tensor
            and scales.dtype in checks.SCALE_DTYPES
            and scales.device == self._device
            and scales.dim() == 2
            and scales.shape[0] == x.shape[0]
        )

    def _are_rows(self, x: Tensor, dtypes: frozenset[torch.dtype]) -> bool:
        if type(x) is not Tensor or x.dtype not in dtypes or x.device != self._device or x.dim() != 2:
            return False
        row_bytes = x.shape[1] * x.element_size()
        return row_bytes > 0 and row_bytes % 16 == 0 and x.is_contiguous() and x.data_ptr() % 16 == 0

    def _are_weights(self, weights: Tensor | None, topk_idx: Tensor) -> bool:
        return (
            type(weights) is Tensor
            and weights.dtype is torch.float32
            and weights.device == self._device
            and weights.shape == topk_idx.shape
            and weights.shape[1] <= MAX_TOPK
            and weights.is_contiguous()
        )


def _is_from(least: int, value: object) -> bool:
    return type(value) is int and value >= least
