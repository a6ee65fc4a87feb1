"""Arguments and results of operations on emulated ranks: plain data, shared by all who run the emulator.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens of a rank, H hidden size, N rows received, P scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from deepep import _emulator

TOO_MANY_ROWS: int = _emulator.TOO_MANY_ROWS
DISAGREEMENT: int = _emulator.DISAGREEMENT


@dataclass(frozen=True)
class Gpu:
    """The shape of each rank's GPU, and how a launch uses it.

    num_blocks: blocks of a launch, of which push_blocks write to other ranks and local_blocks work on rows
    that stay. reduce_blocks: of a combine, those that sum, if they are not local_blocks. num_sms: how many
    blocks are resident together; 0 is all. timeout: seconds a kernel waits. calls_before: of each operation,
    as the ranks count them, modulo 2^32. ce_chunks: into so many parts the copy engine cuts the rows that
    a combine returns, each engine_shrink percent of the one before; 0: SMs return them. alone_tokens: up to
    so many tokens, blocks of a dispatch by top-k count for themselves; else together. window: tokens of a
    window between domains.
    """

    num_blocks: int = 2
    num_threads: int = 128
    push_blocks: int = 1
    local_blocks: int = 1
    num_sms: int = 0
    timeout: float = 1.0
    reduce_blocks: int = 0
    calls_before: int = 0
    ce_chunks: int = 0
    engine_shrink: int = 100
    alone_tokens: int = 64
    window: int = 16

    def num_actors(self, num_ranks: int) -> int:
        """Ranks and the copy engines that are used, which are counted behind them."""
        return num_ranks * 2 if self.ce_chunks else num_ranks


@dataclass(frozen=True)
class KernelFault:
    """A kernel's fault record (csrc/kernels/common/args.hpp). phase: bits; waited_on: ranks."""

    operation: int
    phase: int
    waited_on: tuple[int, ...]
    expected: int
    seen: int


class HostCounts(NamedTuple):
    """The counts that a dispatch posts to the host (csrc/kernels/common/args.hpp).

    table: R x R rows from each rank to each, row by row. per_expert: L counts, not aligned.
    """

    phase: int
    num_rows: int
    max_rows: int
    num_returned: int
    table: list[int]
    per_expert: list[int]


class LayoutAt(NamedTuple):
    """Addresses of a rank's dispatch layout: int32 [R], [D] (or 0), [E], and bytes [T, R]."""

    per_rank: int
    per_domain: int
    per_expert: int
    in_rank: int


class PlanAt(NamedTuple):
    """Addresses of a handle's arrays: counts [R, R] and send_row [T, R], int32."""

    counts: int
    send_row: int


@dataclass(frozen=True)
class Expansion:
    """The expanded layout that a dispatch by top-k spreads rows to: one for each entry of a local expert.

    capacity: rows. alignment: experts begin at multiples of it. column_major: of scales. spreads: False
    leaves rows as they come, as for a rank that spreads them in another way.
    """

    capacity: int
    alignment: int = 1
    column_major: bool = False
    zero_padding: bool = False
    spreads: bool = True


class ExpandedAt(NamedTuple):
    """Addresses of what is filled: rows, scales (or 0), weights, slots, entries of each expert, overflow; and
    what is kept of scales by columns: origins of rows, and rows of each tile.
    """

    x: int
    scales: int
    weights: int
    slots: int
    counts: int
    overflow: int
    origins: int
    tiles: int


@dataclass(frozen=True)
class ExpandedContents:
    """The expanded rows of a dispatch."""

    x: Tensor  # [X, H]
    scales: Tensor | None  # [X, P]
    weights: Tensor  # [X]
    slots: Tensor  # [N, K] int64
    counts: Tensor  # [L] int32
    overflow: bool


@dataclass(frozen=True)
class DispatchCall:
    """One rank's arguments. capacity: rows of its slot. live: the ranks that take part.

    num_worst_tokens: 0 lets the host wait for the counts, unless the call is cached or refused. payload: a
    number for what rows are made of.
    """

    x: Tensor  # [T, H]
    num_local_experts: int
    capacity: int
    live: tuple[int, ...]
    scales: Tensor | None = None  # [T, P], 4-byte elements, any strides
    topk_idx: Tensor | None = None  # [T, K]
    topk_weights: Tensor | None = None  # [T, K] float32
    num_worst_tokens: int = 0
    cached: bool = False
    refused: bool = False  # only post to the others that this rank takes no part
    by_topk: bool = False  # where tokens go is found out from topk_idx
    payload: int = 0
    expansion: Expansion | None = None  # with by_topk

    @property
    def posts_counts(self) -> bool:
        """True if the host waits for the counts."""
        return not self.cached and not self.refused and self.num_worst_tokens == 0

    @property
    def slot(self) -> _emulator.SlotLayout:
        """Offsets of the arrays behind the rows, and their end."""
        return _emulator.SlotLayout(
            capacity=self.capacity,
            row_bytes=self.x.shape[1] * self.x.element_size(),
            num_scales=0 if self.scales is None else self.scales.shape[1],
            num_topk=0 if self.topk_idx is None else self.topk_idx.shape[1],
            index_bytes=8 if self.topk_idx is None else self.topk_idx.element_size(),
        )


@dataclass(frozen=True)
class CombineCall:
    """One rank's arguments. x: rows [N, H] bf16, or the address of those in a slot; topk_weights likewise."""

    x: Tensor | int
    hidden: int
    num_tokens: int  # T
    live: tuple[int, ...]
    num_topk: int = 0
    topk_weights: Tensor | int = 0  # [N, K] float32
    biases: tuple[Tensor, ...] = ()  # [T, H] bf16
    refused: bool = False  # only post to the others that this rank takes no part
    source_token: Tensor | int = 0  # [N] int32 or its address: between domains, the token that each row is
    slots: Tensor | None = None  # [N, K] int64: x [X, H] and topk_weights [X] are of expanded rows
    factors: Tensor | None = None  # [N, K] float32: of those


@dataclass(frozen=True)
class SlotContents:
    """Rows read out of a slot."""

    x: Tensor  # [N, H]
    source: Tensor | None  # [N] int32; None of a cached dispatch
    scales: Tensor | None  # [N, P]
    topk_idx: Tensor | None  # [N, K], or [num_worst_tokens, K]
    topk_weights: Tensor | None  # [N, K]
