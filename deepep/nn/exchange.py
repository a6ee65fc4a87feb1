"""Dispatch and combine with gradients, as operators that torch.compile traces through without a break.

The backward of dispatch is combine (rows and top-k weights travel home and are summed), the backward of
combine is a cached dispatch (the gradient of every token goes to all ranks that returned a row for it).

Operators take and return tensors only, so a routing travels between them as two: `is_token_in_rank` [T, R]
bool and `counts` [R, R] int64 on the CPU, rows from each source to each destination, the same on all ranks.
Every backend can rebuild its own handle from these without communicating, so nothing has to be kept on the
side: an operator's state lives as long as its tensors, through checkpointing, saved-tensor hooks and
compiled graphs alike. Buffers are known to operators by number (`buffer_number`), weakly.

Collective: every rank must run the same operators in the same order, forward and backward, also with T = 0.
A rank whose loss does not depend on the layer's output skips the backward exchanges, and the others end in
PeerTimeoutError.

Shapes: R ranks, E experts, K top-k, T tokens here, H hidden, N rows received.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep.nn.buffers import BufferLike, buffer_number, engine_of
from deepep.nn.observe import Exchange, ExchangeName, observed, tell
from deepep.nn.operators import operator
from deepep.runtime.engine import Engine
from deepep.runtime.requests import CombineRequest, DispatchRequest, Schedule


class Received(NamedTuple):
    """What `dispatch` gives a rank: rows in (source rank, source token) order, each once.

    x: [N, H]. topk_idx: [N, K], local expert index, -1 for other ranks' experts. topk_weights: [N, K], 0
    where the index is -1. route: for `combine`.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    route: RouteTensors


class RouteTensors(NamedTuple):
    """Which token went to which rank: is_token_in_rank [T, R] bool; counts [R, R] int64 (source,
    destination), CPU.
    """

    is_token_in_rank: Tensor
    counts: Tensor
    num_experts: int
    buffer: int


def dispatch(
    buffer: BufferLike | int, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
) -> Received:
    """Sends every token, once, to each rank that owns one of its experts.

    buffer: a deepep.Buffer, or its `buffer_number`. x: [T, H]. topk_idx: [T, K] int32 or int64, -1 for no
    expert. topk_weights: [T, K], travel as float32. Differentiable in x and topk_weights. Raises as
    `Buffer.dispatch` does.
    """
    number = buffer if isinstance(buffer, int) else buffer_number(buffer)
    if topk_weights.dtype != torch.float32:
        topk_weights = topk_weights.float()
    recv_x, recv_idx, recv_weights, in_rank, counts = _dispatch(
        x, topk_idx, topk_weights, num_experts, number
    )
    return Received(recv_x, recv_idx, recv_weights, RouteTensors(in_rank, counts, num_experts, number))


def combine(y: Tensor, route: RouteTensors) -> Tensor:
    """Returns y's rows [N, H] to their tokens and sums them, ranks ascending: [T, H]. No weights are
    applied.
    """
    return _combine(y, route.is_token_in_rank, route.counts, route.num_experts, route.buffer)


@operator("dispatch")
def _dispatch(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, buffer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    engine = engine_of(buffer)
    started = time.perf_counter()
    topk_idx = topk_idx.contiguous()
    layout, _ = engine.layout(topk_idx, num_experts, Schedule())
    request = DispatchRequest(
        x.contiguous(), layout=layout, topk_idx=topk_idx, topk_weights=topk_weights.contiguous()
    )
    received = engine.dispatch(request, Schedule())
    assert received.topk_idx is not None
    assert received.topk_weights is not None
    counts = engine.route_counts(received.route)
    row_bytes = _row_bytes(x, topk_idx, topk_weights)
    _tell(engine, "dispatch", counts.t(), row_bytes, started)
    return received.x, received.topk_idx, received.topk_weights, layout.is_token_in_rank, counts


@_dispatch.register_fake
def _(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, buffer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    num_ranks = engine_of(buffer).info.num_ranks
    return (
        x.new_empty(num_rows, x.shape[1]),
        topk_idx.new_empty(num_rows, topk_idx.shape[1]),
        topk_weights.new_empty(num_rows, topk_weights.shape[1]),
        x.new_empty(x.shape[0], num_ranks, dtype=torch.bool),
        torch.empty(num_ranks, num_ranks, dtype=torch.int64),
    )


@operator("dispatch_backward")
def _dispatch_backward(
    grad_x: Tensor, grad_weights: Tensor, in_rank: Tensor, counts: Tensor, num_experts: int, buffer: int
) -> tuple[Tensor, Tensor]:
    """grad_x [N, H], grad_weights [N, K] -> [T, H], [T, K]: a combine with weights."""
    engine, started = engine_of(buffer), time.perf_counter()
    route = engine.restore_route(in_rank, counts, num_experts)
    request = CombineRequest(grad_x.contiguous(), route, topk_weights=grad_weights.contiguous())
    combined = engine.combine(request, Schedule())
    assert combined.topk_weights is not None
    _tell(engine, "dispatch_backward", counts, _row_bytes(grad_x, grad_weights), started)
    return combined.x, combined.topk_weights


@_dispatch_backward.register_fake
def _(
    grad_x: Tensor, grad_weights: Tensor, in_rank: Tensor, counts: Tensor, num_experts: int, buffer: int
) -> tuple[Tensor, Tensor]:
    num_tokens = in_rank.shape[0]
    return (
        grad_x.new_empty(num_tokens, grad_x.shape[1]),
        grad_weights.new_empty(num_tokens, grad_weights.shape[1]),
    )


@operator("combine")
def _combine(y: Tensor, in_rank: Tensor, counts: Tensor, num_experts: int, buffer: int) -> Tensor:
    engine, started = engine_of(buffer), time.perf_counter()
    route = engine.restore_route(in_rank, counts, num_experts)
    combined = engine.combine(CombineRequest(y.contiguous(), route), Schedule())
    _tell(engine, "combine", counts, _row_bytes(y), started)
    return combined.x


@_combine.register_fake
def _(y: Tensor, in_rank: Tensor, counts: Tensor, num_experts: int, buffer: int) -> Tensor:
    return y.new_empty(in_rank.shape[0], y.shape[1])


@operator("combine_backward")
def _combine_backward(
    grad: Tensor, in_rank: Tensor, counts: Tensor, num_rows: int, num_experts: int, buffer: int
) -> Tensor:
    """grad [T, H] -> [N, H]: a cached dispatch. `num_rows` is N, known to the caller from the forward's
    rows.
    """
    engine, started = engine_of(buffer), time.perf_counter()
    route = engine.restore_route(in_rank, counts, num_experts)
    received = engine.dispatch(DispatchRequest(grad.contiguous(), route=route), Schedule())
    _tell(engine, "combine_backward", counts.t(), _row_bytes(grad), started)
    return received.x


@_combine_backward.register_fake
def _(grad: Tensor, in_rank: Tensor, counts: Tensor, num_rows: int, num_experts: int, buffer: int) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[1])


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, recv_idx, _, in_rank, counts = output
    ctx.save_for_backward(recv_idx, in_rank, counts)
    ctx.num_experts, ctx.buffer = inputs[3], inputs[4]
    ctx.mark_non_differentiable(recv_idx, in_rank, counts)


def _grad_of_dispatch(
    ctx: Any, grad_x: Tensor, _idx: None, grad_weights: Tensor, *_: None
) -> tuple[Tensor, None, Tensor, None, None]:
    recv_idx, in_rank, counts = ctx.saved_tensors
    # The weight of another rank's expert is a constant zero here, whatever the caller computed from it.
    grad_weights = torch.where(recv_idx >= 0, grad_weights, 0)
    grad_x, grad_weights = _dispatch_backward(
        grad_x, grad_weights, in_rank, counts, ctx.num_experts, ctx.buffer
    )
    return grad_x, None, grad_weights, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, in_rank, counts, ctx.num_experts, ctx.buffer = inputs
    ctx.num_rows = y.shape[0]
    ctx.save_for_backward(in_rank, counts)


def _grad_of_combine(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    in_rank, counts = ctx.saved_tensors
    grad_y = _combine_backward(grad, in_rank, counts, ctx.num_rows, ctx.num_experts, ctx.buffer)
    return grad_y, None, None, None, None


_dispatch.register_autograd(_grad_of_dispatch, setup_context=_save_dispatch)
_combine.register_autograd(_grad_of_combine, setup_context=_save_combine)


def _row_bytes(*fields: Tensor) -> int:
    return sum(field.shape[1] * field.element_size() for field in fields)


def _tell(engine: Engine, name: ExchangeName, arriving: Tensor, row_bytes: int, started: float) -> None:
    """`arriving` [R, R]: rows this exchange brings to each rank (rows of the table) from each rank
    (columns).
    """
    if not observed():
        return
    seconds = time.perf_counter() - started
    rank = engine.info.rank
    sent, received = arriving[:, rank].tolist(), arriving[rank].tolist()
    tell(Exchange(name, tuple(sent), tuple(received), row_bytes, seconds))
