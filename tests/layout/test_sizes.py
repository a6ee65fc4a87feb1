"""Size hints and capacities: the published numbers, what they grow with, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from deepep import Config, layout

MEBI = 1 << 20


def test_queue_hints_give_the_known_numbers() -> None:
    """Published for 20 SMs, 256 tokens a queue, 7168 bf16 channels: 336 MB at 8 ranks, 84 MB at 2."""
    config = Config(20, 6, 256, 8, 128)
    assert round(config.get_nvl_buffer_size_hint(14336, 8) / 1e6) == 336
    assert round(config.get_nvl_buffer_size_hint(14336, 2) / 1e6) == 84
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0
    # 10 channels x 2 nodes x (18 words sent and received + 2 queues of 128 records), rounded up to 128.
    assert config.get_rdma_buffer_size_hint(14336, 16) - 10 * 2 * (18 * 2 * 4 + 2 * 128 * 16408) == 64


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 16, 24, 160, 2048])
def test_hints_are_multiples_of_128_and_positive(num_ranks: int) -> None:
    sizes = [
        Config(24, 6, 720, 8, 128).get_nvl_buffer_size_hint(14336, num_ranks),
        layout.low_latency_rdma_size_hint(128, 7168, num_ranks, num_ranks),
    ]
    if num_ranks > 8:
        sizes.append(Config(24, 6, 720, 8, 128).get_rdma_buffer_size_hint(14336, num_ranks))
    assert all(size > 0 and size % 128 == 0 for size in sizes)


def test_hints_grow_with_every_argument() -> None:
    grid = itertools.product([1, 127, 128, 4096], [128, 7168], [1, 8, 64, 2048], [1, 8, 32])
    for tokens, hidden, ranks, topk in grid:
        here = layout.low_latency_rdma_size_hint(tokens, hidden, ranks, ranks, topk)
        assert layout.low_latency_rdma_size_hint(tokens + 1, hidden, ranks, ranks, topk) > here
        assert layout.low_latency_rdma_size_hint(tokens, hidden + 128, ranks, ranks, topk) > here
        assert layout.low_latency_rdma_size_hint(tokens, hidden, ranks + 1, ranks + 1, topk) > here
        assert layout.low_latency_rdma_size_hint(tokens, hidden, ranks, ranks, topk + 1) > here


def test_the_low_latency_buffer_does_not_grow_with_the_experts() -> None:
    """A slot per (expert, token), twice, takes 1908 MB at 128 tokens, 7168 channels and 256 experts."""
    few = layout.low_latency_rdma_size_hint(128, 7168, 8, 8, num_topk=8)
    many = layout.low_latency_rdma_size_hint(128, 7168, 8, 2048, num_topk=8)
    assert few == many < 70 * MEBI
    # Without the top-k: room for 32 rows of each token on their way back.
    assert layout.low_latency_rdma_size_hint(128, 7168, 8, 256) < 160 * MEBI


def test_the_flags_do_not_move_with_the_shape() -> None:
    """Words of an operation must be found where one with another M, H or K left them."""
    small, large = layout.LowLatencyBuffer(8, 1, 128, 1), layout.LowLatencyBuffer(8, 512, 8192, 32)
    for epoch, source in itertools.product(range(2), range(8)):
        assert small.dispatch_flag(epoch, source) == large.dispatch_flag(epoch, source)
        assert small.combine_flag(epoch, source) == large.combine_flag(epoch, source)


def test_the_expanded_capacity_is_reached() -> None:
    """Compares what full layouts need with what is said to suffice."""
    num_ranks, num_max_tokens, local, alignment = 2, 9, 2, 8
    # Every token of both ranks names both experts; 18 rows each, 2 rows past a multiple of 8.
    topk_idx = torch.tensor([[0, 1]]).repeat(num_ranks * num_max_tokens, 1)
    used = layout.expanded_layout(topk_idx, local, alignment).num_rows
    capacity = layout.max_rows_expanded(num_ranks, num_max_tokens, 2, local, alignment, has_duplicates=False)
    assert used == 48 <= capacity == 56
    # The same expert twice takes two rows of a token: K of them, not min(K, L).
    doubled = layout.expanded_layout(torch.zeros(18, 2, dtype=torch.int64), 1).num_rows
    assert doubled == layout.max_rows_expanded(2, 9, 2, 1) == 36
    assert layout.max_rows_expanded(2, 9, 2, 1, has_duplicates=False) == 18


@pytest.mark.parametrize(
    "arguments",
    [(2**31, 2**31, 2048, 2048), (2**31, 2**20, 2**20, 2**20), (2**31, 2**31, 1, 1)],
)
def test_a_size_past_64_bits_is_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(OverflowError, match="does not fit into 64 bits"):
        layout.low_latency_rdma_size_hint(*arguments)


def test_a_receive_slot_past_64_bits_is_refused() -> None:
    with pytest.raises(OverflowError, match="receive_slot: does not fit into 64 bits"):
        layout.receive_slot_bytes(2**31, 2**31, 2**31 - 1, 2**31 - 1)
    with pytest.raises(ValueError, match="index_bytes: got 16; allowed: 4 or 8"):
        layout.receive_slot_bytes(1, 128, index_bytes=16)


@pytest.mark.parametrize("tokens", [-1, 2**31 + 1, 2**62])
def test_a_senseless_factor_is_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=r"num_max_tokens: got .*; allowed: 0 \.\. 2\^31"):
        layout.low_latency_rdma_size_hint(tokens, 7168, 8, 8)
    with pytest.raises(ValueError, match="num_max_tokens"):
        layout.max_rows_received(8, tokens)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="num_experts: got 9; allowed: a multiple of num_ranks = 8"):
        layout.low_latency_rdma_size_hint(128, 7168, 8, 9)
    with pytest.raises(ValueError, match="alignment: got 0; allowed: 1 or more"):
        layout.max_rows_expanded(8, 128, 8, 4, 0)
    counts = torch.full((4, 4), 2**30, dtype=torch.int32)
    with pytest.raises(OverflowError, match="more rows than 32 bits count"):
        layout.low_latency_ranges(counts, 0)
