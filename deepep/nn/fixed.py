"""Inference with a layer in fixed shapes: no host waits for counts, and CUDA graphs can hold a forward.

A dispatch hands out as many rows as may come at most, R * M, and those that do not come have no experts. How
many rows an expert has is known on the device alone: where pairs of rows and experts end there goes into
torch's grouped product. Results have the bits of the forward that waits.

Shapes: R ranks, M the most tokens of any rank, T tokens here, K top-k, L local experts, H hidden, P pairs:
R * M * K on CUDA, of which the first ends[-1] are any row's; elsewhere those alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.errors import ArgumentTypeError
from deepep.nn.activation import gated
from deepep.nn.buffers import engine_of, posting_errors
from deepep.nn.exchange import in_memory
from deepep.nn.experts import GroupedSwiGLU
from deepep.nn.grouped import grouped_mm_to_ends
from deepep.nn.precision import operands
from deepep.nn.rows import expand_rows, sort_pairs_to_ends, weighted_sum
from deepep.nn.scaled import cast_rows, expand_scaled_rows, stand_in_for
from deepep.runtime.checks import dtype_names
from deepep.runtime.requests import CombineRequest, Dispatched, DispatchRequest, Operation, Schedule


def check_fixed(experts: object, made_for: torch.device, dtype: torch.dtype) -> None:
    """Raises ArgumentTypeError for experts or parameters whose products need the counts on the host."""
    if not isinstance(experts, GroupedSwiGLU) or type(experts).forward is not GroupedSwiGLU.forward:
        raise ArgumentTypeError("experts", type(experts).__name__, "GroupedSwiGLU, with num_max_tokens")
    if made_for.type == "cuda" and dtype != torch.bfloat16:
        allowed = "bfloat16, with num_max_tokens on CUDA"
        raise ArgumentTypeError("dtype", dtype_names([dtype]), allowed)


def exchange_and_apply(
    number: int,
    experts: GroupedSwiGLU,
    rows: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    num_max_tokens: int,
    in_fp8: bool,
) -> Tensor:
    """Dispatch, experts and combine of rows [T, H]: [T, H]. Collective.

    number: of the buffer. topk_idx: [T, K] int32 or int64, -1 for no expert. topk_weights: [T, K].
    num_experts: as dispatch numbers them. num_max_tokens: M. in_fp8: rows are cast on the way.
    """
    engine = engine_of(number)
    with posting_errors(number, Operation.DISPATCH, "x"):
        x, scales = in_memory(rows), None
        if in_fp8:
            x, scales = cast_rows.function(x)
        request = DispatchRequest(
            x,
            scales,
            topk_idx=in_memory(topk_idx),
            topk_weights=in_memory(topk_weights.float()),
            num_experts=num_experts,
            num_worst_tokens=engine.info.num_ranks * num_max_tokens,
        )
    received = engine.dispatch(request, Schedule())
    with posting_errors(number, Operation.COMBINE, "experts"):
        sums = _apply(experts, received, rows)
    return engine.combine(CombineRequest(in_memory(sums), received.route), Schedule()).x


def _apply(experts: GroupedSwiGLU, received: Dispatched, sent: Tensor) -> Tensor:
    """The local experts' weighted sum for each received row, in the dtype of the rows that were sent."""
    assert received.topk_idx is not None
    assert received.topk_weights is not None
    pairs, slots, ends = sort_pairs_to_ends(received.topk_idx, experts.num_local_experts)
    if received.scales is None:
        rows = expand_rows(received.x, pairs, slots)
    else:
        like = stand_in_for(sent, len(received.x))
        rows = expand_scaled_rows(like, received.x, received.scales, pairs, slots)
    rows, gate_up, down = operands(rows, experts.gate_up, experts.down)
    hidden = gated(grouped_mm_to_ends(rows, gate_up, ends))
    return weighted_sum(grouped_mm_to_ends(hidden, down, ends), received.topk_weights, pairs, slots)
