"""deepep._emulator (csrc/bindings/emulator.cpp): the kernels' own source over an emulated machine.

Addresses are the machine's, as integers; 0 is null.
"""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from deepep._launches import Blocks as Blocks
from deepep._launches import CachedDispatch as CachedDispatch
from deepep._launches import DomainCalls, HighThroughputCalls, LowLatencyCalls
from deepep._launches import ExpandedRows as ExpandedRows
from deepep._launches import FarShape as FarShape
from deepep._launches import FaultRecord as FaultRecord
from deepep._launches import RowCounts as RowCounts
from deepep._launches import TwoLevelShape as TwoLevelShape

STATE_BYTES: int
FAULT_BYTES: int
MAX_RANKS: int
NUM_WAITS: int
LINE_WORDS: int
LINE_TIME_BITS: int
NUM_LINE_STEPS: int
MAX_COUNTED_TOKENS: int
MAX_NUMBERED_EXPERTS: int
EPOCHS: int
TOO_MANY_ROWS: int
DISAGREEMENT: int
HOST_COUNTS_WORDS: int
ALL_REDUCE_STATE_WORDS: int
ALL_REDUCE_MISSING: int
EXCHANGE_STATE_WORDS: int
EXCHANGE_MISSING: int

class HostFailure(Exception):
    """A host's own access failed a check: the kind of failure, and the story behind the first line."""

class Kernels:
    @property
    def names(self) -> list[str]: ...

def load_kernels(path: str) -> Kernels: ...
def own_kernels() -> Kernels: ...

class Outcome:
    """Why `Machine.run` returned (csrc/emulator/run/simulation.hpp): done, host, watched or failed."""

    @property
    def status(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def in_time(self) -> bool: ...
    @property
    def words(self) -> list[int]: ...
    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def switches(self) -> int: ...
    @property
    def now_ns(self) -> int: ...

class MachineFault:
    """A rank that stops at a step, or after its n-th ordered write; for good where pause_ns is 0."""

    def __init__(
        self,
        *,
        rank: int,
        at: int,
        counts_writes: bool = False,
        pause_ns: int = 0,
        loses_writes: bool = False,
    ) -> None: ...

class Machine:
    """Ranks with their memory and streams, under one schedule. strategy: random, pct or starve."""

    def __init__(
        self,
        *,
        num_ranks: int,
        max_blocks: int,
        max_threads: int,
        num_sms: int = 0,
        ranks_per_node: int = 0,
        copy_engines: bool = False,
        max_open_puts: int = 0,
        weak_signals: bool = False,
        strategy: str = "random",
        seed: int = 0,
        expected_steps: int = 20000,
        max_steps: int = 20000000,
        faults: Sequence[MachineFault] = [],
    ) -> None: ...
    def allocate(self, name: str, space: str, rank: int, bytes: int) -> int: ...
    def allocate_zeros(self, name: str, space: str, rank: int, bytes: int) -> int: ...
    def write(self, rank: int, address: int, data: bytes | NDArray[Any]) -> None: ...
    def read(self, rank: int, address: int, count: int) -> bytes: ...
    def forget(self, rank: int, address: int, count: int) -> None: ...
    def watch(self, rank: int, address: int, value: int, timeout_ns: int, until_idle: bool) -> None: ...
    def watch_tags(self, rank: int, address: int, count: int, tag: int, timeout_ns: int) -> None: ...
    def watcher_read(self, rank: int, address: int, count: int) -> bytes: ...
    def peek(self, address: int, count: int) -> bytes: ...
    def put_bytes(self, rank: int, to: int) -> int: ...
    def launch(
        self,
        rank: int,
        kernel: str,
        args: bytes,
        num_blocks: int,
        num_threads: int,
        shared_bytes: int,
        kernels: Kernels,
    ) -> None: ...
    def meet(self) -> None: ...
    def host_step(self, rank: int) -> None: ...
    def run(self) -> Outcome: ...

class SlotLayout:
    """Where the arrays of received rows lie behind each other (csrc/layout/symmetric_layout.hpp)."""

    def __init__(
        self, *, capacity: int, row_bytes: int, num_scales: int, num_topk: int, index_bytes: int
    ) -> None: ...
    @property
    def source(self) -> int: ...
    @property
    def scales(self) -> int: ...
    @property
    def topk_idx(self) -> int: ...
    @property
    def topk_weights(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

MAX_GROUP_RANKS: int
MAX_DOMAINS: int
RAIL_STATE_BYTES: int
RAIL_COUNTERS: int  # the first 8-byte words of a rail state: windows and calls so far

class TwoLevelDomain(HighThroughputCalls):
    """One rank's view of a group of several domains (csrc/host/two_level.hpp)."""

    def __init__(
        self,
        *,
        machine: Machine,
        kernels: Kernels,
        num_threads: int,
        shape: TwoLevelShape,
        rank: int,
        heaps: list[int],
        remote: int,
        before: int,
        max_tokens: int,
        state: int,
        rail_state: int,
        fault: int,
        timeout_seconds: float,
    ) -> None: ...
    def watched_fault(self) -> FaultRecord | None: ...
    @property
    def fault_word(self) -> int: ...

class Domain(DomainCalls):
    """One rank's view of its NVLink domain (csrc/host/domain.hpp). `stream`: a rank has one, 0."""

    def __init__(
        self,
        *,
        machine: Machine,
        kernels: Kernels,
        num_threads: int,
        rank: int,
        heaps: list[int],
        max_local_experts: int,
        max_blocks: int,
        staging_bytes: int,
        state: int,
        fault: int,
        counting: int = 0,
        timeout_seconds: float,
    ) -> None: ...
    @property
    def fault_word(self) -> int: ...
    def watched_fault(self) -> FaultRecord | None: ...
    def ce_doorbell_rung(self) -> bool: ...

def counting_bytes(num_ranks: int, max_local_experts: int) -> int: ...
def host_counts_bytes(num_ranks: int, num_local_experts: int) -> int: ...
def ring_bytes(num_slots: int, slot_bytes: int) -> tuple[int, int]: ...
def control_bytes(num_ranks: int, max_local_experts: int, max_blocks: int) -> int: ...
def staging_capacity(area_bytes: int, row_bytes: int, num_topk: int) -> int: ...
def staging_rows_begin(area_bytes: int, row_bytes: int, num_topk: int) -> int: ...
def epoch_words(num_ranks: int, max_local_experts: int, max_blocks: int) -> list[int]: ...
def litmus_args(
    *,
    role: int,
    writer: int,
    reader: int,
    words: int,
    out: int,
    timeout_ns: int,
    links: int = 0,
    neighbour: int = 0,
    far: int = 0,
) -> bytes: ...
def bulk_copy_args(
    *, source: int, target: int, num_bytes: int, stage_bytes: int, num_stages: int, timeout_ns: int
) -> bytes: ...
def bulk_copy_shared_bytes(num_warps: int, num_stages: int, stage_bytes: int) -> int: ...
def copy_args(source: int, target: int, num_bytes: int) -> bytes: ...

class Exchange:
    """One rank's part in bare exchanges (csrc/kernels/exchange): as deepep._cuda's, for a machine to launch.

    exchange_rows: where a source's rows lie in symmetric memory; what comes before the first is flags.
    """

    def __init__(
        self, *, rank: int, heaps: Sequence[int], pair_bytes: int, state: int, timeout_seconds: float
    ) -> None: ...
    @property
    def pair_bytes(self) -> int: ...
    def args(
        self,
        *,
        source: int,
        sent: Sequence[int],
        received: Sequence[int],
        sums: int,
        num_blocks: int,
    ) -> bytes: ...

def exchange_bytes(num_ranks: int, pair_bytes: int) -> int: ...

class AllReduce:
    """One rank's part in all-reduces over symmetric memory (csrc/kernels/all_reduce): as deepep._cuda's, for
    a machine to launch.
    """

    def __init__(
        self,
        *,
        rank: int,
        heaps: Sequence[int],
        pair_bytes: int,
        state: int,
        host_missing: int = 0,
        timeout_seconds: float,
    ) -> None: ...
    @property
    def pair_bytes(self) -> int: ...
    def args(
        self,
        *,
        tensor: int,
        count: int,
        is_bf16: bool,
        is_oneshot: bool,
        format: str,
        is_fixed: bool,
        divisor: float,
        keys: Sequence[int],
        first_index: int,
        num_blocks: int,
    ) -> bytes: ...

def all_reduce_bytes(num_ranks: int, pair_bytes: int) -> int: ...
def all_reduce_control_bytes(num_ranks: int) -> int: ...
def all_reduce_block_bytes(format: str, is_bf16: bool) -> int: ...
def exchange_rows(num_ranks: int, pair_bytes: int, epoch: int, source: int) -> int: ...
def low_latency_bytes(
    num_ranks: int,
    max_local_experts: int,
    max_tokens: int,
    max_topk: int,
    max_row_bytes: int,
    entry_stretches: int = 0,
) -> tuple[int, int]: ...
def cast_to_e4m3(floats: bytes) -> bytes: ...
def logfmt_codes(values: bytes, meta: int) -> bytes: ...
def logfmt_values(codes: bytes, meta: int) -> bytes: ...

LOW_LATENCY_EPOCHS: int
FAR_STATE_BYTES: int
FAR_COUNTERS: int

class LowLatencyDomain(LowLatencyCalls):
    """csrc/host/low_latency.hpp."""

    def __init__(
        self,
        *,
        machine: Machine,
        kernels: Kernels,
        num_threads: int,
        rank: int,
        heaps: Sequence[int],
        max_local_experts: int,
        max_tokens: int,
        max_topk: int,
        max_row_bytes: int,
        entry_stretches: int,
        state: int,
        fault: int,
        timeout_seconds: float,
        shrinks: bool = False,
        bulk_copies: bool = True,
    ) -> None: ...
    def open_lines(self, words: int, num_words: int) -> None: ...
    def close_lines(self) -> list[tuple[str, int, int, int]]: ...
    def masked(self) -> int: ...
    def take_fault(self) -> FaultRecord | None: ...
    def watched_fault(self) -> FaultRecord | None: ...
    @property
    def fault_word(self) -> int: ...

class FarLowLatencyDomain(LowLatencyCalls):
    """The same of ranks in several domains (csrc/host/low_latency_far.hpp)."""

    def __init__(
        self,
        *,
        machine: Machine,
        kernels: Kernels,
        num_threads: int,
        shape: FarShape,
        rank: int,
        heaps: Sequence[int],
        remote: int,
        far_state: int,
        state: int,
        fault: int,
        timeout_seconds: float,
        bulk_copies: bool = True,
    ) -> None: ...
    def masked(self) -> int: ...
    def take_fault(self) -> FaultRecord | None: ...
    def watched_fault(self) -> FaultRecord | None: ...
    @property
    def fault_word(self) -> int: ...

MAX_ROW_ENTRIES: int
MAX_COUNTED_EXPERTS: int

def sort_pairs_args(
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
) -> bytes: ...
def select_topk_args(
    *, num_tokens: int, num_experts: int, num_topk: int, scores: int, topk_idx: int, stream: int = 0
) -> bytes: ...
def count_entries_args(
    *,
    topk_idx: int,
    index_bytes: int,
    num_experts: int,
    num_entries: int,
    load: int,
    stream: int = 0,
) -> bytes: ...
def spread_rows_args(
    *,
    num_rows: int,
    row_bytes: int,
    num_topk: int,
    slots: int,
    x: int,
    scales: int = 0,
    out: int,
    stream: int = 0,
) -> bytes: ...
def cast_rows_args(*, num_channels: int, x: int, values: int, scales: int, stream: int = 0) -> bytes: ...
def reduce_rows_args(
    *,
    num_rows: int,
    row_bytes: int,
    num_topk: int,
    slots: int,
    y: int,
    weights: int,
    out: int,
    stream: int = 0,
) -> bytes: ...
def weigh_rows_args(
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
) -> bytes: ...
def swiglu_args(*, num_rows: int, width: int, h: int, out: int, stream: int = 0) -> bytes: ...
def swiglu_backward_args(
    *, num_rows: int, width: int, h: int, grad: int, out: int, stream: int = 0
) -> bytes: ...
