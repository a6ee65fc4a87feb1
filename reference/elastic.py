"""Dispatch and combine with one row per (token, local expert), seen from above: the oracle of ElasticBuffer.

Pure functions over lists indexed by rank. A rank's received rows may be *expanded*: a row for every top-k
entry ("lane") that names one of its experts, grouped by expert, each expert's rows starting at a multiple of
the alignment. Inside an expert rows stand by source rank, then source token, then lane, so an expert that a
token names twice has two rows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import high_throughput
from .checks import require
from .high_throughput import CombineOutput, DispatchInput, DispatchOutput
from .layout import align_up, dispatch_layout, expanded_rows, local_experts
from .numerics import accumulator_dtype, round_to, settle_nans


@dataclass(frozen=True)
class ElasticInput:
    """One rank's arguments."""

    x: Tensor  # [T, H], any dtype
    topk_idx: Tensor  # [T, K] int32 or int64, global expert or -1
    topk_weights: Tensor | None = None  # [T, K] float32
    scales: Tensor | None = None  # [T, P], any dtype, any strides


@dataclass(frozen=True)
class ElasticOutput:
    """One rank's results. N: rows received, one a token; X: those of the expanded layout, gaps included."""

    recv_x: Tensor  # [N, H], or [X, H] expanded
    recv_scales: Tensor | None  # [N, P] or [X, P]
    recv_topk_idx: Tensor | None  # [N, K] local expert or -1; None if expanded
    recv_topk_weights: Tensor | None  # [N, K], +0.0 at other ranks' lanes; [X] if expanded
    is_real: Tensor  # [N] or [X] bool: False in the gaps, which are zero
    rank_ends: list[int]  # [R]: inclusive sums of N by source rank
    expert_counts: list[int]  # [L], not aligned
    expert_ends: list[int]  # [L]: inclusive sums of aligned counts; expanded: ends of each expert's rows
    num_rows: int  # X, also if not expanded
    metadata: Tensor  # [N, K + 2] int32: source rank * M + token; source rank * K + the last lane that is
    # this rank's; the expanded row of each lane, or -1


def dispatch(
    inputs: Sequence[ElasticInput],
    num_experts: int,
    *,
    num_max_tokens: int,
    alignment: int = 1,
    expand: bool = False,
) -> list[ElasticOutput]:
    """Send every token to the ranks that own its experts; there one row per token, or per lane (`expand`).

    num_max_tokens: M, by which source tokens are numbered. Raises ValueError for malformed arguments.
    """
    num_local = local_experts(num_experts, len(inputs))
    for rank, given in enumerate(inputs):
        require(
            len(given.x) <= num_max_tokens,
            f"rank {rank}: x: got {len(given.x)} tokens; allowed: at most {num_max_tokens}",
        )
    plain = _plain(inputs, num_experts)
    outputs = []
    for received in plain:
        assert received.recv_topk_idx is not None
        assert received.recv_topk_weights is not None
        lanes = received.recv_topk_idx
        num_topk = lanes.shape[1]
        slots, ends = expanded_rows(lanes, num_local, alignment)
        counts = [int((lanes == expert).sum()) for expert in range(num_local)]
        num_rows = align_up(int(ends[-1]), alignment)
        source = received.src_rank.long()
        last_lane = torch.where(lanes >= 0, torch.arange(num_topk, device=lanes.device), -1).amax(1)
        metadata = torch.cat(
            [
                (source * num_max_tokens + received.src_token).unsqueeze(1),
                (source * num_topk + last_lane).unsqueeze(1),
                slots if expand else torch.full_like(slots, -1),
            ],
            dim=1,
        ).int()
        aligned = torch.tensor([align_up(count, alignment) for count in counts], device="cpu")
        output = ElasticOutput(
            recv_x=received.recv_x,
            recv_scales=received.recv_scales,
            recv_topk_idx=lanes,
            recv_topk_weights=received.recv_topk_weights,
            is_real=torch.ones(len(lanes), dtype=torch.bool, device=lanes.device),
            rank_ends=[int((source <= rank).sum()) for rank in range(len(inputs))],
            expert_counts=counts,
            expert_ends=ends.tolist() if expand else aligned.cumsum(0).tolist(),
            num_rows=num_rows,
            metadata=metadata,
        )
        if expand:
            output = _expanded(output, slots)
        if inputs[0].topk_weights is None:
            output = replace(output, recv_topk_weights=None)
        outputs.append(output)
    return outputs


def combine(
    xs: Sequence[Tensor],
    inputs: Sequence[ElasticInput],
    num_experts: int,
    *,
    alignment: int = 1,
    expanded: bool = False,
    single_reduction: bool = False,
    topk_weights: Sequence[Tensor] | None = None,
    biases: Sequence[Sequence[Tensor]] | None = None,
    ranks_per_domain: int | None = None,
) -> list[CombineOutput]:
    """Bring every row back to its token and sum, unweighted.

    `xs[r]`: [N, H], or [X, H] `expanded`; rows past them are ignored. Not expanded: bias_0 + bias_1 + rows by
    ascending rank, in float32, rounded once. Expanded: every rank sums a token's lanes, ascending, in float32
    from +0.0, and rounds; then the same. With `single_reduction` the owner sums all lanes, ascending, in
    float32: 0.0 + bias_0 + bias_1 + lanes, rounded once. `topk_weights[r]` [N, K], or [X]: each lane's own,
    returned to [T, K]; those of other ranks' lanes are ignored, and a lane of -1 has +0.0. float64 rows are
    summed in float64. ranks_per_domain: of ranks' rows, each domain's are summed and rounded first. Raises
    ValueError for malformed arguments.
    """
    plain = _plain(inputs, num_experts)
    tables = [_table(given, num_experts, len(inputs)) for given in inputs]
    num_local = local_experts(num_experts, len(inputs))
    lanes = [received.recv_topk_idx for received in plain]
    slots = [expanded_rows(idx, num_local, alignment).row for idx in lanes if idx is not None]
    weights = None
    if topk_weights is not None:
        weights = [
            _gather(given.unsqueeze(1), slot).squeeze(2)
            if expanded
            else given[: len(slot)].masked_fill(slot < 0, 0.0)
            for given, slot in zip(topk_weights, slots, strict=True)
        ]
    how: dict[str, Any] = {"topk_weights": weights, "biases": biases, "ranks_per_domain": ranks_per_domain}
    if not expanded:
        return high_throughput.combine(xs, tables, **how)
    if not single_reduction:
        partial = [_sum_of_lanes(x, slot, ()) for x, slot in zip(xs, slots, strict=True)]
        return high_throughput.combine(partial, tables, **how)

    outputs = []
    for owner, given in enumerate(inputs):
        num_tokens, num_topk = given.topk_idx.shape
        rows = xs[owner].new_zeros(num_tokens, num_topk, xs[owner].shape[1])  # each lane's row
        returned = torch.zeros(num_tokens, num_topk, device=given.topk_idx.device)
        present = torch.zeros(num_tokens, num_topk, dtype=torch.bool, device=given.topk_idx.device)
        for rank, received in enumerate(plain):
            mine = received.src_rank == owner
            token, slot = received.src_token[mine].long(), slots[rank][mine]
            row, lane = (slot >= 0).nonzero(as_tuple=True)
            rows[token[row], lane] = xs[rank][slot[row, lane]]
            present[token[row], lane] = True
            if weights is not None:
                returned[token] += weights[rank][mine]
        index = torch.where(
            present, torch.arange(present.numel(), device=present.device).view_as(present), -1
        )
        own = biases[owner] if biases is not None else ()
        total = _sum_of_lanes(rows.flatten(0, 1), index, own)
        outputs.append(CombineOutput(total, None if weights is None else settle_nans(returned)))
    return outputs


def _table(given: ElasticInput, num_experts: int, num_ranks: int) -> Tensor:
    return dispatch_layout(given.topk_idx, num_experts, num_ranks).is_token_in_rank


def _plain(inputs: Sequence[ElasticInput], num_experts: int) -> list[DispatchOutput]:
    """One row a token, and weights whether they were given or not."""
    return high_throughput.dispatch(
        [
            DispatchInput(
                given.x,
                _table(given, num_experts, len(inputs)),
                given.scales,
                given.topk_idx,
                torch.zeros(given.topk_idx.shape, device=given.x.device)
                if given.topk_weights is None
                else given.topk_weights,
            )
            for given in inputs
        ],
        num_experts,
    )


def _expanded(plain: ElasticOutput, slots: Tensor) -> ElasticOutput:
    """The same with a row a lane."""
    row, lane = (slots >= 0).nonzero(as_tuple=True)
    to = slots[row, lane]

    def spread(rows: Tensor) -> Tensor:
        out = rows.new_zeros(plain.num_rows, *rows.shape[1:])
        out.view(torch.uint8)[to] = rows.contiguous().view(torch.uint8)[row]  # 8-bit floats know no indexing
        return out

    assert plain.recv_topk_weights is not None
    weights = torch.zeros(plain.num_rows, device=slots.device)
    weights[to] = plain.recv_topk_weights[row, lane]
    is_real = torch.zeros(plain.num_rows, dtype=torch.bool, device=slots.device)
    is_real[to] = True
    return replace(
        plain,
        recv_x=spread(plain.recv_x),
        recv_scales=None if plain.recv_scales is None else spread(plain.recv_scales),
        recv_topk_idx=None,
        recv_topk_weights=weights,
        is_real=is_real,
    )


def _gather(rows: Tensor, slots: Tensor) -> Tensor:
    """rows [X, *] -> [N, K, *]: each lane's, zero where it has none."""
    out = rows.new_zeros(*slots.shape, rows.shape[1])
    row, lane = (slots >= 0).nonzero(as_tuple=True)
    out[row, lane] = rows[slots[row, lane]]
    return out


def _sum_of_lanes(rows: Tensor, slots: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """rows [X, H] -> [N, H]: 0.0 + biases + each row's lanes, ascending; rounded once."""
    total = torch.zeros(len(slots), rows.shape[1], dtype=accumulator_dtype(rows.dtype), device=rows.device)
    for bias in biases:
        total += bias.to(total.dtype)
    for lane in range(slots.shape[1]):
        there = slots[:, lane] >= 0
        total[there] += rows[slots[there, lane]].to(total.dtype)
    return round_to(total, rows.dtype)
