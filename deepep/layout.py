"""Layout rules on the CPU: the typed face of `deepep._core`, the compiled rules of csrc/layout.

The kernels run the same rules on the device. Tensors lend their memory; nothing is copied. Shapes use

    R ranks, E experts, L = E/R experts on a rank, K top-k, T tokens of a rank, H hidden,
    M most tokens of any rank, D nodes, N rows received.

Bad arguments raise ArgumentError, which names the argument; a size that 64 bits cannot hold, OverflowError.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

import deepep._core as _core
from deepep.errors import ArgumentTypeError, DeviceError, LayoutError, ShapeError
from deepep.runtime.checks import MOST, check_int, check_memory, shape_text
from deepep.runtime.signatures import checked

Array: TypeAlias = Tensor | np.ndarray
CrossingBuffer = _core.CrossingBuffer  # every offset of csrc/layout/crossing_layout.hpp
RecordSizes = _core.RecordSizes  # the parts of its records
LowLatencyBuffer = _core.LowLatencyBuffer  # every offset of csrc/layout/rules/low_latency_buffer.hpp


_counted = functools.partial(checked, most=MOST)
"""The same for functions that take as much memory as their integers say."""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b) if a > 0 and b > 0 else 0  # what makes no sense is refused by the core


def _view(tensor: Array, name: str, dims: int, *dtypes: str) -> np.ndarray:
    """The contiguous CPU memory of `tensor` as numpy sees it, without a copy. dims: 0 for any number."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in dtypes:
        raise ArgumentTypeError(name, dtype, " or ".join(dtypes))
    if dims and tensor.ndim != dims:
        raise ShapeError(name, shape_text(tensor.shape), f"{dims} dimensions")
    if isinstance(tensor, Tensor):
        check_memory(name, tensor)
        if tensor.device.type != "cpu":
            raise DeviceError(name, f"a tensor on {tensor.device}", "one on the CPU")
        tensor = tensor.detach().numpy()
    if not tensor.flags.c_contiguous:
        raise LayoutError(name, f"strides {tensor.strides}", "contiguous memory")
    return tensor


@dataclass(frozen=True)
class DispatchLayout:
    """Counts of one rank's top-k choices, by peer; int32, as the public interface returns counts."""

    num_tokens_per_rank: Tensor  # [R] tokens that go to each rank, each once
    num_tokens_per_node: Tensor | None  # [D] tokens that go to each node, each once; None for one node
    num_tokens_per_expert: Tensor  # [E] top-k entries of each expert, duplicates included
    is_token_in_rank: Tensor  # [T, R] bool


@_counted
def dispatch_layout(
    topk_idx: Array, num_experts: int, num_ranks: int, ranks_per_node: int = 8
) -> DispatchLayout:
    """Counts and token-in-rank of `topk_idx` [T, K] (int32 or int64, -1 = no expert)."""
    idx = _view(topk_idx, "topk_idx", 2, "int32", "int64")
    num_nodes = _ceil_div(num_ranks, ranks_per_node)
    layout = DispatchLayout(
        num_tokens_per_rank=torch.empty(max(num_ranks, 0), dtype=torch.int32, device="cpu"),
        num_tokens_per_node=torch.empty(num_nodes, dtype=torch.int32, device="cpu"),
        num_tokens_per_expert=torch.empty(max(num_experts, 0), dtype=torch.int32, device="cpu"),
        is_token_in_rank=torch.empty((len(idx), max(num_ranks, 0)), dtype=torch.bool, device="cpu"),
    )
    assert layout.num_tokens_per_node is not None
    _core.dispatch_layout(
        idx,
        num_experts,
        num_ranks,
        ranks_per_node,
        layout.num_tokens_per_rank.numpy(),
        layout.num_tokens_per_node.numpy(),
        layout.num_tokens_per_expert.numpy(),
        layout.is_token_in_rank.numpy(),
    )
    if num_nodes > 1:
        return layout
    return DispatchLayout(
        layout.num_tokens_per_rank, None, layout.num_tokens_per_expert, layout.is_token_in_rank
    )


@checked
def received_topk(topk_idx: Array, num_experts: int, num_ranks: int, rank: int) -> Tensor:
    """`topk_idx` [.., K] as `rank` sees it: the index among its own experts, or -1. Same dtype."""
    idx = _view(topk_idx, "topk_idx", 0, "int32", "int64")
    local = np.empty_like(idx)
    _core.local_topk(idx, num_experts, num_ranks, rank, local)
    return torch.from_numpy(local)


@checked
def rank_masks(topk_idx: Array, num_experts: int, num_ranks: int) -> Tensor:
    """The distinct ranks of each token as the bits of an int64 [T]; at most 64 ranks."""
    idx = _view(topk_idx, "topk_idx", 2, "int32", "int64")
    masks = np.empty(len(idx), np.int64)
    _core.rank_masks(idx, num_experts, num_ranks, masks)
    return torch.from_numpy(masks)


# ---- final rows of a dispatch: ascending (source rank, source token)


class FirstRows(NamedTuple):
    """First rows of each source at each receiver, and how many rows each receives."""

    first_row: Tensor  # [R, R] int64: [s, r] is the first row of source s at rank r
    num_received: Tensor  # [R] int64


@checked
def first_rows(counts: Array) -> FirstRows:
    """From the counts [R, R] int32 that all ranks exchange: counts[s, r] tokens go from s to r."""
    matrix = _view(counts, "counts", 2, "int32")
    num_ranks = len(matrix)
    rows, received = np.empty((num_ranks, num_ranks), np.int64), np.empty(num_ranks, np.int64)
    _core.first_rows(matrix, rows, received)
    return FirstRows(torch.from_numpy(rows), torch.from_numpy(received))


@checked
def send_rows(is_token_in_rank: Array, first_row: Array, num_parts: int = 1) -> Tensor:
    """Final row [T, R] int64 of each token in each receiver's output; -1 where it is not sent.

    `first_row` [R] int64 is this source's line of `first_rows`. `num_parts` ranges of tokens are counted and
    numbered apart, as the blocks of a kernel do it; the result is the same for any.
    """
    table = _view(is_token_in_rank, "is_token_in_rank", 2, "bool")
    rows = np.empty(table.shape, np.int64)
    _core.send_rows(table, _view(first_row, "first_row", 1, "int64"), num_parts, rows)
    return torch.from_numpy(rows)


class ReceivedRows(NamedTuple):
    """Source of each of a receiver's rows."""

    src_rank: Tensor  # [N] int32
    src_token: Tensor  # [N] int32


@checked
def receive_rows(is_token_in_rank: Sequence[Array], rank: int) -> ReceivedRows:
    """The rows `rank` receives, from every source's is_token_in_rank [T_s, R] bool."""
    tables = [_view(table, "is_token_in_rank", 2, "bool") for table in is_token_in_rank]
    if not 0 <= rank < len(tables):
        raise ValueError(f"rank: got {rank}; expected one of the {len(tables)} tables' ranks")
    for table in tables:
        if table.ndim != 2 or table.shape[1] != len(tables):
            raise ValueError(f"is_token_in_rank: got {table.shape}; expected [T, {len(tables)}]")
    num_rows = sum(int(np.count_nonzero(table[:, rank])) for table in tables)
    src_rank, src_token = np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
    _core.receive_rows(tables, rank, src_rank, src_token)
    return ReceivedRows(torch.from_numpy(src_rank), torch.from_numpy(src_token))


@_counted
def sources_of_rows(first_row: Array, num_rows: int) -> Tensor:
    """Source rank [N] int32 of a receiver's rows; `first_row` [R] int64: where its sources begin."""
    sources = np.empty(check_int("num_rows", num_rows, 0), np.int32)
    _core.sources_of_rows(_view(first_row, "first_row", 1, "int64"), sources)
    return torch.from_numpy(sources)


# ---- expanded rows: one per (received row, k), grouped by expert


class ExpandedLayout(NamedTuple):
    """Expert l has rows [begin[l], end[l]); what lies between end[l] and begin[l + 1] is padding."""

    row: Tensor  # [N, K] int64, -1 where the entry is -1
    begin: Tensor  # [L] int64, multiples of the alignment
    end: Tensor  # [L] int64
    num_rows: int  # padding included


@_counted
def expanded_layout(
    recv_topk_idx: Array, num_local_experts: int, alignment: int = 1, num_parts: int = 1
) -> ExpandedLayout:
    """Rows of a grouped GEMM: inside an expert by received row, then by k.

    `recv_topk_idx` [N, K] holds local experts or -1. `num_parts` as in `send_rows`.
    """
    idx = _view(recv_topk_idx, "recv_topk_idx", 2, "int32", "int64")
    row = np.empty(idx.shape, np.int64)
    num_local_experts = check_int("num_local_experts", num_local_experts, 0)
    begin, end = np.empty(num_local_experts, np.int64), np.empty(num_local_experts, np.int64)
    num_rows = _core.expanded_layout(idx, alignment, num_parts, begin, end, row)
    return ExpandedLayout(torch.from_numpy(row), torch.from_numpy(begin), torch.from_numpy(end), num_rows)


# ---- low latency: one row per distinct (token, expert), packed per expert in [L, R * M, H]


@_counted
def low_latency_counts(topk_idx: Array, num_experts: int, num_ranks: int) -> Tensor:
    """Rows [E] int32 that `topk_idx` [T, K] makes at each expert; duplicates inside a token share one."""
    idx = _view(topk_idx, "topk_idx", 2, "int32", "int64")
    counts = np.empty(max(num_experts, 0), np.int32)
    _core.low_latency_counts(idx, num_experts, num_ranks, counts)
    return torch.from_numpy(counts)


class LowLatencyRanges(NamedTuple):
    """Ranges of an expert's rows, by source."""

    layout_range: Tensor  # [L, R] int64: (first row << 32) | rows
    recv_count: Tensor  # [L] int32


@checked
def low_latency_ranges(rows_per_expert: Array, rank: int) -> LowLatencyRanges:
    """Of `rank`, from all sources' `low_latency_counts` [R, E]."""
    counts = _view(rows_per_expert, "rows_per_expert", 2, "int32")
    num_local_experts = counts.shape[1] // max(counts.shape[0], 1)
    layout_range = np.empty((num_local_experts, counts.shape[0]), np.int64)
    recv_count = np.empty(num_local_experts, np.int32)
    _core.low_latency_ranges(counts, rank, layout_range, recv_count)
    return LowLatencyRanges(torch.from_numpy(layout_range), torch.from_numpy(recv_count))


@checked
def low_latency_send_rows(
    topk_idx: Array, rows_per_expert: Array, source: int, num_max_tokens: int, num_parts: int = 1
) -> Tensor:
    """Row, in the flattened [L * R * M, H] of its expert's rank, of each entry of the source's tokens.

    [T, K] int64, -1 where there is no expert. `rows_per_expert` [R, E] as in `low_latency_ranges`.
    """
    idx = _view(topk_idx, "topk_idx", 2, "int32", "int64")
    counts = _view(rows_per_expert, "rows_per_expert", 2, "int32")
    rows = np.empty(idx.shape, np.int64)
    _core.low_latency_send_rows(idx, counts, source, num_max_tokens, num_parts, rows)
    return torch.from_numpy(rows)


# ---- two levels: a token crosses to a node once, and is spread there


@checked
def forwarding_rank(source: int, node: int, num_ranks: int, ranks_per_node: int) -> int:
    """The rank of `node` that takes in what `source` sends there: the one with the same local index."""
    rank: int = _core.forwarding_rank(source, node, num_ranks, ranks_per_node)
    return rank


@checked
def living_gateway(source: int, node: int, ranks_per_node: int, alive: Array) -> int:
    """The same among the ranks that are `alive` [R] bool: the next one, cyclically; -1 if none of them is."""
    rank: int = _core.living_gateway(source, node, ranks_per_node, _view(alive, "alive", 1, "bool"))
    return rank


class NodeRoutes(NamedTuple):
    """Rows that one source sends to each node."""

    local_ranks: Tensor  # [T, D] int64: bit j is set where the token goes to the node's j-th rank
    position: Tensor  # [T, D] int32: the token's place among those that go to the node, or -1
    num_tokens: Tensor  # [D] int32


@checked
def node_routes(is_token_in_rank: Array, ranks_per_node: int, num_parts: int = 1) -> NodeRoutes:
    """From a source's is_token_in_rank [T, R] bool; at most 64 ranks in a node."""
    table = _view(is_token_in_rank, "is_token_in_rank", 2, "bool")
    num_nodes = _ceil_div(table.shape[1], ranks_per_node)
    local_ranks = np.empty((len(table), num_nodes), np.int64)
    position, counts = np.empty((len(table), num_nodes), np.int32), np.empty(num_nodes, np.int32)
    _core.node_positions(table, ranks_per_node, num_parts, local_ranks, position, counts)
    return NodeRoutes(torch.from_numpy(local_ranks), torch.from_numpy(position), torch.from_numpy(counts))


@checked
def forwarded_rows(local_ranks: Array, first_row: Array) -> Tensor:
    """Final rows [n, P] int64 of n tokens that a source sent to a node of P ranks; -1 where a rank gets none.

    `local_ranks` [n] int64: the tokens' bits, in the order sent. `first_row` [P] int64: the source's first
    row at each of those ranks.
    """
    masks = _view(local_ranks, "local_ranks", 1, "int64")
    first = _view(first_row, "first_row", 1, "int64")
    rows = np.empty((len(masks), len(first)), np.int64)
    _core.forwarded_rows(masks, first, rows)
    return torch.from_numpy(rows)


# ---- capacities and sizes


@checked
def max_rows_received(num_ranks: int, num_max_tokens: int) -> int:
    """Rows a rank can receive in one dispatch: R * M."""
    rows: int = _core.max_rows_received(num_ranks, num_max_tokens)
    return rows


@checked
def max_rows_expanded(
    num_ranks: int,
    num_max_tokens: int,
    num_topk: int,
    num_local_experts: int,
    alignment: int = 1,
    has_duplicates: bool = True,
) -> int:
    """Rows the expanded layout can take, padding included.

    A token has at most min(K, L) rows if it never names an expert twice (`has_duplicates=False`), else K.
    """
    rows: int = _core.max_rows_expanded(
        num_ranks, num_max_tokens, num_topk, num_local_experts, alignment, has_duplicates
    )
    return rows


@checked
def receive_slot_bytes(
    num_rows: int, row_bytes: int, num_scales: int = 0, num_topk: int = 0, index_bytes: int = 8
) -> int:
    """Bytes of symmetric memory that hold `num_rows` received rows of a dispatch, with all that comes along.

    Per row: `row_bytes` of x, its source token, `num_scales` scales of 4 bytes, `num_topk` indices of
    `index_bytes` and as many weights of 4. `max_rows_received` rows never run short.
    """
    size: int = _core.receive_slot_bytes(num_rows, row_bytes, num_scales, num_topk, index_bytes)
    return size


@checked
def low_latency_rdma_size_hint(
    num_max_tokens: int, hidden: int, num_ranks: int, num_experts: int, num_topk: int = _core.MAX_TOPK
) -> int:
    """Bytes of the fixed-slot buffer: two epochs of R*M messages in and of M*K rows back.

    Unlike a slot per (expert, token) this does not grow with `num_experts`, which clients pass all the same.
    Without `num_topk` the largest top-k is assumed.
    """
    if num_experts <= 0 or num_ranks <= 0 or num_experts % num_ranks:
        raise ValueError(f"num_experts: got {num_experts}; expected a multiple of num_ranks = {num_ranks}")
    size: int = LowLatencyBuffer(num_ranks, num_max_tokens, hidden, num_topk).total_bytes()
    return size


@checked
def low_latency_nic_bytes(
    num_max_tokens: int,
    hidden: int,
    num_ranks: int,
    num_experts: int,
    ranks_per_domain: int,
    num_topk: int = _core.MAX_TOPK,
    returns_entries: bool = False,
    has_gateways: bool = False,
) -> int:
    """Bytes of a rank's memory for its NIC in low-latency calls between domains; 0 where there is one domain.

    The same on all ranks: of one in the smallest domain. Without `num_topk` the largest top-k is assumed.
    returns_entries: for the exact reduction, in which a row goes back for each top-k entry. has_gateways: for
    the one by domains, all of one size.
    """
    size: int = _core.low_latency_nic_bytes(
        *(num_ranks, ranks_per_domain, num_experts, num_max_tokens, num_topk, hidden),
        *(returns_entries, has_gateways),
    )
    return size


# ---- crossings between domains: windows of tokens, chunks of records, two halves of a buffer


class WindowTurn(NamedTuple):
    """A window's turn in a buffer, by its number among all that went from one rank to another."""

    half: int
    arrivals: int  # each chunk's word says this once the chunk is here
    credit: int  # the sender's credit for this half must say this before it writes


@checked
def window_turn(number: int) -> WindowTurn:
    """The turn of the window with this number, from 0."""
    return WindowTurn(*_core.window_turn(number))


@_counted
def windows(num_tokens: int, window: int) -> list[tuple[int, int]]:
    """First token and the one past the last of each window of a call."""
    return [_core.window_tokens(num_tokens, window, w) for w in range(_core.num_windows(num_tokens, window))]


@_counted
def records_in_chunks(num_records: int, window: int) -> list[int]:
    """Records in each of a window's chunks, of a window that has `num_records`."""
    num_chunks = window // _core.CHUNK_RECORDS
    return [_core.records_in_chunk(num_records, chunk) for chunk in range(num_chunks)]


@checked
def chunk_of_record(position: int) -> int:
    """The chunk of the record with this position among the window's."""
    chunk: int = _core.chunk_of_record(position)
    return chunk


@checked
def default_window(num_domains: int) -> int:
    """Tokens of a window between so many domains."""
    tokens: int = _core.default_window(num_domains)
    return tokens


@checked
def peer_of_domain(domain: int, own: int) -> int:
    """The number of another domain among a rank's peers: the other domains, ascending."""
    peer: int = _core.peer_of_domain(domain, own)
    return peer


@checked
def domain_of_peer(peer: int, own: int) -> int:
    """The inverse of `peer_of_domain`."""
    domain: int = _core.domain_of_peer(peer, own)
    return domain
