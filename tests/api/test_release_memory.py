"""release_memory: what is given back, what still works afterwards, and ranks that do not agree on it.

CUDA's engine without a GPU: tests/backends/cuda/test_engine_heaps.py; with GPUs: test_generations.py there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

RANKS, EXPERTS, HIDDEN, TOKENS, MOST = 2, 4, 128, 6, 8


def inputs_of(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], topk_idx and topk_weights [T, 2]; rank 1 has fewer tokens."""
    generator = torch.Generator().manual_seed(rank)
    num_tokens = TOKENS - 2 * rank
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    idx = torch.rand(num_tokens, EXPERTS, generator=generator).topk(2).indices
    return x, idx, torch.rand(num_tokens, 2, generator=generator)


def throughput(ctx: Any, buffer_of: Any, same_bits: Any, backend: str | None) -> None:
    buffer = buffer_of(ctx, backend=backend)
    x, idx, weights = inputs_of(ctx.rank)

    def dispatch() -> Any:
        return buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS)

    before = dispatch()
    summed = buffer.combine(before.recv_x, before.handle, before.recv_topk_weights)
    again = buffer.dispatch(-x, handle=before.handle)
    received = before.recv_x.clone()
    for _ in range(2):
        buffer.release_memory()
        assert same_bits(before.recv_x, received)
        assert same_bits(buffer.dispatch(-x, handle=before.handle).recv_x, again.recv_x)
        after = buffer.combine(before.recv_x, before.handle, before.recv_topk_weights)
        assert same_bits(after.combined_x, summed.combined_x)
        assert same_bits(after.combined_topk_weights, summed.combined_topk_weights)
    buffer.release_memory()
    for mine, theirs in zip(dispatch()[:3], before[:3], strict=True):
        assert same_bits(mine, theirs)


def low_latency(ctx: Any, buffer_of: Any, same_bits: Any, backend: str | None) -> None:
    from deepep import ArgumentError

    buffer = buffer_of(ctx, backend=backend)
    x, idx, weights = inputs_of(ctx.rank)

    def dispatch() -> Any:
        return buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False)

    recv_x, counts, handle = dispatch()[:3]
    summed = buffer.low_latency_combine(recv_x, idx, weights, handle)[0]
    buffer.release_memory()
    assert same_bits(buffer.low_latency_combine(recv_x, idx, weights, handle)[0], summed)
    buffer.release_memory()
    for _ in range(2):
        rows, numbers, handle = dispatch()[:3]
        assert same_bits(numbers, counts)
        for local in range(EXPERTS // RANKS):
            assert same_bits(rows[local, : counts[local]], recv_x[local, : counts[local]])
        staged = buffer.get_next_low_latency_combine_buffer(handle)
        staged.copy_(rows)
        assert buffer.info.memory["staged rows"] == staged.nbytes
        buffer.release_memory()
        assert buffer.info.memory["staged rows"] == 0
        with pytest.raises(ArgumentError):  # on all ranks, which stay in step
            buffer.low_latency_combine(staged, idx, weights, handle, zero_copy=True)
        staged = buffer.get_next_low_latency_combine_buffer(handle)
        staged.copy_(rows)
        zero_copied = buffer.low_latency_combine(staged, idx, weights, handle, zero_copy=True)[0]
        assert same_bits(zero_copied, summed)


def elastic(ctx: Any, buffer_of: Any, same_bits: Any, backend: str | None) -> None:
    from deepep import ElasticBuffer

    x, idx, weights = inputs_of(ctx.rank)
    options = {"num_max_tokens_per_rank": MOST, "hidden": HIDDEN, "num_topk": 2, "backend": backend}
    with ElasticBuffer(ctx.group, **options) as buffer:
        before = buffer.dispatch(x, idx, weights, num_experts=EXPERTS, do_expand=True)
        summed = buffer.combine(before.recv_x, before.handle)
        buffer.release_memory()
        again = buffer.dispatch(x, handle=before.handle, do_expand=True)
        assert same_bits(again.recv_x, before.recv_x)
        assert same_bits(buffer.combine(again.recv_x, before.handle).combined_x, summed.combined_x)
        buffer.release_memory()
        after = buffer.dispatch(x, idx, weights, num_experts=EXPERTS, do_expand=True)
        assert same_bits(after.recv_x, before.recv_x)


@pytest.mark.parametrize("backend", [None, "emulator"])
@pytest.mark.parametrize("mode", [throughput, low_latency, elastic])
def test_handles_and_rows_of_before_are_good_afterwards(
    world_of: Any, buffer_of: Any, same_bits: Any, mode: Any, backend: str | None
) -> None:
    if backend == "emulator":
        pytest.importorskip("deepep._emulator")
    world_of(RANKS).run(mode, buffer_of, same_bits, backend)


def local_memory(ctx: Any, buffer_of: Any) -> None:
    buffer = buffer_of(ctx, num_nvl_bytes=1 << 10)
    mine = buffer.get_local_buffer_tensor(torch.uint8).fill_(7)
    assert buffer.info.memory["get_local_buffer_tensor"] == 1 << 10
    buffer.release_memory()
    assert "get_local_buffer_tensor" not in buffer.info.memory
    assert bool((mine == 7).all())  # whoever holds it keeps it
    assert int(buffer.get_local_buffer_tensor(torch.uint8).sum()) == 0


def test_the_workspace_is_given_back_and_begins_anew(world_of: Any, buffer_of: Any) -> None:
    world_of(RANKS).run(local_memory, buffer_of)


def disagreeing(ctx: Any, buffer_of: Any) -> list[str]:
    """Names of what is raised when rank 0 releases memory and rank 1 does something else; then all do."""
    from deepep import DeepEPError

    buffer = buffer_of(ctx)
    x, idx, weights = inputs_of(ctx.rank)
    recv_x, _, handle = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False)[:3]
    others = [
        lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS),
        lambda: buffer.low_latency_combine(recv_x, idx, weights, handle),
        lambda: buffer.clean_low_latency_buffer(MOST, HIDDEN, EXPERTS),
        lambda: buffer.runtime.stream_barrier(),
    ]
    buffer.get_next_low_latency_combine_buffer(handle)
    found = []
    for other in others:
        try:
            buffer.release_memory() if ctx.rank == 0 else other()
        except DeepEPError as error:
            found.append(type(error).__name__)
    if ctx.rank == 0:
        assert buffer.info.memory["staged rows"] > 0  # nothing was given back
    sent = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False, return_recv_hook=True)
    try:
        buffer.release_memory()
    except DeepEPError as error:
        found.append(type(error).__name__)
    sent.hook()
    buffer.release_memory()
    return found


def test_ranks_that_do_not_agree_all_raise_and_go_on(world_of: Any, buffer_of: Any) -> None:
    for found in world_of(RANKS).run(disagreeing, buffer_of):
        assert found == ["MismatchError"] * 4 + ["HookPendingError"]


def ended(ctx: Any) -> None:
    from deepep import Buffer, DestroyedError

    buffer = Buffer(ctx.group, timeout=30.0)
    buffer.release_memory()  # before there is any
    buffer.destroy()
    with pytest.raises(DestroyedError):
        buffer.release_memory()


def test_not_after_the_end(world_of: Any) -> None:
    world_of(RANKS).run(ended)
