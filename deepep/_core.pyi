"""deepep._core (csrc/bindings/core.cpp): layout rules. deepep.layout, the typed face, says what they mean.

Results go into arrays that the caller has allocated; arrays are taken as they are, never converted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_TOPK: int

# topk_idx is int32 or int64; what is made of its entries has the same dtype.

def dispatch_layout(
    topk_idx: NDArray[Any],
    num_experts: int,
    num_ranks: int,
    ranks_per_node: int,
    num_tokens_per_rank: NDArray[np.int32],
    num_tokens_per_node: NDArray[np.int32],
    num_tokens_per_expert: NDArray[np.int32],
    is_token_in_rank: NDArray[np.bool_],
) -> None: ...
def rank_masks(
    topk_idx: NDArray[Any], num_experts: int, num_ranks: int, masks: NDArray[np.int64]
) -> None: ...
def local_topk(
    topk_idx: NDArray[Any], num_experts: int, num_ranks: int, rank: int, local: NDArray[Any]
) -> None: ...
def first_rows(
    counts: NDArray[np.int32], first_rows: NDArray[np.int64], num_received: NDArray[np.int64]
) -> None: ...
def send_rows(
    is_token_in_rank: NDArray[np.bool_],
    first_rows: NDArray[np.int64],
    num_parts: int,
    rows: NDArray[np.int64],
) -> None: ...
def receive_rows(
    is_token_in_rank: Sequence[NDArray[np.bool_]],
    rank: int,
    src_rank: NDArray[np.int32],
    src_token: NDArray[np.int32],
) -> None: ...
def sources_of_rows(first_rows: NDArray[np.int64], sources: NDArray[np.int32]) -> None: ...
def expanded_layout(
    recv_topk_idx: NDArray[Any],
    alignment: int,
    num_parts: int,
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> int: ...
def low_latency_counts(
    topk_idx: NDArray[Any], num_experts: int, num_ranks: int, rows_per_expert: NDArray[np.int32]
) -> None: ...
def low_latency_ranges(
    rows_per_expert: NDArray[np.int32],
    rank: int,
    layout_range: NDArray[np.int64],
    recv_count: NDArray[np.int32],
) -> None: ...
def low_latency_send_rows(
    topk_idx: NDArray[Any],
    rows_per_expert: NDArray[np.int32],
    source: int,
    num_max_tokens: int,
    num_parts: int,
    rows: NDArray[np.int64],
) -> None: ...
def forwarding_rank(source: int, node: int, num_ranks: int, ranks_per_node: int) -> int: ...
def node_positions(
    is_token_in_rank: NDArray[np.bool_],
    ranks_per_node: int,
    num_parts: int,
    masks: NDArray[np.int64],
    position: NDArray[np.int32],
    counts: NDArray[np.int32],
) -> None: ...
def forwarded_rows(
    masks: NDArray[np.int64], first_rows: NDArray[np.int64], rows: NDArray[np.int64]
) -> None: ...
def max_rows_received(num_ranks: int, num_max_tokens: int) -> int: ...
def max_rows_expanded(
    num_ranks: int,
    num_max_tokens: int,
    num_topk: int,
    num_local_experts: int,
    alignment: int,
    has_duplicates: bool,
) -> int: ...
def receive_slot_bytes(
    num_rows: int, row_bytes: int, num_scales: int, num_topk: int, index_bytes: int
) -> int: ...

# The gradient codec: formats are "fp8", "fp16" and "bf16"; a block is 128 elements. deepep.collectives.codecs
# says what the numbers mean.

def gradient_message_bytes(format: str, count: int) -> int: ...
def encode_gradients(
    format: str,
    values: NDArray[np.float32],
    message: NDArray[np.uint8],
    is_nearest: bool,
    key: tuple[int, int],
    first_index: int,
) -> None: ...
def decode_gradients(
    format: str, message: NDArray[np.uint8], values: NDArray[np.float32], is_added: bool
) -> None: ...
def block_exponents(values: NDArray[np.float32], exponents: NDArray[np.uint8]) -> None: ...
def encode_fixed(
    values: NDArray[np.float32],
    exponents: NDArray[np.uint8],
    headroom: int,
    integers: NDArray[np.int32],
) -> None: ...
def decode_fixed(
    integers: NDArray[np.int32],
    exponents: NDArray[np.uint8],
    headroom: int,
    divisor: float,
    values: NDArray[np.float32],
) -> None: ...

class LowLatencyBuffer:
    """Every offset of csrc/layout/rules/low_latency_buffer.hpp, in bytes."""

    def __init__(self, num_ranks: int, num_max_tokens: int, hidden: int, num_topk: int) -> None: ...
    def dispatch_message_bytes(self) -> int: ...
    def combine_message_bytes(self) -> int: ...
    def dispatch_flag(self, epoch: int, source: int) -> int: ...
    def combine_flag(self, epoch: int, source: int) -> int: ...
    def dispatch_send(self, epoch: int, token: int) -> int: ...
    def dispatch_slot(self, epoch: int, source: int, position: int) -> int: ...
    def combine_slot(self, epoch: int, token: int, k: int) -> int: ...
    def total_bytes(self) -> int: ...
    @staticmethod
    def num_epochs() -> int: ...
