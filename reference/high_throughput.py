"""High-throughput dispatch and combine, seen from above: all ranks' inputs to all ranks' outputs.

The oracle of these operations: pure functions over lists indexed by rank. A masked rank sends and receives
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import require
from .layout import ReceivedRows, align_up, check_topk_idx, local_experts, receive_rows
from .numerics import accumulator_dtype, round_to, settle_nans
from .ordered_sum import OrderedSum


@dataclass(frozen=True)
class DispatchInput:
    """One rank's arguments. `topk_idx` and `topk_weights` come together or not at all."""

    x: Tensor  # [T, H], any dtype
    is_token_in_rank: Tensor  # [T, R] bool
    scales: Tensor | None = None  # [T, P], any dtype, any strides
    topk_idx: Tensor | None = None  # [T, K] int32 or int64, global expert or -1
    topk_weights: Tensor | None = None  # [T, K] float32
    num_tokens_per_expert: Tensor | None = None  # [E] int32


@dataclass(frozen=True)
class DispatchOutput:
    """One rank's results: N rows, or `num_worst_tokens` of which the first N are real."""

    recv_x: Tensor  # [N, H]
    recv_scales: Tensor | None  # [N, P] row-major
    recv_topk_idx: (
        Tensor | None
    )  # [N, K] dtype of topk_idx; local expert, or -1 (other ranks' experts, rows past N)
    recv_topk_weights: Tensor | None  # [N, K] float32, +0.0 where the index is -1
    num_recv_tokens_per_expert: list[
        int
    ]  # L counts rounded up to the alignment; [] without counts or with worst case
    src_rank: Tensor  # [N] int32, real rows only
    src_token: Tensor  # [N] int32, real rows only


@dataclass(frozen=True)
class CombineOutput:
    """One rank's results."""

    x: Tensor  # [T, H], dtype of the rows
    topk_weights: Tensor | None  # [T, K] float32


def dispatch(
    inputs: Sequence[DispatchInput],
    num_experts: int,
    *,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
    masked: Collection[int] = (),
) -> list[DispatchOutput]:
    """Send every token once to every rank of its `is_token_in_rank`; rows arrive by source rank, then source
    token.

    Bits are moved, not values: NaN payloads and any dtype pass. Raises ValueError where an argument is
    malformed or a rank would receive more than `num_worst_tokens` (> 0) rows.
    """
    num_ranks = len(inputs)
    num_local = local_experts(num_experts, num_ranks)
    for rank, given in enumerate(inputs):
        _check_input(rank, given, num_experts)
    tables = [given.is_token_in_rank for given in inputs]
    stacked = {name: rows for name in _FIELDS if (rows := _stack(name, inputs)) is not None}
    first_row = torch.tensor([0, *(table.shape[0] for table in tables)], device=tables[0].device).cumsum(0)

    outputs = []
    for rank in range(num_ranks):
        src_rank, src_token = receive_rows(tables, rank, masked)
        num_rows = src_rank.numel()
        require(
            num_worst_tokens == 0 or num_rows <= num_worst_tokens,
            f"rank {rank}: num_worst_tokens: got {num_worst_tokens}; allowed: at least {num_rows}, the rows",
        )
        row = first_row[src_rank.long()] + src_token  # [N]: where in the stacked inputs
        received = {name: rows[row] for name, rows in stacked.items()}
        if "topk_idx" in received:
            local, mine = _localise(received["topk_idx"], rank, num_local)
            received["topk_idx"] = local
            received["topk_weights"] = received["topk_weights"].masked_fill(~mine, 0.0)
        if num_worst_tokens > 0:
            received = {name: _pad(rows, num_worst_tokens) for name, rows in received.items()}
            if "topk_idx" in received:
                received["topk_idx"][num_rows:] = -1
        outputs.append(
            DispatchOutput(
                received["x"],
                received.get("scales"),
                received.get("topk_idx"),
                received.get("topk_weights"),
                []
                if num_worst_tokens > 0
                else _expert_counts(inputs, rank, num_local, expert_alignment, masked),
                src_rank,
                src_token,
            )
        )
    return outputs


def combine(
    xs: Sequence[Tensor],
    is_token_in_rank: Sequence[Tensor],
    *,
    topk_weights: Sequence[Tensor] | None = None,
    biases: Sequence[Sequence[Tensor]] | None = None,
    masked: Collection[int] = (),
    masked_at_dispatch: Collection[int] | None = None,
    ranks_per_domain: int | None = None,
) -> list[CombineOutput]:
    """Bring every row back to its token and sum, unweighted: bias_0 + bias_1 + the rows of ranks ascending.

    `xs[r]` [N_r, H] (rows past the real count are ignored): bfloat16, or float32 / float64 for gradient
    tests. The sum runs in float32 (float64 for float64), starts from its first term, and is rounded once to
    the rows' dtype. A token without any term gives +0.0. `topk_weights[r]` [N_r, K] float32 are summed the
    same way, from +0.0. Masked ranks' rows are left out; `masked_at_dispatch` (default: the same) says which
    were missing from the rows.

    Between domains of `ranks_per_domain` ranks (default: all ranks are one), the rows of each domain are
    summed by themselves like this and rounded to the rows' dtype, and those sums, domains ascending, take the
    place of the rows. One domain rounds once, as without it. Raises ValueError for malformed arguments.
    """
    num_ranks = len(xs)
    per_domain = num_ranks if ranks_per_domain is None else ranks_per_domain
    require(per_domain >= 1, f"ranks_per_domain: got {ranks_per_domain}; allowed: at least 1")
    require(
        len(is_token_in_rank) == num_ranks,
        f"is_token_in_rank: got {len(is_token_in_rank)} tables, {num_ranks} ranks",
    )
    missing = masked if masked_at_dispatch is None else masked_at_dispatch
    origins = [receive_rows(is_token_in_rank, rank, missing) for rank in range(num_ranks)]
    _check_rows("x", xs, origins)
    if topk_weights is not None:
        _check_rows("topk_weights", topk_weights, origins)
    require(
        biases is None or len(biases) == num_ranks,
        "biases: got another number than ranks; allowed: one tuple each",
    )
    outputs = []
    for owner, table in enumerate(is_token_in_rank):
        own_biases = biases[owner] if biases is not None else ()
        require(len(own_biases) <= 2, f"rank {owner}: biases: got {len(own_biases)}; allowed: at most 2")
        total = OrderedSum(
            table.shape[0], xs[owner].shape[1], accumulator_dtype(xs[owner].dtype), table.device
        )
        everyone = torch.arange(table.shape[0], device=table.device)
        for bias in own_biases:
            require(
                bias.shape == total.value.shape,
                f"rank {owner}: bias: got {list(bias.shape)}; allowed: [T, H]",
            )
            total.add(everyone, bias)
        weights = None
        if topk_weights is not None:
            weights = topk_weights[owner].new_zeros(table.shape[0], topk_weights[owner].shape[1])
        several_domains = per_domain < num_ranks
        for first in range(0, num_ranks, per_domain):
            domain = OrderedSum.like(total) if several_domains else total
            for rank in range(first, min(first + per_domain, num_ranks)):
                if {owner, rank} & set(masked):
                    continue
                rows = (origins[rank].src_rank == owner).nonzero().flatten()
                tokens = origins[rank].src_token[rows].long()
                domain.add(tokens, xs[rank][rows])
                if weights is not None and topk_weights is not None:
                    weights[tokens] += topk_weights[rank][rows]
            if several_domains:
                crossing = domain.started.flatten().nonzero().flatten()
                total.add(crossing, round_to(domain.value[crossing], xs[owner].dtype))
        if weights is not None:
            settle_nans(weights)
        outputs.append(CombineOutput(round_to(total.value, xs[owner].dtype), weights))
    return outputs


_FIELDS = ("x", "scales", "topk_idx", "topk_weights")


def _stack(name: str, inputs: Sequence[DispatchInput]) -> Tensor | None:
    """All ranks' rows of one field, [sum of T, *]; None where nobody gives it."""
    fields = [getattr(given, name) for given in inputs]
    present = [field for field in fields if field is not None]
    if not present:
        return None
    kinds = {(field.dtype, field.shape[1]) for field in present}
    require(
        len(present) == len(fields) and len(kinds) == 1,
        f"{name}: must be given by all ranks or by none, in one dtype and width; got {kinds}",
    )
    return torch.cat(present)


def _localise(topk_idx: Tensor, rank: int, num_local: int) -> tuple[Tensor, Tensor]:
    """Local index or -1 of global experts, and which entries are this rank's."""
    mine = (topk_idx >= rank * num_local) & (topk_idx < (rank + 1) * num_local)
    return (topk_idx - rank * num_local).masked_fill(~mine, -1), mine


def _pad(rows: Tensor, num_rows: int) -> Tensor:
    """`rows` and zeros, `num_rows` in all."""
    return torch.cat([rows, rows.new_zeros(num_rows - rows.shape[0], rows.shape[1])])


def _expert_counts(
    inputs: Sequence[DispatchInput], rank: int, num_local: int, alignment: int, masked: Collection[int]
) -> list[int]:
    """Counts of all ranks together for each expert of `rank`, rounded up; [] where nobody counts."""
    counts = [given.num_tokens_per_expert for given in inputs if given.num_tokens_per_expert is not None]
    require(len(counts) in (0, len(inputs)), "num_tokens_per_expert: must be given by all ranks or by none")
    if not counts:
        return []
    total = torch.zeros(num_local, dtype=torch.int64, device=counts[0].device)
    for source, count in enumerate(counts):
        if not {source, rank} & set(masked):
            total += count[rank * num_local : (rank + 1) * num_local]
    return [align_up(count, alignment) for count in total.tolist()]


def _check_rows(name: str, tensors: Sequence[Tensor], origins: Sequence[ReceivedRows]) -> None:
    require(
        len(tensors) == len(origins),
        f"{name}: got {len(tensors)}; allowed: one for each of {len(origins)} ranks",
    )
    for rank, (rows, origin) in enumerate(zip(tensors, origins, strict=True)):
        num_rows = origin.src_rank.numel()
        same_kind = (
            rows.dim() == 2 and rows.shape[1] == tensors[0].shape[1] and rows.dtype == tensors[0].dtype
        )
        require(
            same_kind and rows.shape[0] >= num_rows,
            f"rank {rank}: {name}: got {rows.dtype} {list(rows.shape)}; "
            f"allowed: at least {num_rows} rows, in the width and dtype of rank 0",
        )


def _check_input(rank: int, given: DispatchInput, num_experts: int) -> None:
    num_tokens = given.is_token_in_rank.shape[0]
    for name in _FIELDS:
        field = getattr(given, name)
        require(
            field is None or (field.dim() == 2 and field.shape[0] == num_tokens),
            f"rank {rank}: {name}: got {getattr(field, 'shape', None)}; allowed: [{num_tokens}, *]",
        )
    require(
        (given.topk_idx is None) == (given.topk_weights is None),
        f"rank {rank}: topk_idx and topk_weights come together or not at all",
    )
    if given.topk_idx is not None and given.topk_weights is not None:
        check_topk_idx(given.topk_idx, num_experts)
        require(
            given.topk_weights.shape == given.topk_idx.shape and given.topk_weights.dtype == torch.float32,
            f"rank {rank}: topk_weights: got {given.topk_weights.dtype} {list(given.topk_weights.shape)}; "
            f"allowed: float32 {list(given.topk_idx.shape)}",
        )
    if given.num_tokens_per_expert is not None:
        require(
            list(given.num_tokens_per_expert.shape) == [num_experts],
            f"rank {rank}: num_tokens_per_expert: got {list(given.num_tokens_per_expert.shape)}; "
            f"allowed: [{num_experts}]",
        )
