"""The layout rules, seen from above: who receives what, and in which row.

Pure functions of routing decisions; nothing here communicates. `R` ranks own `E` experts in contiguous
blocks: expert `e` lives on rank `e // L` with `L = E // R`. A `topk_idx` entry of -1 means "no expert" and
counts nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import require


@dataclass(frozen=True)
class DispatchLayout:
    """Counts of one rank's top-k choices, by rank, by node and by expert.

    A token counts once per rank and once per node, however many of its experts live there; it counts once per
    entry for experts, so an expert chosen twice by a token counts twice.
    """

    num_tokens_per_rank: Tensor  # [R] int32
    num_tokens_per_node: Tensor | None  # [D] int32; None where all ranks fit in one node
    num_tokens_per_expert: Tensor  # [E] int32
    is_token_in_rank: Tensor  # [T, R] bool


class ReceivedRows(NamedTuple):
    """Sources of a receiver's rows. Their order: ascending source rank, then ascending source token."""

    src_rank: Tensor  # [N] int32
    src_token: Tensor  # [N] int32


class ExpandedRows(NamedTuple):
    """Rows of a per-expert ("grouped GEMM") layout: one per (received row, k) pair that chose a local expert.

    Expert `i` starts at `psum[i - 1]` rounded up to the alignment (expert 0 at 0) and ends before `psum[i]`.
    """

    row: Tensor  # [N, K] int64, -1 where the entry is -1
    psum: Tensor  # [L] int64: aligned rows of the experts before i, plus the real count of i


class ForwardedRows(NamedTuple):
    """Sources of the rows of a two-level dispatch's second hop."""

    gateway: Tensor  # [N] int64: the rank that forwards the row
    gateway_row: Tensor  # [N] int64: which of the rows it holds


@dataclass(frozen=True)
class TwoLevelRoutes:
    """A dispatch in two hops: a token goes once to every node that wants it and is spread to ranks there.

    Node `d` is the ranks from `d * ranks_per_node` on; the last one may be smaller. The first hop from source
    rank `s` ends on the node's rank with the local index of `s` (modulo the node's size): its *gateway*.
    """

    is_token_in_node: list[Tensor]  # by source rank: [T, D] bool
    gateway_rows: list[
        ReceivedRows
    ]  # by rank: what it holds as a gateway, in (source rank, source token) order
    final_rows: list[ForwardedRows]  # by rank: the origin of its rows, in the order of the flat dispatch


def local_experts(num_experts: int, num_ranks: int) -> int:
    """L, the experts of each rank. ValueError where the experts do not divide among the ranks."""
    require(num_ranks >= 1, f"num_ranks: got {num_ranks}; allowed: at least 1")
    require(
        num_experts >= num_ranks and num_experts % num_ranks == 0,
        f"num_experts: got {num_experts}; allowed: a positive multiple of the {num_ranks} ranks",
    )
    return num_experts // num_ranks


def check_topk_idx(topk_idx: Tensor, num_experts: int) -> None:
    """ValueError unless `topk_idx` is [T, K] int32 or int64 with entries in [-1, num_experts)."""
    require(topk_idx.dim() == 2, f"topk_idx: got {topk_idx.dim()} dimensions; allowed: [T, K]")
    require(
        topk_idx.dtype in (torch.int32, torch.int64), f"topk_idx: got {topk_idx.dtype}; allowed: int32, int64"
    )
    in_range = (topk_idx >= -1) & (topk_idx < num_experts)
    require(bool(in_range.all()), f"topk_idx: entries outside [-1, {num_experts})")


def dispatch_layout(
    topk_idx: Tensor, num_experts: int, num_ranks: int, ranks_per_node: int = 8
) -> DispatchLayout:
    """The layout of one rank's `topk_idx` [T, K] (int32 or int64, -1 for no expert).

    Raises ValueError for a wrong shape or dtype, an index out of range, or experts that do not divide among
    ranks.
    """
    check_topk_idx(topk_idx, num_experts)
    num_local = local_experts(num_experts, num_ranks)
    require(ranks_per_node >= 1, f"ranks_per_node: got {ranks_per_node}; allowed: at least 1")
    num_tokens = topk_idx.shape[0]
    token, k = (topk_idx >= 0).nonzero(as_tuple=True)
    expert = topk_idx[token, k].long()

    def chosen(owner: Tensor, num_owners: int) -> Tensor:  # -> [T, num_owners] bool
        table = torch.zeros(num_tokens, num_owners, dtype=torch.bool, device=topk_idx.device)
        table[token, owner] = True
        return table

    in_rank = chosen(expert // num_local, num_ranks)
    num_tokens_per_node = None
    if num_ranks > ranks_per_node:
        num_nodes = -(-num_ranks // ranks_per_node)
        in_node = chosen(expert // num_local // ranks_per_node, num_nodes)
        num_tokens_per_node = in_node.sum(0, dtype=torch.int32)
    return DispatchLayout(
        num_tokens_per_rank=in_rank.sum(0, dtype=torch.int32),
        num_tokens_per_node=num_tokens_per_node,
        num_tokens_per_expert=torch.bincount(expert, minlength=num_experts).int(),
        is_token_in_rank=in_rank,
    )


def receive_rows(is_token_in_rank: Sequence[Tensor], rank: int, masked: Collection[int] = ()) -> ReceivedRows:
    """The rows that `rank` receives. `is_token_in_rank[s]` is source rank s's [T_s, R] bool.

    A masked rank sends and receives nothing.
    """
    check_tables(is_token_in_rank)
    require(0 <= rank < len(is_token_in_rank), f"rank: got {rank}; allowed: below {len(is_token_in_rank)}")
    device = is_token_in_rank[0].device
    src_rank = [torch.empty(0, dtype=torch.int32, device=device)]
    src_token = [torch.empty(0, dtype=torch.int32, device=device)]
    for source, table in enumerate(is_token_in_rank):
        if source in masked or rank in masked:
            continue
        tokens = table[:, rank].nonzero().flatten().int()
        src_rank.append(torch.full_like(tokens, source))
        src_token.append(tokens)
    return ReceivedRows(torch.cat(src_rank), torch.cat(src_token))


def check_tables(is_token_in_rank: Sequence[Tensor]) -> None:
    """ValueError unless there is one [T, R] bool table per rank."""
    num_ranks = len(is_token_in_rank)
    require(num_ranks >= 1, "is_token_in_rank: got no tables; allowed: one per rank")
    for source, table in enumerate(is_token_in_rank):
        require(
            table.dtype == torch.bool and table.dim() == 2 and table.shape[1] == num_ranks,
            f"rank {source}: is_token_in_rank: got {table.dtype} {list(table.shape)}; "
            f"allowed: bool [T, {num_ranks}]",
        )


def align_up(value: int, alignment: int) -> int:
    """`value` rounded up to a multiple of `alignment`."""
    require(alignment >= 1, f"alignment: got {alignment}; allowed: at least 1")
    return -(-value // alignment) * alignment


def expanded_rows(recv_topk_idx: Tensor, num_local_experts: int, alignment: int = 1) -> ExpandedRows:
    """The row of every (received row, k) in the per-expert layout; inside an expert by received row, then k.

    `recv_topk_idx` [N, K]: local expert index or -1. The layout spans `align_up(psum[-1], alignment)` rows.
    """
    check_topk_idx(recv_topk_idx, num_local_experts)
    row = torch.full(recv_topk_idx.shape, -1, dtype=torch.int64, device=recv_topk_idx.device)
    psum, start = [], 0
    for expert in range(num_local_experts):
        mine = recv_topk_idx == expert  # nonzero() and masks go through [N, K] in the order that is wanted
        count = int(mine.sum())
        row[mine] = torch.arange(start, start + count, device=row.device)
        psum.append(start + count)
        start = align_up(start + count, alignment)
    return ExpandedRows(row, torch.tensor(psum, dtype=torch.int64, device=row.device))


def two_level_routes(is_token_in_rank: Sequence[Tensor], ranks_per_node: int) -> TwoLevelRoutes:
    """The two-hop routes that deliver what `receive_rows` delivers, in the same rows."""
    check_tables(is_token_in_rank)
    require(ranks_per_node >= 1, f"ranks_per_node: got {ranks_per_node}; allowed: at least 1")
    num_ranks = len(is_token_in_rank)
    node_starts = range(0, num_ranks, ranks_per_node)
    is_token_in_node = [
        torch.stack([table[:, d : d + ranks_per_node].any(1) for d in node_starts], dim=1)
        for table in is_token_in_rank
    ]

    def gateway(source: int, node: int) -> int:
        node_size = min(ranks_per_node, num_ranks - node * ranks_per_node)
        return node * ranks_per_node + source % ranks_per_node % node_size

    held: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]  # by gateway: (source, token) of rows
    for source, table in enumerate(is_token_in_node):
        for token, node in table.nonzero().tolist():
            held[gateway(source, node)].append((source, token))
    gateway_row = [{pair: row for row, pair in enumerate(rows)} for rows in held]

    final_rows = []
    for rank in range(num_ranks):
        via, row = [], []
        for source, table in enumerate(is_token_in_rank):
            for token in table[:, rank].nonzero().flatten().tolist():
                via.append(gateway(source, rank // ranks_per_node))
                row.append(gateway_row[via[-1]][source, token])
        final_rows.append(ForwardedRows(*torch.tensor([via, row], dtype=torch.int64, device="cpu")))
    gateway_rows = [
        ReceivedRows(*torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 2).unbind(1))
        for rows in held
    ]
    return TwoLevelRoutes(is_token_in_node, gateway_rows, final_rows)
