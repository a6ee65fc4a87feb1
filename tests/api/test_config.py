"""Config: constraints, size hints against the interface's formulas, tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepep
from deepep import Buffer, Config


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1,), "num_sms"),
        ((20, 0), "num_max_nvl_chunked_send_tokens"),
        ((20, 6, 0), "num_max_nvl_chunked_recv_tokens"),
        ((20, 6, 6), "num_max_nvl_chunked_send_tokens"),
        ((20, 6, 256, 0), "num_max_rdma_chunked_send_tokens"),
        ((20, 6, 256, 6, 0), "num_max_rdma_chunked_recv_tokens"),
        ((20, 6, 256, 6, 6), "num_max_rdma_chunked_send_tokens"),
        ((20, 6, 256, 128, 128), "num_max_rdma_chunked_send_tokens"),
    ],
)
def test_constraints(arguments: tuple[int, ...], name: str) -> None:
    with pytest.raises(deepep.RangeError) as caught:
        Config(*arguments)
    assert caught.value.argument == name


def test_the_rdma_queue_is_a_multiple_of_the_chunk() -> None:
    assert Config(20, 6, 256, 6, 128).num_max_rdma_chunked_recv_tokens == 132
    assert Config(20, 6, 256, 64, 127).num_max_rdma_chunked_recv_tokens == 128


def nvl_formula(config: Config, hidden_bytes: int, num_ranks: int) -> int:
    c, n, d = config.num_sms // 2, min(num_ranks, 8), max(num_ranks // 8, 1)
    q = config.num_max_nvl_chunked_recv_tokens
    size = c * n * ((2 * d + 3) * 4 + q * (hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4))
    return (size + 127) // 128 * 128


def rdma_formula(config: Config, hidden_bytes: int, num_ranks: int) -> int:
    if num_ranks <= 8:
        return 0
    c, d, q = config.num_sms // 2, max(num_ranks // 8, 1), config.num_max_rdma_chunked_recv_tokens
    row = hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4 + 16
    size = c * d * ((8 * 2 + 2) * 2 * 4 + 2 * q * row)
    return (size + 127) // 128 * 128


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8, 16, 64, 160])
def test_size_hints(num_ranks: int) -> None:
    for config in (Config(), Config(24, 8, 720, 12, 512), Config(3), Buffer.get_dispatch_config(num_ranks)):
        for hidden_bytes in (256, 14336, 16384):
            assert config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) == nvl_formula(
                config, hidden_bytes, num_ranks
            )
            assert config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) == rdma_formula(
                config, hidden_bytes, num_ranks
            )


def test_size_hints_of_the_interfaces_examples() -> None:
    assert round(Config().get_nvl_buffer_size_hint(7168 * 2, 8) / 1e6) == 336
    assert round(Config().get_nvl_buffer_size_hint(7168 * 2, 2) / 1e6) == 84


def test_the_low_latency_hint_is_v1s() -> None:
    """Examples of the interface's description, in MB; independent of R."""
    for most, hidden, experts, wanted in (
        (128, 7168, 288, 2147),
        (128, 7168, 256, 1908),
        (128, 4096, 64, 273),
    ):
        for ranks in (1, 2, 8):
            size = Buffer.get_low_latency_rdma_size_hint(most, hidden, ranks, experts)
            assert round(size / 1e6) == wanted
            assert size % 128 == 0
    for bad in ((0, 7168, 8, 256), (128, 7168, 3, 256), (128, 7168, 8, 1 << 40), (True, 7168, 8, 256)):
        with pytest.raises(deepep.ArgumentError):
            Buffer.get_low_latency_rdma_size_hint(*bad)


def test_size_hints_refuse_nonsense() -> None:
    for hint in (Config().get_nvl_buffer_size_hint, Config().get_rdma_buffer_size_hint):
        with pytest.raises(deepep.RangeError):
            hint(0, 8)
        with pytest.raises(deepep.RangeError):
            hint(14336, 0)


def test_size_hints_make_buffers(world_of: Any) -> None:
    """Whatever the hints say is a size that the constructor takes."""

    def construct(ctx: Any) -> None:
        for config in (Buffer.get_dispatch_config(ctx.num_ranks), Buffer.get_combine_config(ctx.num_ranks)):
            Buffer(
                ctx.group,
                config.get_nvl_buffer_size_hint(7168 * 2, ctx.num_ranks),
                config.get_rdma_buffer_size_hint(7168 * 2, ctx.num_ranks),
                timeout=30.0,
            ).destroy()
        num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(4, 256, ctx.num_ranks, 8)
        with Buffer(ctx.group, 0, num_rdma_bytes, low_latency_mode=True, timeout=30.0) as buffer:
            workspace = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
            assert workspace.numel() == num_rdma_bytes >= 8 * 4 * 256 * 2  # what clients count on

    world_of(2).run(construct)


def test_tables() -> None:
    dispatch = {r: _chunks(Buffer.get_dispatch_config(r)) for r in (2, 4, 8, 16, 24, 64, 96, 128, 144, 160)}
    assert dispatch == {
        2: (24, 256, 6, 132),  # the queue of 128 is rounded up to the chunk of 6
        4: (6, 256, 6, 132),
        8: (6, 256, 6, 132),
        16: (36, 288, 20, 140),
        24: (32, 288, 8, 128),
        64: (32, 288, 8, 128),
        96: (20, 480, 12, 132),
        128: (20, 560, 12, 132),
        144: (32, 720, 12, 132),
        160: (28, 720, 12, 132),
    }
    combine = {r: _chunks(Buffer.get_combine_config(r)) for r in (2, 4, 8, 16, 24, 64, 96, 128, 144, 160)}
    assert combine == {
        2: (10, 256, 6, 132),
        4: (9, 256, 6, 132),
        8: (4, 256, 6, 132),
        16: (4, 288, 12, 132),
        24: (1, 288, 8, 128),
        64: (1, 288, 8, 128),
        96: (1, 480, 8, 128),
        128: (1, 560, 8, 128),
        144: (2, 720, 8, 128),
        160: (2, 720, 8, 128),
    }


def test_rank_counts_between_the_tables() -> None:
    for between, entry in ((1, 2), (3, 4), (6, 8), (40, 48), (100, 128), (1024, 160)):
        assert Buffer.get_dispatch_config(between) == Buffer.get_dispatch_config(entry)
        assert Buffer.get_combine_config(between) == Buffer.get_combine_config(entry)
    with pytest.raises(deepep.RangeError):
        Buffer.get_dispatch_config(0)


def _chunks(config: Config) -> tuple[int, int, int, int]:
    return (
        config.num_max_nvl_chunked_send_tokens,
        config.num_max_nvl_chunked_recv_tokens,
        config.num_max_rdma_chunked_send_tokens,
        config.num_max_rdma_chunked_recv_tokens,
    )
