"""High-throughput dispatch and combine over torch.distributed's all_to_all: what a user can run anywhere.

One rank's side of each operation, on a `Wire`. Routing is worked out here, on purpose, without layout.py and
high_throughput.py: the two forms judge each other.

A dispatch is one exchange: all that belongs to a row travels in one record of bytes, next to each other
    x | scales | top-k indices (global) | top-k weights | source token (int32)
so that bf16, fp8 with any scales, float32 and int32/int64 indices need no path of their own. A combine is one
exchange of (x | top-k weights) records in the other direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import require
from .numerics import accumulator_dtype, round_to, settle_nans
from .records import pack_records, unpack_records
from .wire import Wire


@dataclass(frozen=True)
class DispatchPlan:
    """One rank's share of a routing decision: all that cached dispatches and combines need.

    Lists indexed by rank hold zero for masked ranks.
    """

    num_tokens: int  # T
    send_token: Tensor  # [S] int64: tokens to send, by destination rank, then token
    send_counts: list[int]  # [R] rows to each rank; sum S
    recv_counts: list[int]  # [R] rows from each rank; sum N
    counts: list[list[int]]  # [R][R] rows from source to destination, the same on all ranks
    num_recv_tokens_per_expert: list[int]  # [L], not aligned; [] where the ranks gave no expert counts
    src_rank: Tensor  # [N] int32
    src_token: Tensor  # [N] int32: written by the first dispatch (-1 before), whose records bring it

    @property
    def num_recv_tokens(self) -> int:
        """N, the rows this rank receives."""
        return sum(self.recv_counts)


@dataclass(frozen=True)
class DispatchTensors:
    """Received rows, and maybe more: of rows past N only the indices are written, with -1."""

    x: Tensor  # [N, H]
    scales: Tensor | None = None  # [N, P] row-major
    topk_idx: Tensor | None = None  # [N, K] local expert or -1, dtype as given to dispatch
    topk_weights: Tensor | None = None  # [N, K] float32, +0.0 where the index is -1


@dataclass(frozen=True)
class CombineTensors:
    """Summed rows of this rank's tokens."""

    x: Tensor  # [T, H], dtype of the rows
    topk_weights: Tensor | None = None  # [T, K] float32


Deliver = Callable[[Wire, DispatchPlan, Tensor], Tensor]
"""Moves records [T, bytes] of a rank's tokens along a plan; returns those received, [N, bytes], in order."""


def exchange_counts(
    wire: Wire, is_token_in_rank: Tensor, num_tokens_per_expert: Tensor | None = None
) -> DispatchPlan:
    """Agree on who sends how many rows to whom: one small all_gather, after which the host knows N.

    `is_token_in_rank` [T, R] bool decides the routing; `num_tokens_per_expert` [E] integer is only added up
    and passed on (by all ranks or by none). Raises ValueError for a wrong shape or dtype, before anything is
    sent.
    """
    num_ranks = wire.num_ranks
    require(
        is_token_in_rank.dtype == torch.bool
        and is_token_in_rank.dim() == 2
        and is_token_in_rank.shape[1] == num_ranks,
        f"is_token_in_rank: got {is_token_in_rank.dtype} {list(is_token_in_rank.shape)}; "
        f"allowed: bool [T, {num_ranks}]",
    )
    num_experts = 0 if num_tokens_per_expert is None else num_tokens_per_expert.numel()
    require(
        num_experts % num_ranks == 0,
        f"num_tokens_per_expert: got {num_experts}; allowed: a multiple of {num_ranks}",
    )
    alive = torch.zeros(num_ranks, dtype=torch.bool, device=is_token_in_rank.device)
    alive[list(wire.members)] = True
    words = (is_token_in_rank & alive).sum(0)
    if num_tokens_per_expert is not None:
        words = torch.cat([words, num_tokens_per_expert.to(words)])
    gathered = {source: row.tolist() for source, row in wire.all_gather(words).items()}
    nothing = [0] * num_ranks
    counts = [gathered.get(source, nothing)[:num_ranks] for source in range(num_ranks)]
    num_local = num_experts // num_ranks
    first = num_ranks + wire.rank * num_local
    columns = zip(*(row[first : first + num_local] for row in gathered.values()), strict=True)
    plan = restore_plan(wire.rank, is_token_in_rank, counts)
    return replace(plan, num_recv_tokens_per_expert=[sum(column) for column in columns])


def restore_plan(rank: int, is_token_in_rank: Tensor, counts: list[list[int]]) -> DispatchPlan:
    """The plan of `is_token_in_rank` [T, R] and all ranks' `counts` (see DispatchPlan), without an exchange.

    It has no expert counts and, until a dispatch brings them, no source tokens.
    """
    # A masked rank has no rows, whatever the table says of it.
    gets_any = torch.tensor(counts[rank], device=is_token_in_rank.device) > 0
    token = (is_token_in_rank & gets_any).t().nonzero(as_tuple=True)[1]
    recv_counts = [row[rank] for row in counts]
    src_rank = torch.repeat_interleave(
        torch.arange(len(counts), dtype=torch.int32, device=token.device),
        torch.tensor(recv_counts, device=token.device),
    )
    return DispatchPlan(
        num_tokens=is_token_in_rank.shape[0],
        send_token=token,
        send_counts=counts[rank],
        recv_counts=recv_counts,
        counts=counts,
        num_recv_tokens_per_expert=[],
        src_rank=src_rank,
        src_token=torch.full_like(src_rank, -1),
    )


def allocate(
    plan: DispatchPlan,
    x: Tensor,
    *,
    scales: Tensor | None = None,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
    num_worst_tokens: int = 0,
) -> DispatchTensors:
    """Outputs for a dispatch of these inputs: N rows, or `num_worst_tokens` if that is not zero.

    Whether those are enough, on this rank or another, every rank sees from `plan.counts`.
    """
    rows = num_worst_tokens or plan.num_recv_tokens

    def empty_like(field: Tensor | None) -> Tensor | None:
        return None if field is None else field.new_empty(rows, field.shape[1])

    recv_x = x.new_empty(rows, x.shape[1])
    return DispatchTensors(recv_x, empty_like(scales), empty_like(topk_idx), empty_like(topk_weights))


def dispatch(
    wire: Wire,
    plan: DispatchPlan,
    x: Tensor,
    *,
    scales: Tensor | None = None,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
    num_experts: int = 0,
    out: DispatchTensors | None = None,
    deliver: Deliver | None = None,
) -> DispatchTensors:
    """Send the rows of `x` [T, H] as planned and receive: by source rank, then source token. One exchange.

    `scales` [T, P], `topk_idx` [T, K] (needs `num_experts`), `topk_weights` [T, K] float32: optional, the
    same ones on all ranks; any strides. `out` comes from `allocate` and may have more than N rows. `deliver`
    moves the records another way (two_level.py). Raises ValueError for shapes that do not fit, before
    anything is sent.
    """
    fields = _present(x=x, scales=scales, topk_idx=topk_idx, topk_weights=topk_weights)
    for name, field in fields.items():
        require(
            field.dim() == 2 and field.shape[0] == plan.num_tokens,
            f"{name}: got {list(field.shape)}; allowed: [{plan.num_tokens}, *]",
        )
    require(
        (topk_idx is None) == (topk_weights is None),
        "topk_weights: topk_idx and topk_weights come together or not at all",
    )
    require(
        topk_idx is None or (num_experts > 0 and num_experts % wire.num_ranks == 0),
        f"num_experts: got {num_experts}; allowed: a positive multiple of {wire.num_ranks}",
    )
    if out is None:
        out = allocate(plan, x, scales=scales, topk_idx=topk_idx, topk_weights=topk_weights)
    total = plan.num_recv_tokens
    require(out.x.shape[0] >= total, f"out: got {out.x.shape[0]} rows; allowed: at least {total}")

    send_counts, recv_counts = _alive(wire, plan.send_counts), _alive(wire, plan.recv_counts)
    require(
        send_counts == plan.send_counts and recv_counts == plan.recv_counts,
        "plan: it has rows for ranks that were masked since; allowed: a plan made with these members",
    )
    fields["token"] = torch.arange(plan.num_tokens, dtype=torch.int32, device=x.device).unsqueeze(1)
    records = pack_records(fields)
    if deliver is None:
        received = wire.all_to_all_rows(records[plan.send_token], send_counts, recv_counts)
    else:
        received = deliver(wire, plan, records)
    got = unpack_records(received, fields)
    plan.src_token.copy_(got["token"].squeeze(1))
    out.x[:total] = got["x"]
    if out.scales is not None:
        out.scales[:total] = got["scales"]
    if out.topk_idx is not None and out.topk_weights is not None:
        num_local = num_experts // wire.num_ranks
        expert = got["topk_idx"]
        mine = (expert >= 0) & (expert // num_local == wire.rank)
        out.topk_idx[:total] = torch.where(mine, expert % num_local, -1)
        out.topk_idx[total:] = -1
        out.topk_weights[:total] = torch.where(mine, got["topk_weights"], 0.0)
    return out


def combine(
    wire: Wire,
    plan: DispatchPlan,
    x: Tensor,
    *,
    topk_weights: Tensor | None = None,
    biases: Sequence[Tensor] = (),
) -> CombineTensors:
    """Return each received row to its token and sum there: biases, then rows by ascending rank. One exchange.

    `x` [>= N, H] bfloat16, float32 or float64; the sum runs in float32 (float64 for float64), starts from its
    first term and is rounded once. Tokens without a term give +0.0. `topk_weights` [>= N, K] float32 are
    summed from +0.0. `biases`: up to two [T, H]. Rows of ranks that were masked since the dispatch are left
    out. Raises ValueError for shapes and dtypes that do not fit, before anything is sent.
    """
    fields = fields_to_return(plan, x, topk_weights, biases)
    num_tokens, hidden, wide = plan.num_tokens, x.shape[-1], accumulator_dtype(x.dtype)

    back_counts, owned_counts = _alive(wire, plan.recv_counts), _alive(wire, plan.send_counts)
    records = pack_records(fields)
    if back_counts != plan.recv_counts:
        by_source = zip(records.split(plan.recv_counts), back_counts, strict=True)
        records = torch.cat([part[:count] for part, count in by_source])
    received = wire.all_to_all_rows(records, back_counts, owned_counts)
    got = unpack_records(received, fields)

    total_x = torch.zeros(num_tokens, hidden, dtype=wide, device=x.device)
    started = torch.full((num_tokens, 1), len(biases) > 0, device=x.device)
    for n, bias in enumerate(biases):
        total_x = bias.to(wide, copy=True) if n == 0 else total_x + bias.to(wide)
    weights = None
    if topk_weights is not None:
        weights = topk_weights.new_zeros(num_tokens, topk_weights.shape[1])
    tokens_of = plan.send_token.split(plan.send_counts)
    start = 0
    for rank, count in enumerate(owned_counts):
        if count == 0:
            continue
        token, rows = tokens_of[rank], slice(start, start + count)
        term = got["x"][rows].to(wide)
        # The first term is taken, not added to zero: 0.0 + -0.0 would lose the sign of a lone -0.0.
        total_x[token] = torch.where(started[token], total_x[token] + term, term)
        started[token] = True
        if weights is not None:
            weights[token] += got["topk_weights"][rows]
        start += count
    if weights is not None:
        settle_nans(weights)
    return CombineTensors(round_to(total_x, x.dtype), weights)


def fields_to_return(
    plan: DispatchPlan, x: Tensor, topk_weights: Tensor | None, biases: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The arguments of a combine, checked, as the fields of its N records. Raises ValueError."""
    total = plan.num_recv_tokens
    fields = {name: field[:total] for name, field in _present(x=x, topk_weights=topk_weights).items()}
    for name, field in fields.items():
        require(
            field.dim() == 2 and field.shape[0] == total,
            f"{name}: got {list(field.shape)}; allowed: [>= {total}, *]",
        )
    require(len(biases) <= 2, f"biases: got {len(biases)}; allowed: at most 2")
    for bias in biases:
        require(
            list(bias.shape) == [plan.num_tokens, x.shape[-1]], f"bias: got {bias.shape}; allowed: [T, H]"
        )
    accumulator_dtype(x.dtype)
    return fields


def _alive(wire: Wire, counts: Sequence[int]) -> list[int]:
    """Counts by rank with zero for ranks that are no members (any more)."""
    return [count if rank in wire.members else 0 for rank, count in enumerate(counts)]


def _present(**fields: Tensor | None) -> dict[str, Tensor]:
    """The fields that were given, in the order in which they lie in a record."""
    return {name: field for name, field in fields.items() if field is not None}
