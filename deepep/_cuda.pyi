"""deepep._cuda (csrc/bindings/cuda.cpp): the kernels' launches. Addresses, streams: integers, 0 is null."""

from deepep._launches import Blocks as Blocks
from deepep._launches import CachedDispatch as CachedDispatch
from deepep._launches import DomainCalls, HighThroughputCalls, LowLatencyCalls
from deepep._launches import ExpandedRows as ExpandedRows
from deepep._launches import FarShape as FarShape
from deepep._launches import FaultRecord as FaultRecord
from deepep._launches import RowCounts as RowCounts
from deepep._launches import TwoLevelShape as TwoLevelShape

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

class Domain(DomainCalls):
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
    def follow(self, before: int, stream: int) -> None: ...
    def wait(self) -> None: ...
    def is_idle(self) -> bool: ...
    def has_fault(self) -> bool: ...
    def was_captured(self) -> bool: ...
    def has_copies_under_way(self) -> bool: ...

class PutQueue:
    """A rank's queue of puts (csrc/device/put_queue.hpp), in memory of its device that is zero at first.
    num_orders: a power of two, with PUT_ORDER_BYTES each.
    """

    def __init__(self, *, orders: int, num_orders: int, state: int) -> None: ...

class VirtualLaunches:
    """Launches that many virtual ranks of a GPU have gathered (csrc/virtual_ranks/gathered.hpp)."""

    def __init__(self) -> None: ...
    def launch(self, stream: int) -> None: ...

class TwoLevelDomain(HighThroughputCalls):
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
    def follow(self, before: int, stream: int) -> None: ...
    def wait(self) -> None: ...
    def is_idle(self) -> bool: ...
    def was_captured(self) -> bool: ...
    def has_copies_under_way(self) -> bool: ...
    def has_fault(self) -> bool: ...

class LowLatencyDomain(LowLatencyCalls):
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

class FarLowLatencyDomain(LowLatencyCalls):
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
