"""Low-latency dispatch and combine, seen from above: all ranks' inputs to all ranks' outputs.

The oracle of these operations. Rows are per expert here, in fixed room: expert l of a rank has R * M rows for
the tokens of all R ranks, at most M of each. A masked rank sends and receives nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Reduce, check_reduce, require
from .formats import column_major_scales, fp8_cast, ue8m0_pack
from .layout import check_topk_idx, local_experts
from .logfmt import logfmt_roundtrip
from .numerics import round_to_bf16
from .ordered_sum import OrderedSum


@dataclass(frozen=True)
class LowLatencyOutput:
    """One rank's received rows. Of expert l, the first recv_count[l] are real; the others are zeros here."""

    recv_x: Tensor  # [L, R*M, H] float8_e4m3fn, or bfloat16
    recv_scales: Tensor | None  # [L, R*M, H/128] float32 or [L, R*M, H/512] int32, column-major
    recv_count: Tensor  # [L] int32
    recv_src_info: Tensor  # [L, R*M] int32: source token; -1 past the count
    layout_range: Tensor  # [L, R] int64: (first row << 32) | rows, by source rank


def dispatch(
    xs: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    num_max_tokens: int,
    num_experts: int,
    *,
    fp8: bool = True,
    round_scale: bool = False,
    ue8m0: bool = False,
    masked: Collection[int] = (),
) -> list[LowLatencyOutput]:
    """Send every token to each expert it chose, once, however often it chose it.

    `xs[r]` [T_r, H] bfloat16, `topk_idx[r]` [T_r, K] int32 or int64, T_r <= num_max_tokens = M. Rows of an
    expert are ordered by source rank, then source token. With `fp8` they are cast (formats.fp8_cast); `ue8m0`
    packs the scales and needs `round_scale`. Raises ValueError for malformed arguments.
    """
    num_ranks = len(xs)
    num_local = local_experts(num_experts, num_ranks)
    require(not ue8m0 or round_scale, "ue8m0: got True; allowed: only with round_scale")
    require(
        len(topk_idx) == num_ranks,
        f"topk_idx: got {len(topk_idx)}; allowed: one for each of {num_ranks} ranks",
    )
    payloads, scales = [], []
    for rank, (x, idx) in enumerate(zip(xs, topk_idx, strict=True)):
        check_topk_idx(idx, num_experts)
        require(
            x.dtype == torch.bfloat16 and x.dim() == 2 and x.shape[0] == idx.shape[0] <= num_max_tokens,
            f"rank {rank}: x: got {x.dtype} {list(x.shape)}; "
            f"allowed: bfloat16 [{idx.shape[0]}, H], at most {num_max_tokens} tokens",
        )
        if fp8:
            values, scale_inv = fp8_cast(x, round_scale)
            payloads.append(values)
            scales.append(ue8m0_pack(scale_inv) if ue8m0 else scale_inv)
        else:
            payloads.append(x)

    outputs = []
    room = num_ranks * num_max_tokens
    for rank in range(num_ranks):
        recv_x = payloads[rank].new_zeros(num_local, room, xs[rank].shape[1])
        recv_scales = scales[rank].new_zeros(num_local, room, scales[rank].shape[1]) if fp8 else None
        recv_src_info = torch.full((num_local, room), -1, dtype=torch.int32, device=recv_x.device)
        layout_range = torch.zeros(num_local, num_ranks, dtype=torch.int64, device=recv_x.device)
        recv_count = torch.zeros(num_local, dtype=torch.int32, device=recv_x.device)
        for expert in range(num_local):
            row = 0
            for source in range(num_ranks):
                wants = (topk_idx[source] == rank * num_local + expert).any(1)
                tokens = wants.nonzero().flatten()
                if {source, rank} & set(masked):
                    tokens = tokens[:0]
                rows = slice(row, row + tokens.numel())
                recv_x[expert, rows] = payloads[source][tokens]
                if recv_scales is not None:
                    recv_scales[expert, rows] = scales[source][tokens]
                recv_src_info[expert, rows] = tokens.int()
                layout_range[expert, source] = row << 32 | tokens.numel()
                row += tokens.numel()
            recv_count[expert] = row
        if recv_scales is not None:
            recv_scales = column_major_scales(recv_scales)
        outputs.append(LowLatencyOutput(recv_x, recv_scales, recv_count, recv_src_info, layout_range))
    return outputs


def combine(
    xs: Sequence[Tensor],
    topk_idx: Sequence[Tensor],
    topk_weights: Sequence[Tensor],
    layouts: Sequence[LowLatencyOutput],
    *,
    num_max_tokens: int,
    num_experts: int,
    logfmt: bool = False,
    reduce: Reduce = "rank",
    ranks_per_domain: int = 0,
    masked: Collection[int] = (),
) -> list[Tensor]:
    """Sum each token's rows, weighted: topk_weights[t, k] * row over k; [T, H] bfloat16 each.

    `xs[r]` [L, R*M, H] bfloat16 in the rows of `layouts[r]`, `topk_weights[r]` [T_r, K] float32. Products and
    sums are rounded to float32 one by one, a sum starts from its first term and is rounded once to bfloat16.
    `reduce="rank"`: each rank sums the rows of its own experts, k ascending, and rounds; the token's owner
    sums these partial sums, ranks ascending, and rounds. `reduce="token"`: the owner sums all rows, k
    ascending, and rounds once. `reduce="domain"`: of domains of `ranks_per_domain` consecutive ranks each
    sums and rounds the partial sums of its ranks, ranks ascending, and the owner sums those, domains
    ascending, and rounds: the same as "rank" in one domain; without `logfmt`. `logfmt`: what travels, partial
    sums or rows, is what logfmt_roundtrip makes of it; a partial sum is rounded to bfloat16 first, as it
    travels where LogFMT does not qualify.
    Entries of -1 and of masked ranks are left out, without renormalising; a token without others gives +0.0.
    Raises ValueError for malformed arguments, and for a token that its expert's layout does not have.
    """
    num_ranks = len(xs)
    num_local = local_experts(num_experts, num_ranks)
    check_reduce(reduce, ranks_per_domain, logfmt)
    for name, per_rank in (("topk_idx", topk_idx), ("topk_weights", topk_weights), ("layouts", layouts)):
        require(
            len(per_rank) == num_ranks,
            f"{name}: got {len(per_rank)}; allowed: one for each of {num_ranks} ranks",
        )
    room = num_ranks * num_max_tokens
    for rank, x in enumerate(xs):
        require(
            x.dtype == torch.bfloat16 and x.dim() == 3 and list(x.shape[:2]) == [num_local, room],
            f"rank {rank}: x: got {x.dtype} {list(x.shape)}; allowed: bfloat16 [{num_local}, {room}, H]",
        )
    outputs = []
    for owner, (idx, weights) in enumerate(zip(topk_idx, topk_weights, strict=True)):
        check_topk_idx(idx, num_experts)
        require(
            weights.shape == idx.shape and weights.dtype == torch.float32,
            f"rank {owner}: topk_weights: got {weights.dtype} {list(weights.shape)}; allowed: float32 [T, K]",
        )
        num_tokens, hidden = idx.shape[0], xs[owner].shape[2]
        alive = [rank for rank in range(num_ranks) if not {owner, rank} & set(masked)]
        rows, present = _rows_of_owner(owner, xs, idx, layouts, alive)
        total = OrderedSum(num_tokens, hidden, torch.float32, idx.device)
        if reduce == "token":
            sent = logfmt_roundtrip(rows) if logfmt else rows.float()
            total.add_weighted(sent, weights, present)
        else:
            for domain in _domains(alive, ranks_per_domain if reduce == "domain" else 0):
                summed = OrderedSum.like(total) if reduce == "domain" else total
                for rank in domain:
                    here = present & (idx // num_local == rank)
                    partial = OrderedSum.like(total)
                    partial.add_weighted(rows.float(), weights, here)
                    tokens = here.any(1).nonzero().flatten()
                    rounded = round_to_bf16(partial.value[tokens])
                    summed.add(tokens, logfmt_roundtrip(rounded) if logfmt else rounded)
                if reduce == "domain":
                    tokens = summed.started.flatten().nonzero().flatten()
                    total.add(tokens, round_to_bf16(summed.value[tokens]))
        outputs.append(round_to_bf16(total.value))
    return outputs


def _domains(ranks: Sequence[int], size: int) -> list[list[int]]:
    """The ranks of each domain of `size` consecutive ones; 0: all in one."""
    if size == 0:
        return [list(ranks)]
    numbers = dict.fromkeys(rank // size for rank in ranks)
    return [[rank for rank in ranks if rank // size == number] for number in numbers]


def _rows_of_owner(
    owner: int,
    xs: Sequence[Tensor],
    topk_idx: Tensor,
    layouts: Sequence[LowLatencyOutput],
    alive: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The row of each top-k entry of `owner`, [T, K, H] bfloat16, and which entries have one, [T, K] bool."""
    num_local, _, hidden = xs[owner].shape
    rows = xs[owner].new_zeros(*topk_idx.shape, hidden)
    present = torch.zeros_like(topk_idx, dtype=torch.bool)
    for rank in alive:
        for expert in range(num_local):
            begin, count = divmod(int(layouts[rank].layout_range[expert, owner]), 1 << 32)
            token_of_row = layouts[rank].recv_src_info[expert, begin : begin + count]
            token, k = (topk_idx == rank * num_local + expert).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            is_row_of = token.unsqueeze(1) == token_of_row  # [n, count]
            require(
                bool((is_row_of.sum(1) == 1).all()),
                f"rank {owner}: topk_idx: tokens without a row at expert {rank * num_local + expert}",
            )
            rows[token, k] = xs[rank][expert, begin + is_row_of.int().argmax(1)]
            present[token, k] = True
    return rows, present
