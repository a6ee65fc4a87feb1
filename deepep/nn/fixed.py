"""A layer in fixed shapes: no host waits for counts, and CUDA graphs can hold its forward and its backward.

A dispatch hands out as many rows as may come at most, R * M, and those that do not come have no experts. How
many rows an expert has is known on the device alone: where pairs of rows and experts end there goes into
torch's grouped product. The route stays the backend's own object, which these operations hand each other:
they are no operators, and torch.compile does not see through them.

Shapes: R ranks, M the most tokens of any rank, T tokens here, K top-k, L local experts, H hidden, P pairs:
R * M * K on CUDA, of which the first ends[-1] are any row's; elsewhere those alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep.errors import ArgumentTypeError, RangeError
from deepep.nn.activation import gated
from deepep.nn.buffers import engine_of
from deepep.nn.exchange import anchor_for, in_memory, refuse_second_derivative
from deepep.nn.experts import GroupedSwiGLU
from deepep.nn.grouped import grouped_mm_to_ends
from deepep.nn.precision import operands
from deepep.nn.rows import expand_rows, sort_pairs_to_ends, weighted_sum
from deepep.nn.scaled import cast_rows, expand_scaled_rows, stand_in_for
from deepep.runtime.checks import dtype_names
from deepep.runtime.requests import CombineRequest, DispatchRequest, Operation, Route, Schedule

#: Columns of rows and weights that torch's grouped product takes are multiples of so many bfloat16.
COLUMNS = 8


@dataclass
class FixedTrip:
    """A dispatch in fixed shapes, and the way back. number: of the buffer. num_experts: as dispatch numbers
    them. num_max_tokens: M. in_fp8: rows are cast on their way to the experts. route: once they are there.
    """

    number: int
    num_experts: int
    num_max_tokens: int
    in_fp8: bool = False
    route: Route | None = None

    def combine(self, x: Tensor, topk_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows [R * M, H] and weights [R * M, K] to their tokens, summed: [T, H], [T, K]. Collective."""
        assert self.route is not None
        request = CombineRequest(in_memory(x), self.route, topk_weights=topk_weights)
        done = engine_of(self.number).combine(request, Schedule())
        return done.x, done.topk_weights


def check_fixed(experts: object, made_for: torch.device, dtype: torch.dtype) -> None:
    """Raises ArgumentTypeError or RangeError for experts whose products need the counts on the host."""
    if not isinstance(experts, GroupedSwiGLU) or type(experts).forward is not GroupedSwiGLU.forward:
        raise ArgumentTypeError("experts", type(experts).__name__, "GroupedSwiGLU, with num_max_tokens")
    if made_for.type != "cuda":
        return
    if dtype != torch.bfloat16:
        allowed = "bfloat16, with num_max_tokens on CUDA"
        raise ArgumentTypeError("dtype", dtype_names([dtype]), allowed)
    _, expert_hidden, hidden = experts.down.shape
    for name, columns in (("hidden", hidden), ("expert_hidden", expert_hidden)):
        if columns % COLUMNS:
            allowed = f"a multiple of {COLUMNS}, with num_max_tokens on CUDA"
            raise RangeError(name, str(columns), allowed)


def send_fixed(trip: FixedTrip, rows: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, ...]:
    """Dispatches rows [T, H]: stand_in or rows [R * M, H], values, scales, topk_idx, topk_weights
    [R * M, K], as apply_received takes them. Collective; so is its backward.

    topk_idx: [T, K] int32 or int64, -1 for no expert. topk_weights: [T, K]. Where grad mode is on, rows and
    weights require gradients whatever the inputs do.
    """
    topk_weights = topk_weights.float()
    anchor = anchor_for(rows, topk_weights)
    sent: tuple[Tensor, ...] = _Dispatch.apply(rows, topk_weights, anchor, topk_idx, trip)
    return sent


def give_back(trip: FixedTrip, rows: Tensor) -> Tensor:
    """Returns rows [R * M, H] to their tokens and sums them: [T, H]. Collective; so is its backward."""
    summed: Tensor = _Combine.apply(rows, anchor_for(rows), trip)
    return summed


def apply_received(
    experts: GroupedSwiGLU,
    rows: Tensor,
    values: Tensor,
    scales: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
) -> Tensor:
    """The local experts' weighted sum for each received row: [R * M, H].

    rows: what came, or, if values [R * M, H] and scales [R * M, H / 128] are not empty, their stand-in
    (deepep.nn.scaled).
    """
    pairs, slots, ends = sort_pairs_to_ends(topk_idx, experts.num_local_experts)
    if values.numel():
        rows = expand_scaled_rows(rows, values, scales, pairs, slots)
    else:
        rows = expand_rows(rows, pairs, slots)
    rows, gate_up, down = operands(rows, experts.gate_up, experts.down)
    hidden = gated(grouped_mm_to_ends(rows, gate_up, ends))
    return weighted_sum(grouped_mm_to_ends(hidden, down, ends), topk_weights, pairs, slots)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, topk_weights: Tensor, anchor: Tensor | None, topk_idx: Tensor, trip: FixedTrip
    ) -> tuple[Tensor, ...]:
        engine, scales = engine_of(trip.number), None
        x = in_memory(rows)
        if trip.in_fp8:
            x, scales = cast_rows.function(x)
        request = DispatchRequest(
            x,
            scales,
            topk_idx=in_memory(topk_idx),
            topk_weights=in_memory(topk_weights),
            num_experts=trip.num_experts,
            num_worst_tokens=engine.info.num_ranks * trip.num_max_tokens,
        )
        done = engine.dispatch(request, Schedule())
        assert done.topk_idx is not None
        assert done.topk_weights is not None
        trip.route = done.route
        ctx.trip = trip
        ctx.save_for_backward(done.topk_idx)
        received = done.x
        values = done_scales = rows.new_empty(0)
        if done.scales is not None:
            received, values, done_scales = stand_in_for(rows, len(done.x)), done.x, done.scales
        ctx.mark_non_differentiable(values, done_scales, done.topk_idx)
        return received, values, done_scales, done.topk_idx, done.topk_weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, *_, grad_weights = grads
        refuse_second_derivative(ctx.trip.number, Operation.COMBINE, grad, grad_weights)
        (topk_idx,) = ctx.saved_tensors
        # The weight of another rank's expert is a constant zero here, whatever the caller computed from it.
        weights = in_memory(torch.where(topk_idx >= 0, grad_weights, 0))
        return *ctx.trip.combine(grad, weights), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor | None, trip: FixedTrip) -> Tensor:
        ctx.trip, ctx.num_rows = trip, len(rows)
        return trip.combine(rows)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), trip = grads, ctx.trip
        refuse_second_derivative(trip.number, Operation.DISPATCH, grad)
        request = DispatchRequest(in_memory(grad), route=trip.route)
        rows = engine_of(trip.number).dispatch(request, Schedule()).x
        if len(rows) < ctx.num_rows:  # backends whose cached dispatch hands out the rows that came
            rows = torch.cat([rows, rows.new_zeros(ctx.num_rows - len(rows), rows.shape[1])])
        return rows, None, None
