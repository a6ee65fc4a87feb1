"""deepep._cuda (csrc/bindings/cuda.cpp): the kernels' launches. Addresses, streams: integers, 0 is null."""

from typing import Protocol

ARCHS: str
STATE_BYTES: int
MASKED_OFFSET: int
FAULT_BYTES: int
MAX_RANKS: int
NUM_WAITS: int
LINE_WORDS: int
LINE_TIME_BITS: int
NUM_LINE_STEPS: int
MAX_COUNTED_TOKENS: int
MAX_NUMBERED_EXPERTS: int
CE_COMPLETED: int
ALL_REDUCE_STATE_WORDS: int
ALL_REDUCE_MISSING: int
EXCHANGE_STATE_WORDS: int
EXCHANGE_MISSING: int
MAX_GROUP_RANKS: int
MAX_DOMAINS: int
RAIL_STATE_BYTES: int
FAR_STATE_BYTES: int
FAR_COUNTERS: int
RAIL_COUNTERS: int
PUT_ORDER_BYTES: int
PUT_QUEUE_STATE_BYTES: int

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

class Counts:
    """What a dispatch posts to the host while it runs.

    phase: 0, or why it stopped. num_rows: for this rank; max_rows: the most of any rank. num_returned: rows
    that combine brings back. table: rows from each rank to each. per_expert: top-k entries of local experts.
    """

    @property
    def phase(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def num_returned(self) -> int: ...
    @property
    def table(self) -> RowCounts: ...
    @property
    def per_expert(self) -> list[int]: ...

class Turns:
    """The order of a rank's operations (csrc/host/turns.hpp), for all its domains: they run in the order of
    their launches, on whatever streams. On the device that is current when it is made.
    """

    def __init__(self) -> None: ...
    def follow(self, before: int, stream: int) -> None: ...
    def wait(self) -> None: ...
    def is_idle(self) -> bool: ...

class Domain:
    """One rank's view of its NVLink domain (csrc/host/domain.hpp). All memory is the caller's to keep alive.

    `stream`: a cudaStream_t.
    """

    def __init__(
        self,
        *,
        rank: int,
        heaps: list[int],
        max_local_experts: int,
        max_blocks: int,
        staging_bytes: int,
        state: int,
        fault: int,
        counting: int = 0,
        timeout_seconds: float,
        turns: Turns,
    ) -> None: ...
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
    def set_live(self, live: int) -> None: ...
    def set_waits(self, waits: int) -> None: ...
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
    def open_lines(self, words: int, num_words: int) -> None: ...
    def close_lines(self) -> list[tuple[str, int, int, int]]: ...
    def barrier(self, stream: int = 0) -> None: ...
    def take_fault(self, stream: int = 0) -> FaultRecord | None: ...
    def follow(self, before: int, stream: int) -> None: ...
    def wait(self) -> None: ...
    def is_idle(self) -> bool: ...
    def has_fault(self) -> bool: ...
    def was_captured(self) -> bool: ...
    def has_copies_under_way(self) -> bool: ...

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

class PutQueue:
    """A rank's queue of puts (csrc/device/put_queue.hpp), in memory of its device that is zero at first.
    num_orders: a power of two, with PUT_ORDER_BYTES each.
    """

    def __init__(self, *, orders: int, num_orders: int, state: int) -> None: ...

class VirtualLaunches:
    """Launches that many virtual ranks of a GPU have gathered (csrc/virtual_ranks/gathered.hpp)."""

    def __init__(self) -> None: ...
    def launch(self, stream: int) -> None: ...

class TwoLevelDomain:
    """One rank's view of a group of several domains (csrc/host/two_level.hpp). serve: a ServePuts function
    (csrc/put_server/service.hpp), 0 for none; pes: by rank, what it calls that rank's process. gathered:
    where its launches go instead of a stream.
    """

    def __init__(
        self,
        *,
        shape: TwoLevelShape,
        rank: int,
        heaps: list[int],
        remote: int,
        puts: PutQueue,
        serve: int = 0,
        pes: list[int] = ...,
        before: int,
        max_tokens: int,
        state: int,
        rail_state: int,
        fault: int,
        timeout_seconds: float,
        turns: Turns,
        gathered: VirtualLaunches | None = None,
    ) -> None: ...
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
    def follow(self, before: int, stream: int) -> None: ...
    def wait(self) -> None: ...
    def is_idle(self) -> bool: ...
    def was_captured(self) -> bool: ...
    def has_copies_under_way(self) -> bool: ...
    def has_fault(self) -> bool: ...

class LowLatencyDomain:
    """The same of the low-latency operations (csrc/host/low_latency.hpp).

    halves: 0 both, 1 the send, 2 the receive. refused: only post to the others that this rank takes no part;
    elsewhere: because the call is made by other means, on all ranks.
    """

    def __init__(
        self,
        *,
        rank: int,
        heaps: list[int],
        max_local_experts: int,
        max_tokens: int,
        max_topk: int,
        max_row_bytes: int,
        entry_stretches: int,
        state: int,
        fault: int,
        timeout_seconds: float,
        shrinks: bool = False,
        turns: Turns,
    ) -> None: ...
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
    def open_lines(self, words: int, num_words: int) -> None: ...
    def close_lines(self) -> list[tuple[str, int, int, int]]: ...
    def masked(self) -> int:
        """Ranks that kernels have masked, as bits, as far as the host has seen."""

    def take_fault(self, stream: int = 0) -> FaultRecord | None: ...
    def follow(self, before: int, stream: int) -> None: ...
    def wait(self) -> None: ...
    def is_idle(self) -> bool: ...
    def has_fault(self) -> bool: ...
    def was_captured(self) -> bool: ...

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

class FarLowLatencyDomain:
    """The same of ranks in several domains (csrc/host/low_latency_far.hpp). serve, pes: TwoLevelDomain's."""

    def __init__(
        self,
        *,
        shape: FarShape,
        rank: int,
        heaps: list[int],
        remote: int,
        far_state: int,
        puts: PutQueue,
        serve: int = 0,
        pes: list[int] = ...,
        state: int,
        fault: int,
        timeout_seconds: float,
        turns: Turns,
    ) -> None: ...
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
    def masked(self) -> int:
        """Ranks that kernels have masked, as bits, as far as the host has seen."""

    def take_fault(self, stream: int = 0) -> FaultRecord | None: ...
    def follow(self, before: int, stream: int) -> None: ...
    def wait(self) -> None: ...
    def is_idle(self) -> bool: ...
    def has_fault(self) -> bool: ...
    def was_captured(self) -> bool: ...

def serve_puts_locally(
    *,
    puts: list[PutQueue],
    remotes: list[int],
    silent_from: list[int],
    timeout_seconds: float,
    delay_seconds: float,
    seed: int,
    stream: int,
) -> None: ...
def low_latency_bytes(
    num_ranks: int,
    max_local_experts: int,
    max_tokens: int,
    max_topk: int,
    max_row_bytes: int,
    entry_stretches: int = 0,
) -> tuple[int, int]: ...
def copy(
    source: int,
    target: int,
    num_bytes: int,
    num_blocks: int,
    stream: int,
    *,
    bulk: bool = False,
    warps: int = 4,
    stages: int = 6,
    stage_bytes: int = 8192,
) -> None: ...
def hold(nanoseconds: int, num_blocks: int, stream: int) -> None:
    """Launches blocks that take an SM each and do nothing for so long, at most ten seconds."""

class Exchange:
    """One rank's part in bare exchanges (csrc/kernels/exchange) of up to pair_bytes between any two ranks.

    heaps: every rank's symmetric memory, of `exchange_bytes`, as mapped here. state: EXCHANGE_STATE_WORDS
    words of the device; word EXCHANGE_MISSING has a bit for each rank that was waited for in vain. All of it
    is zero before the first exchange, and the caller's to keep alive.
    """

    def __init__(
        self, *, rank: int, heaps: list[int], pair_bytes: int, state: int, timeout_seconds: float
    ) -> None: ...
    @property
    def pair_bytes(self) -> int: ...
    def launch(
        self,
        *,
        source: int,
        sent: list[int],
        received: list[int],
        sums: int,
        num_blocks: int,
        stream: int,
    ) -> None: ...

def exchange_bytes(num_ranks: int, pair_bytes: int) -> int: ...

class AllReduce:
    """One rank's part in all-reduces over symmetric memory (csrc/kernels/all_reduce), in which a rank pushes
    up to pair_bytes to another in each of two rounds.

    heaps: every rank's memory, of `all_reduce_bytes`, as mapped here, whose first bytes, as many as
    `all_reduce_control_bytes`, are zero before the first call. state: ALL_REDUCE_STATE_WORDS words of the
    device, zero likewise; word ALL_REDUCE_MISSING, and host_missing in pinned memory, has a bit for each rank
    that was waited for in vain.
    """

    def __init__(
        self,
        *,
        rank: int,
        heaps: list[int],
        pair_bytes: int,
        state: int,
        host_missing: int = 0,
        timeout_seconds: float,
    ) -> None: ...
    @property
    def pair_bytes(self) -> int: ...
    def launch(
        self,
        *,
        tensor: int,
        count: int,
        is_bf16: bool,
        is_oneshot: bool,
        format: str,
        is_fixed: bool,
        divisor: float,
        keys: list[int],
        first_index: int,
        num_blocks: int,
        stream: int,
    ) -> None: ...

def all_reduce_bytes(num_ranks: int, pair_bytes: int) -> int: ...
def all_reduce_control_bytes(num_ranks: int) -> int: ...
def all_reduce_block_bytes(format: str, is_bf16: bool) -> int: ...
def wait_counts(
    host_counts: int, ticket: int, num_ranks: int, num_local_experts: int, timeout_seconds: float
) -> Counts | None: ...
def stream_is_idle(stream: int) -> bool: ...
def counting_bytes(num_ranks: int, max_local_experts: int) -> int: ...
def host_counts_bytes(num_ranks: int, num_local_experts: int) -> int: ...
def ring_bytes(num_slots: int, slot_bytes: int) -> tuple[int, int]: ...
def control_bytes(num_ranks: int, max_local_experts: int, max_blocks: int) -> int: ...
def staging_capacity(area_bytes: int, row_bytes: int, num_topk: int) -> int: ...
def arena_open(base: int, num_bytes: int) -> int: ...
def arena_close(arena: int) -> None: ...
def arena_select(arena: int) -> None: ...
def arena_used(arena: int) -> int: ...
def arena_reserve_tail(arena: int, num_bytes: int) -> int: ...
def arena_returned(arena: int) -> int: ...
def arena_free_returned(arena: int, count: int) -> None: ...
def arena_reserve(arena: int, num_bytes: int) -> int: ...

MAX_ROW_ENTRIES: int
MAX_COUNTED_EXPERTS: int

def sort_pairs(
    *,
    topk_idx: int,
    index_bytes: int,
    num_local_experts: int,
    num_entries: int,
    num_pairs: int,
    pairs: int,
    slots: int,
    ends: int,
    stream: int = 0,
) -> None: ...
def select_topk(
    *, num_tokens: int, num_experts: int, num_topk: int, scores: int, topk_idx: int, stream: int = 0
) -> None: ...
def count_entries(
    *,
    topk_idx: int,
    index_bytes: int,
    num_experts: int,
    num_entries: int,
    load: int,
    stream: int = 0,
) -> None: ...
def spread_rows(
    *,
    num_rows: int,
    row_bytes: int,
    num_topk: int,
    slots: int,
    x: int,
    scales: int = 0,
    out: int,
    stream: int = 0,
) -> None: ...
def cast_rows(*, num_channels: int, x: int, values: int, scales: int, stream: int = 0) -> None: ...
def reduce_rows(
    *,
    num_rows: int,
    row_bytes: int,
    num_topk: int,
    slots: int,
    y: int,
    weights: int,
    out: int,
    stream: int = 0,
) -> None: ...
def weigh_rows(
    *,
    num_rows: int,
    row_bytes: int,
    num_topk: int,
    slots: int,
    grad: int,
    y: int,
    weights: int,
    out: int,
    out_weights: int,
    stream: int = 0,
) -> None: ...
def swiglu(*, num_rows: int, width: int, h: int, out: int, stream: int = 0) -> None: ...
def swiglu_backward(*, num_rows: int, width: int, h: int, grad: int, out: int, stream: int = 0) -> None: ...
