"""Config: DeepEP V1's tuning parameters, their constraints, the buffer sizes they imply, the default tables.

Of a Config, this library's kernels follow `num_sms`. The chunk sizes have no effect, because rows are written
where they belong, without queues: they are checked, and V1's size hints are computed from them. Formulas and
tables: the V1 interface (chunked queues, num_sms / 2 channels).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from deepep.errors import RangeError
from deepep.runtime.checks import check_int, check_num_experts

DEFAULT_NUM_SMS = 24
"""SMs of high-throughput kernels where nobody says how many: measured best for this library's kernels on H200
(docs/performance.md). V1's own default, 20, remains that of a `Config()` made without arguments."""

DEFAULT_SYMMETRIC_BYTES = 3 << 30
"""Symmetric memory of a rank where nobody says how much."""

_MOST = 2**31 - 1

_TOKEN_META_BYTES = 8 + 128 * 8 + 128 * 4 + 128 * 4
"""Bytes beside a token's row in V1's queues: its source; 128 top-k indices, weights and scales."""


@dataclass(frozen=True)
class Config:
    """Parameters of V1's high-throughput kernels.

    num_sms: SMs to use (two per channel).
    num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens: chunk and queue length of the NVLink
        queues.
    num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens: the same of the RDMA queues; the queue
        length is rounded up to a multiple of the chunk.

    Raises RangeError unless num_sms >= 0, every size > 0, nvl send < nvl recv, and rdma send <= rdma recv / 2
    (the consumer publishes its progress only once per chunk, so less room would stall the producer).
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_sms", check_int("num_sms", self.num_sms, 0, _MOST))
        for name in ("nvl_chunked_send", "nvl_chunked_recv", "rdma_chunked_send", "rdma_chunked_recv"):
            name = f"num_max_{name}_tokens"
            object.__setattr__(self, name, check_int(name, getattr(self, name), 1, _MOST))
        nvl_send, nvl_recv = self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens
        if nvl_send >= nvl_recv:
            raise RangeError("num_max_nvl_chunked_send_tokens", str(nvl_send), f"less than {nvl_recv} (recv)")
        rdma_send = self.num_max_rdma_chunked_send_tokens
        rdma_recv = -(-self.num_max_rdma_chunked_recv_tokens // rdma_send) * rdma_send
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", rdma_recv)
        if rdma_send * 2 > rdma_recv:
            raise RangeError(
                "num_max_rdma_chunked_send_tokens", str(rdma_send), f"at most half of {rdma_recv} (recv)"
            )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of V1's NVLink queues, a multiple of 128.

        hidden_bytes: bytes of a token's row (V1's recipe: H * max(element size, 2)).
        """
        _check_size_arguments(hidden_bytes, num_ranks)
        channels, peers, nodes = self.num_sms // 2, min(num_ranks, 8), -(-num_ranks // 8)
        tokens = self.num_max_nvl_chunked_recv_tokens * (hidden_bytes + _TOKEN_META_BYTES)
        return _aligned(channels * peers * ((2 * nodes + 3) * 4 + tokens))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of V1's RDMA queues, a multiple of 128; 0 inside one node (num_ranks <= 8)."""
        _check_size_arguments(hidden_bytes, num_ranks)
        if num_ranks <= 8:
            return 0
        channels, nodes = self.num_sms // 2, -(-num_ranks // 8)
        tokens = self.num_max_rdma_chunked_recv_tokens * (hidden_bytes + _TOKEN_META_BYTES + 16)
        return _aligned(channels * nodes * ((8 * 2 + 2) * 2 * 4 + 2 * tokens))


def _aligned(size: int) -> int:
    return -(-size // 128) * 128


def low_latency_size_hint(num_max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes of V1's low-latency buffer: for each of two calls in turn, signals of all experts, and room to
    send and to receive every row of every expert; a multiple of 128.

    Raises ArgumentTypeError and RangeError.
    """
    most = check_int("num_max_dispatch_tokens_per_rank", num_max_tokens, 1, _MOST)
    width = check_int("hidden", hidden, 1, _MOST)
    check_int("num_ranks", num_ranks, 1, _MOST)
    experts = check_int("num_experts", num_experts, 1, _MOST)
    check_num_experts(experts, num_ranks)
    fp8_bytes = width + width // 128 * 4
    message, slot = 16 + max(2 * width, fp8_bytes), 2 * width + width // 128 * 4
    send, receive = max(most * message, experts * most * slot), experts * most * max(message, slot)
    return (2 * (_aligned(4 * experts) + send + receive) // 128 + 1) * 128


def _check_size_arguments(hidden_bytes: int, num_ranks: int) -> None:
    check_int("hidden_bytes", hidden_bytes, 1, _MOST)
    check_int("num_ranks", num_ranks, 1, _MOST)


# num_ranks: (nvl send, nvl recv, rdma send, rdma recv)
_DISPATCH_TABLE: dict[int, tuple[int, int, int, int]] = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    32: (32, 288, 8, 128),
    48: (32, 288, 8, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE_TABLE: dict[int, tuple[int, int, int, int]] = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    32: (1, 288, 8, 128),
    48: (1, 288, 8, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """V1's default for dispatch; between two entries of the table the larger, beyond the last the last."""
    return Config(num_sms, *_nearest(_DISPATCH_TABLE, num_ranks))


def combine_config(num_ranks: int, num_sms: int) -> Config:
    """V1's default for combine; between two entries of the table the larger, beyond the last the last."""
    return Config(num_sms, *_nearest(_COMBINE_TABLE, num_ranks))


def _nearest(table: dict[int, tuple[int, int, int, int]], num_ranks: int) -> tuple[int, int, int, int]:
    check_int("num_ranks", num_ranks, 1, _MOST)
    sizes = sorted(table)
    return table[sizes[min(bisect_left(sizes, num_ranks), len(sizes) - 1)]]
