"""Combine of experts' rows whose weighted sums the combine makes itself, as one operator with a gradient.

Where the engine sums expanded rows (`Engine.sums_expanded`), experts' rows need no pass before their
way back. Bits are those of `rows.weighted_sum` and `exchange.combine` one after the other.

Shapes: R ranks, K top-k, T tokens here, N rows received, P pairs (rows of local experts), H hidden.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from deepep.nn.buffers import engine_of
from deepep.nn.exchange import (
    RouteTensors,
    anchor_for,
    combine_backward,
    in_memory,
    refuse_second_derivative,
    report_exchange,
    restored,
    row_bytes_of,
)
from deepep.nn.operators import operator
from deepep.nn.rows import grads_of_weighted_sum
from deepep.runtime.requests import CombineRequest, Operation, Schedule


def sums_in_combine(buffer: int, y: Tensor) -> bool:
    """True if the combine of this buffer is to sum rows y [P, H] itself."""
    return not torch.compiler.is_compiling() and engine_of(buffer).sums_expanded(y)


def combine_pairs(
    y: Tensor, topk_weights: Tensor, pairs: Tensor, slots: Tensor, route: RouteTensors
) -> Tensor:
    """y [P, H] bf16 -> [T, H]: the weighted sums of each received row's pairs, combined.

    topk_weights [N, K], pairs [P], slots [N, K]: as of `rows.weighted_sum`. Differentiable, once, in y and
    topk_weights. Raises as `Buffer.combine` does.
    """
    weights = topk_weights.float()
    return _combine_pairs(
        *(y, weights, pairs, slots, route.is_token_in_rank, route.counts),
        *(route.num_experts, route.buffer, anchor_for(y, weights), route.table),
    )


@operator("combine_pairs")
def _combine_pairs(
    y: Tensor,
    weights: Tensor,
    pairs: Tensor,
    slots: Tensor,
    in_rank: Tensor,
    counts: Tensor,
    num_experts: int,
    buffer: int,
    anchor: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    engine, started = engine_of(buffer), time.perf_counter()
    route = restored(buffer, Operation.COMBINE, in_rank, counts, num_experts, table)
    request = CombineRequest(y, route, slots=slots.contiguous(), factors=in_memory(weights))
    combined = engine.combine(request, Schedule())
    report_exchange(engine, "combine", counts, row_bytes_of(y), started)
    return combined.x


@_combine_pairs.register_fake
def _(
    y: Tensor,
    weights: Tensor,
    pairs: Tensor,
    slots: Tensor,
    in_rank: Tensor,
    counts: Tensor,
    num_experts: int,
    buffer: int,
    anchor: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    return y.new_empty(in_rank.shape[0], y.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weights, pairs, slots, in_rank, counts, ctx.num_experts, ctx.buffer, _, table = inputs
    ctx.save_for_backward(y, weights, pairs, slots, in_rank, counts, table)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(ctx.buffer, Operation.DISPATCH, grad)
    y, weights, pairs, slots, in_rank, counts, table = ctx.saved_tensors
    rows = combine_backward(grad, in_rank, counts, len(slots), ctx.num_experts, ctx.buffer, table)
    by_y, by_weights = grads_of_weighted_sum(rows, y, weights, pairs, slots)
    return by_y, by_weights, *[None] * 8


_combine_pairs.register_autograd(_grad, setup_context=_save)
