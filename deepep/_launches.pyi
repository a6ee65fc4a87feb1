"""Launches and their arguments, the same in deepep._cuda and deepep._emulator. A stub alone, of no module.

Addresses, streams: integers, 0 is null.
"""

from typing import Protocol

class Blocks(Protocol):
    """Blocks of a launch by role; the two are disjoint, or both all blocks. Not in the module."""

    @property
    def total(self) -> int: ...
    @property
    def remote(self) -> int: ...
    @property
    def local(self) -> int: ...

class RowCounts:
    """Rows from each rank to each, [R, R] row by row."""

    def __init__(self, counts: list[int]) -> None: ...
    def tolist(self) -> list[int]: ...

class ExpandedRows:
    """The expanded layout that a dispatch by top-k spreads rows to: addresses, and how it is laid out."""

    def __init__(
        self,
        *,
        places: int,
        recv_places: int,
        x: int,
        scales: int,
        weights: int,
        slots: int,
        expert_counts: int,
        overflow: int,
        origins: int,
        tiles: int,
        capacity: int,
        alignment: int,
        column_major: bool,
        zero_padding: bool,
    ) -> None: ...

class CachedDispatch:
    """What the cached dispatches along one handle have in common: `Domain.prepare_cached` makes it."""

class FaultRecord:
    """csrc/kernels/common/args.hpp: phase is bits, missing has a bit for each rank."""

    @property
    def operation(self) -> int: ...
    @property
    def phase(self) -> int: ...
    @property
    def missing(self) -> int: ...
    @property
    def expected(self) -> int: ...
    @property
    def seen(self) -> int: ...

class TwoLevelShape:
    """Sizes of a group of several domains (csrc/host/two_level.hpp). live: bit r of rank r."""

    def __init__(
        self,
        *,
        num_ranks: int,
        ranks_per_domain: int,
        live: int,
        max_local_experts: int,
        max_blocks: int,
        window: int,
        row_bytes: int,
        num_scales: int,
        num_topk: int,
    ) -> None: ...
    @property
    def heap_bytes(self) -> int: ...
    @property
    def words_end(self) -> int: ...
    @property
    def remote_bytes(self) -> int: ...
    @property
    def num_put_orders(self) -> int: ...
    @property
    def max_open_puts(self) -> int: ...
    def remote_words(self, before: int) -> list[tuple[int, int]]: ...
    def heap_words(self, before: int) -> list[tuple[int, int]]: ...

class FarShape:
    """Sizes of low-latency memory between domains (csrc/host/low_latency_far.hpp)."""

    def __init__(
        self,
        *,
        num_ranks: int,
        ranks_per_domain: int,
        max_local_experts: int,
        max_tokens: int,
        max_topk: int,
        max_row_bytes: int,
        entry_stretches: int = 0,
        has_gateways: bool = False,
    ) -> None: ...
    @property
    def remote_bytes(self) -> int: ...
    @property
    def control_bytes(self) -> int: ...
    @property
    def max_open_puts(self) -> int: ...
    @property
    def num_put_orders(self) -> int: ...
    def signals(self, before: int) -> list[tuple[int, int]]: ...

class HighThroughputCalls:
    """Calls of a view of ranks, of one domain or several."""

    def dispatch(
        self,
        *,
        blocks: Blocks,
        num_tokens: int,
        num_topk: int,
        num_local_experts: int,
        num_scales: int,
        index_bytes: int,
        row_bytes: int,
        x: int,
        scales: int,
        scale_strides: tuple[int, ...],
        topk_idx: int,
        topk_weights: int,
        is_token_in_rank: int,
        tokens_per_rank: int,
        tokens_per_expert: int,
        counts: int,
        send_row: int,
        recv_x: int,
        recv_source: int,
        recv_scales: int,
        recv_topk_idx: int,
        recv_topk_weights: int,
        capacity: int,
        num_worst_tokens: int,
        host_counts: int,
        ticket: int,
        stream: int = 0,
        payload: int = 0,
    ) -> None: ...
    def prepare_cached(
        self,
        *,
        blocks: Blocks,
        num_tokens: int,
        num_scales: int,
        row_bytes: int,
        scale_strides: tuple[int, ...],
        counts: int,
        send_row: int,
        capacity: int,
        payload: int = 0,
    ) -> CachedDispatch: ...
    def dispatch_cached(
        self, prepared: CachedDispatch, x: int, scales: int, recv_x: int, recv_scales: int, stream: int = 0
    ) -> None: ...
    def combine(
        self,
        *,
        blocks: Blocks,
        num_tokens: int,
        num_topk: int,
        row_bytes: int,
        x: int,
        topk_weights: int,
        bias_0: int,
        bias_1: int,
        counts: int,
        send_row: int,
        out: int,
        out_weights: int,
        known: RowCounts | None = None,
        ce_chunks: int = 0,
        ce_shrink: int = 100,
        stream: int = 0,
        source_token: int = 0,
        num_entries: int = 0,
        slots: int = 0,
        factors: int = 0,
    ) -> None: ...
    def layout(
        self,
        *,
        num_blocks: int,
        num_ranks: int,
        num_experts: int,
        ranks_per_domain: int,
        num_topk: int,
        index_bytes: int,
        num_tokens: int,
        topk_idx: int,
        tokens_per_rank: int,
        tokens_per_domain: int,
        tokens_per_expert: int,
        is_token_in_rank: int,
        workspace: int,
        stream: int = 0,
    ) -> None: ...
    def refuse_dispatch(self, counts: int, stream: int = 0) -> None: ...
    def refuse_combine(self, counts: int, stream: int = 0) -> None: ...
    def take_fault(self, stream: int = 0) -> FaultRecord | None: ...

class DomainCalls(HighThroughputCalls):
    """Calls of a view of one domain besides."""

    def dispatch_topk(
        self,
        *,
        blocks: Blocks,
        num_tokens: int,
        num_topk: int,
        num_local_experts: int,
        num_scales: int,
        index_bytes: int,
        row_bytes: int,
        x: int,
        scales: int,
        scale_strides: tuple[int, ...],
        topk_idx: int,
        topk_weights: int,
        is_token_in_rank: int,
        alone_tokens: int,
        counts: int,
        send_row: int,
        recv_x: int,
        recv_source: int,
        recv_scales: int,
        recv_topk_idx: int,
        recv_topk_weights: int,
        capacity: int,
        num_worst_tokens: int,
        host_counts: int,
        ticket: int,
        stream: int = 0,
        payload: int = 0,
        expanded: ExpandedRows | None = None,
    ) -> None: ...
    def barrier(self, stream: int = 0) -> None: ...
    def ring_send(
        self,
        *,
        peer: int,
        slot: int,
        tensor: int,
        num_bytes: int,
        dtype: int,
        begin: int,
        num_slots: int,
        slot_bytes: int,
        stream: int = 0,
    ) -> None: ...
    def ring_receive(
        self,
        *,
        peer: int,
        slot: int,
        tensor: int,
        num_bytes: int,
        dtype: int,
        begin: int,
        num_slots: int,
        slot_bytes: int,
        stream: int = 0,
    ) -> None: ...
    def set_live(self, live: int) -> None: ...
    def set_waits(self, waits: int) -> None: ...
    def open_lines(self, words: int, num_words: int) -> None: ...
    def close_lines(self) -> list[tuple[str, int, int, int]]: ...

class LowLatencyCalls:
    """Calls of a view of ranks in low latency, of one domain or several."""

    def dispatch(
        self,
        *,
        num_blocks: int,
        halves: int,
        num_tokens: int,
        max_tokens: int,
        num_topk: int,
        num_local_experts: int,
        hidden: int,
        index_bytes: int,
        x: int,
        topk_idx: int,
        topk_weights: int,
        identity: int,
        sent: int,
        came: int,
        routes: int,
        weights_travel: bool,
        casts: bool,
        rounds_scales: bool,
        packs_scales: bool,
        recv_x: int,
        recv_scales: int,
        recv_count: int,
        recv_source: int,
        recv_range: int,
        waits: int = 0,
        stream: int = 0,
        refused: bool = False,
        elsewhere: bool = False,
    ) -> None: ...
    def combine(
        self,
        *,
        num_blocks: int,
        halves: int,
        num_tokens: int,
        max_tokens: int,
        num_topk: int,
        num_local_experts: int,
        hidden: int,
        index_bytes: int,
        x: int,
        topk_idx: int,
        topk_weights: int,
        identity: int,
        sent: int,
        came: int,
        routes: int,
        weights_travelled: bool,
        returned: int,
        out: int,
        waits: int = 0,
        stream: int = 0,
        refused: bool = False,
        elsewhere: bool = False,
    ) -> None: ...
    def set_live(self, live: int) -> None: ...
