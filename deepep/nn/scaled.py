"""Rows that travel in FP8, and the gradient that goes straight through the cast.

A sender casts its rows (a scale per 128 channels, deepep.formats.fp8_cast), the receiver restores them where
it spreads them to its experts. Their gradient is that of rows that were not cast, in the rows' own dtype, and
travels so. FP8 tensors have none in torch: `stand_in` has it for them, a tensor of the rows' shape and dtype
without memory, whose values mean nothing.

Shapes: R ranks, T tokens here, H hidden, K top-k, N rows received, P pairs (deepep.nn.rows), L local experts.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep.errors import ArgumentTypeError, RangeError
from deepep.formats import GROUP, fp8_cast, fp8_uncast
from deepep.nn import kernels
from deepep.nn.buffers import engine_of
from deepep.nn.exchange import (
    RouteTensors,
    anchor_for,
    fake_fields,
    grad_of_dispatch,
    in_memory,
    report_exchange,
    row_bytes_of,
    save_dispatch,
    send_rows,
)
from deepep.nn.operators import operator
from deepep.nn.rows import reduce_rows, span_of
from deepep.runtime.checks import dtype_names

#: Dtypes of rows that are cast.
CAST_DTYPES = (torch.bfloat16, torch.float32)


class ScaledReceived(NamedTuple):
    """Rows that `dispatch_scaled` gives a rank, in (source rank, source token) order, each once.

    stand_in: [N, H], of the dtype of the rows that were sent. values: [N, H] float8_e4m3fn. scales:
    [N, H / 128] float32. The others as in `Received`.
    """

    stand_in: Tensor
    values: Tensor
    scales: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    route: RouteTensors
    expert_counts: Tensor


def check_casts(hidden: int, dtype: torch.dtype) -> None:
    """Raises RangeError or ArgumentTypeError for rows that cannot travel in FP8."""
    if hidden % GROUP:
        raise RangeError("hidden", str(hidden), f"a multiple of {GROUP} with fp8_dispatch")
    if dtype not in CAST_DTYPES:
        allowed = f"{dtype_names(CAST_DTYPES)}, with fp8_dispatch"
        raise ArgumentTypeError("dtype", dtype_names([dtype]), allowed)


def dispatch_scaled(
    number: int, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
) -> ScaledReceived:
    """As `deepep.nn.dispatch`, of rows [T, H] that are cast on the way. Takes what the layer checked."""
    if topk_weights.dtype != torch.float32:
        topk_weights = topk_weights.float()
    anchor = anchor_for(x, topk_weights)
    *rows, recv_idx, recv_weights, in_rank, counts, expert_counts, table = _dispatch_scaled(
        x, topk_idx, topk_weights, num_experts, number, anchor
    )
    route = RouteTensors(in_rank, counts, num_experts, number, table)
    stand_in, values, scales = rows
    return ScaledReceived(stand_in, values, scales, recv_idx, recv_weights, route, expert_counts)


@operator("cast_rows")
def cast_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, H] -> values [T, H] float8_e4m3fn, scales [T, H / 128] float32: those of `fp8_cast`."""
    if not (x.dtype == torch.bfloat16 and kernels.serve(x) and x.shape[1] % GROUP == 0):
        values, scales = fp8_cast(x)
        return values, scales
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(x.shape[0], x.shape[1] // GROUP, dtype=torch.float32)
    if x.numel():
        kernels.launch("cast_rows", x, num_channels=x.numel(), x=x, values=values, scales=scales)
    return values, scales


@cast_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.new_empty(x.shape[0], x.shape[1] // GROUP, dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scales


@operator("expand_scaled_rows")
def expand_scaled_rows(
    stand_in: Tensor, values: Tensor, scales: Tensor, pairs: Tensor, slots: Tensor
) -> Tensor:
    """values [N, H], scales [N, H / 128] -> [P, H]: `expand_rows` of value * scale, rounded once.

    The dtype is that of stand_in [N, H], and so is the gradient, which goes there.
    """
    num_topk, hidden = slots.shape[1], values.shape[1]
    if not (
        stand_in.dtype == torch.bfloat16
        and kernels.serve_rows(num_topk, values)
        and kernels.serve(values, scales)
        and slots.is_contiguous()
        and hidden % GROUP == 0
    ):
        rows = fp8_uncast(values, scales).to(stand_in.dtype)
        return rows.index_select(0, pairs // num_topk)
    out = stand_in.new_empty(pairs.shape[0], hidden)
    if len(out):
        kernels.launch("spread_rows", values, **span_of(slots, out), x=values, scales=scales, out=out)
    return out


@expand_scaled_rows.register_fake
def _(stand_in: Tensor, values: Tensor, scales: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
    return stand_in.new_empty(pairs.shape[0], values.shape[1])


def _save_expanded(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[3], inputs[4])


expand_scaled_rows.register_autograd(
    lambda ctx, grad: (reduce_rows(grad.contiguous(), *ctx.saved_tensors), None, None, None, None),
    setup_context=_save_expanded,
)


@operator("dispatch_scaled")
def _dispatch_scaled(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    buffer: int,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    engine, started = engine_of(buffer), time.perf_counter()
    values, scales = cast_rows.function(in_memory(x))
    received, tables = send_rows(engine, values, scales, topk_idx, topk_weights, num_experts)
    assert received.scales is not None
    assert received.topk_idx is not None
    assert received.topk_weights is not None
    row_bytes = row_bytes_of(values, scales, topk_idx, topk_weights)
    report_exchange(engine, "dispatch", tables[1].t(), row_bytes, started)
    rows = stand_in_for(x, len(received.x)), received.x, received.scales
    return *rows, received.topk_idx, received.topk_weights, *tables


@_dispatch_scaled.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    buffer: int,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, hidden = torch.library.get_ctx().new_dynamic_size(), x.shape[1]
    return (
        stand_in_for(x, num_rows),
        x.new_empty(num_rows, hidden, dtype=torch.float8_e4m3fn),
        x.new_empty(num_rows, hidden // GROUP, dtype=torch.float32),
        *fake_fields(num_rows, x, topk_idx, topk_weights, num_experts, buffer),
    )


def stand_in_for(x: Tensor, num_rows: Any) -> Tensor:
    """[N, H] of one element's memory."""
    return x.new_empty_strided((num_rows, x.shape[1]), (0, 0))


def _grad_of_dispatch(
    ctx: Any, grad: Tensor, _values: None, _scales: None, *others: Any
) -> tuple[Tensor, None, Tensor, None, None, None]:
    return grad_of_dispatch(ctx, grad, *others)


_dispatch_scaled.register_autograd(_grad_of_dispatch, setup_context=save_dispatch)
