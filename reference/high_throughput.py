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
from .layout import align_up, check_topk_idx, local_experts, receive_rows
from .numerics import OrderedSum, accumulator_dtype, round_to


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
    outputs = []
    for rank in range(num_ranks):
        src_rank, src_token = receive_rows(tables, rank, masked)
        num_rows = src_rank.numel()
        require(
            num_worst_tokens == 0 or num_rows <= num_worst_tokens,
            f"rank {rank}: num_worst_tokens: got {num_worst_tokens}; allowed: at least {num_rows}, the rows",
        )
        spare = num_worst_tokens - num_rows if num_worst_tokens > 0 else 0

        def gather(field: str, spare: int = spare, rank: int = rank) -> Tensor | None:
            return _gather_rows([getattr(given, field) for given in inputs], tables, rank, masked, spare)

        recv_x = gather("x")
        assert recv_x is not None
        recv_topk_idx, recv_topk_weights = gather("topk_idx"), gather("topk_weights")
        if recv_topk_idx is not None and recv_topk_weights is not None:
            local = recv_topk_idx - rank * num_local
            foreign = (recv_topk_idx < 0) | (local < 0) | (local >= num_local)
            foreign[num_rows:] = True
            recv_topk_idx = local.masked_fill(foreign, -1)
            recv_topk_weights = recv_topk_weights.masked_fill(foreign, 0.0)
        per_expert: list[int] = []
        if inputs[rank].num_tokens_per_expert is not None and num_worst_tokens == 0:
            for expert in range(rank * num_local, (rank + 1) * num_local):
                counts = [
                    _count(given, expert) for s, given in enumerate(inputs) if not {s, rank} & set(masked)
                ]
                per_expert.append(align_up(sum(counts), expert_alignment))
        outputs.append(
            DispatchOutput(
                recv_x, gather("scales"), recv_topk_idx, recv_topk_weights, per_expert, src_rank, src_token
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
) -> list[CombineOutput]:
    """Bring every row back to its token and sum, unweighted: bias_0 + bias_1 + the rows of ranks ascending.

    `xs[r]` [N_r, H] (rows past the real count are ignored): bfloat16, or float32 / float64 for gradient
    tests. The sum runs in float32 (float64 for float64), starts from its first term, and is rounded once to
    the rows' dtype. A token without any term gives +0.0. `topk_weights[r]` [N_r, K] float32 are summed the
    same way, from +0.0. Masked ranks' rows are left out; `masked_at_dispatch` (default: the same) says which
    were missing from the rows. Raises ValueError for malformed arguments.
    """
    num_ranks = len(xs)
    require(
        len(is_token_in_rank) == num_ranks,
        f"is_token_in_rank: got {len(is_token_in_rank)} tables, {num_ranks} ranks",
    )
    missing = masked if masked_at_dispatch is None else masked_at_dispatch
    origins = [receive_rows(is_token_in_rank, rank, missing) for rank in range(num_ranks)]
    for rank, x in enumerate(xs):
        require(
            x.dim() == 2 and x.shape[0] >= origins[rank].src_rank.numel(),
            f"rank {rank}: x: got {list(x.shape)}; allowed: [>= {origins[rank].src_rank.numel()}, H]",
        )
    outputs = []
    for owner, table in enumerate(is_token_in_rank):
        own_biases = biases[owner] if biases is not None else ()
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
        for rank in range(num_ranks):
            if {owner, rank} & set(masked):
                continue
            rows = (origins[rank].src_rank == owner).nonzero().flatten()
            tokens = origins[rank].src_token[rows].long()
            total.add(tokens, xs[rank][rows])
            if weights is not None and topk_weights is not None:
                weights[tokens] += topk_weights[rank][rows]
        outputs.append(CombineOutput(round_to(total.value, xs[owner].dtype), weights))
    return outputs


def _gather_rows(
    fields: Sequence[Tensor | None],
    tables: Sequence[Tensor],
    rank: int,
    masked: Collection[int],
    spare: int,
) -> Tensor | None:
    """The rows that `rank` receives of one field and `spare` zero rows; None where nobody gives the field."""
    given = [field for field in fields if field is not None]
    if not given:
        return None
    require(len(given) == len(fields), "an optional argument must be given by all ranks or by none")
    rows = [field[table[:, rank]] for field, table in zip(given, tables, strict=True)]
    rows = [row if not {source, rank} & set(masked) else row[:0] for source, row in enumerate(rows)]
    return torch.cat([*rows, given[rank].new_zeros(spare, given[rank].shape[1])])


def _count(given: DispatchInput, expert: int) -> int:
    require(
        given.num_tokens_per_expert is not None, "num_tokens_per_expert must be given by all ranks or by none"
    )
    assert given.num_tokens_per_expert is not None
    return int(given.num_tokens_per_expert[expert])


def _check_input(rank: int, given: DispatchInput, num_experts: int) -> None:
    num_tokens = given.is_token_in_rank.shape[0]
    for name in ("x", "scales", "topk_idx", "topk_weights"):
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
