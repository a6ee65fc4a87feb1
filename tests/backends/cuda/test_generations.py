"""Old heaps are freed: ranks are left out, taken in again, late and killed, and memory stays flat."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.deaths import Death, Setting, play, prepare

from deepep.sim import World

pytestmark = pytest.mark.gpu

RANKS = 3
CYCLES = 30
SYMMETRIC_BYTES = 256 << 20
"""Of a rank: much more than all else, so that one heap too many is seen."""
OPENINGS = 30_000
"""More than a process can have events of others open, which torch opens with a heap and never closes."""
OPENINGS_OF_A_HEAP = 100


@pytest.fixture(scope="module")
def three() -> Iterator[World]:
    with World(RANKS, backend="nccl", timeout=300) as world:
        yield world


def buffer_of(ctx: Any, timeout: float = 20.0) -> Any:
    import deepep

    os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(SYMMETRIC_BYTES)
    buffer = deepep.Buffer(ctx.group, low_latency_mode=True, timeout=timeout, reduction="expert_rank")
    assert buffer.runtime.info.backend == "cuda"
    return buffer


def call(buffer: Any, ctx: Any, mode: str) -> list[Any]:
    """One dispatch and its combine; what they gave."""
    torch.manual_seed(ctx.rank)
    x = torch.randn((64, 2048), device=ctx.device).bfloat16()
    idx = torch.randint(0, 12, (64, 1), device=ctx.device)
    weights = torch.ones((64, 1), device=ctx.device)
    if mode == "low latency":
        rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 64, 12, use_fp8=False)
        return [rows, handle, *buffer.low_latency_combine(rows, idx, weights, handle)]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 12)
    out = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)
    return [out, *buffer.combine(out[0], out[4])]


def allocated() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def reserved() -> int:
    return torch.cuda.memory_reserved()


def kept(buffer: Any) -> int:
    return buffer.info.memory["kept memory"]  # type: ignore[no-any-return]


def change(buffer: Any, masked: int, leaves: bool) -> bool:
    """Has a rank left out, and it the others, or all taken in again. True if this one takes part."""
    engine = buffer.runtime
    is_masked = buffer.rank == masked
    for rank in range(RANKS):
        if rank != buffer.rank or not leaves:
            engine.mask(rank, leaves and (is_masked or rank == masked))
    return not (leaves and is_masked)


def come_and_go(ctx: Any, mode: str) -> list[tuple[int, int, int]]:
    """After each cycle in which one rank is left out and taken in again: bytes allocated, reserved, kept."""
    buffer = buffer_of(ctx)
    seen = []
    for cycle in range(CYCLES):
        for leaves in (True, False):
            if change(buffer, cycle % RANKS, leaves):
                call(buffer, ctx, mode)
        seen.append((allocated(), reserved(), kept(buffer)))
    buffer.destroy()
    return seen


@pytest.mark.parametrize("mode", ["throughput", "low latency"])
def test_memory_is_flat_over_masks(three: World, mode: str) -> None:
    for seen in three.run(come_and_go, mode):
        print([(a >> 20, r >> 20, k >> 20) for a, r, k in seen])
        first = seen[2]
        assert all(kept == 0 for _, _, kept in seen)
        assert max(allocated for allocated, _, _ in seen[2:]) <= first[0] + (1 << 20)
        assert max(reserved for _, reserved, _ in seen[2:]) <= first[1] + SYMMETRIC_BYTES // 4


def release_often(ctx: Any, mode: str) -> list[tuple[int, int, int]]:
    """After each release: bytes allocated before the next call, kept, and allocated with its results."""
    buffer = buffer_of(ctx)
    call(buffer, ctx, mode)
    seen = []
    for _ in range(CYCLES):
        buffer.release_memory()
        given_back, held_back = allocated(), kept(buffer)
        results = call(buffer, ctx, mode)
        seen.append((given_back, held_back, allocated()))
        del results
    results = call(buffer, ctx, "throughput")
    handle, expected = results[0][4], results[1].clone()
    received = results[0][0].clone()
    del results
    buffer.release_memory()
    again = buffer.dispatch(received.new_ones(64, received.shape[1]), handle=handle).recv_x
    assert again.shape == received.shape
    assert torch.equal(buffer.combine(received, handle)[0], expected)
    buffer.destroy()
    return seen


@pytest.mark.parametrize("mode", ["throughput", "low latency"])
def test_released_memory_is_free_until_the_next_call(three: World, mode: str) -> None:
    """pytest -m gpu tests/backends/cuda/test_generations.py -k released"""
    for seen in three.run(release_often, mode):
        print([(g >> 20, k >> 20, d >> 20) for g, k, d in seen])
        assert all(kept == 0 for _, kept, _ in seen)
        least = SYMMETRIC_BYTES if mode == "throughput" else 1 << 20
        assert all(during - given_back >= least for given_back, _, during in seen)
        assert max(given_back for given_back, _, _ in seen[2:]) <= seen[2][0] + (1 << 20)


def map_often(ctx: Any) -> int:
    """Maps and lets go of the others' heaps, so that this process opens `OPENINGS`; many times of each heap,
    since hosts that meet between any two take minutes.
    """
    from deepep.backends.cuda.memory.ipc import export_heap, gather_over, map_heaps

    gather = gather_over(ctx.group)
    for _ in range(OPENINGS // (RANKS - 1) // OPENINGS_OF_A_HEAP):
        own = torch.zeros(1 << 20, dtype=torch.uint8, device=ctx.device)
        exported = gather(export_heap(own))
        for _ in range(OPENINGS_OF_A_HEAP):
            heap = map_heaps(own, ctx.rank, exported)
            addresses = len(set(heap.addresses))
            del heap
        gather(b"")  # all have let go
    return addresses


@pytest.mark.slow
def test_heaps_are_mapped_as_often_as_one_likes(three: World) -> None:
    assert three.run(map_often) == [RANKS] * RANKS


def hold_handles(ctx: Any, mode: str) -> list[int]:
    """Bytes kept while a handle of each of three generations is held, and when all are freed."""
    buffer, handles, seen = buffer_of(ctx), [], []
    for leaves in (True, False, True):
        if change(buffer, 2, leaves):
            results = call(buffer, ctx, mode)
            handles.append(results[0][4] if mode == "throughput" else results[1])
            del results
    seen.append(kept(buffer))
    handles.clear()
    change(buffer, 2, False)
    call(buffer, ctx, mode)
    seen.append(kept(buffer))
    buffer.destroy()
    return seen


@pytest.mark.parametrize("mode", ["throughput", "low latency"])
def test_handles_keep_what_they_hold_and_no_longer(three: World, mode: str) -> None:
    """A throughput handle has one of the arrays received; a low-latency one lies elsewhere. The rank
    that is left out last may still write to the heap before.
    """
    for held, freed in three.run(hold_handles, mode):
        assert freed == 0
        assert held <= 2 * SYMMETRIC_BYTES if mode == "throughput" else held < SYMMETRIC_BYTES


def hold_results(ctx: Any) -> list[int]:
    """Bytes kept while results of an old generation are held, and when they are freed."""
    buffer = buffer_of(ctx)
    results = call(buffer, ctx, "throughput")
    rows, seen = results[0][0], []
    want = rows.clone()
    del results
    change(buffer, 0, False)
    call(buffer, ctx, "throughput")
    seen.append(kept(buffer))
    assert torch.equal(rows, want)
    del rows
    change(buffer, 0, False)
    call(buffer, ctx, "throughput")
    seen.append(kept(buffer))
    buffer.destroy()
    return seen


def test_held_results_keep_their_heap_until_they_are_freed(three: World) -> None:
    assert three.run(hold_results) == [[SYMMETRIC_BYTES, 0]] * RANKS


def call_until_late(buffer: Any, ctx: Any, mode: str) -> None:
    """Low latency raises what a kernel has found in the call after it."""
    for _ in range(3):
        call(buffer, ctx, mode)
        torch.cuda.synchronize()


def time_out_and_go_on(ctx: Any, mode: str) -> list[tuple[int, int]]:
    """After each cycle: bytes allocated, and kept. A rank does not come, so that the others time out and mask
    it; then it is taken in again.
    """
    import deepep

    buffer = buffer_of(ctx, timeout=1.0)
    call(buffer, ctx, mode)
    seen = []
    for cycle in range(5):
        late = cycle % RANKS
        if ctx.rank == late:
            time.sleep(3.0)  # longer than the others take to raise
        else:
            with pytest.raises(deepep.PeerTimeoutError):
                call_until_late(buffer, ctx, mode)
        torch.distributed.barrier()
        if change(buffer, late, True):
            call(buffer, ctx, mode)
            assert kept(buffer) > 0, "it may still come"
        torch.distributed.barrier()
        change(buffer, late, False)
        call(buffer, ctx, mode)
        seen.append((allocated(), kept(buffer)))
    buffer.destroy()
    return seen


@pytest.mark.parametrize("mode", ["throughput", "low latency"])
def test_memory_is_flat_over_time_outs(mode: str) -> None:
    with World(RANKS, backend="nccl", timeout=300) as world:
        for seen in world.run(time_out_and_go_on, mode):
            assert all(kept == 0 for _, kept in seen)
            assert max(allocated for allocated, _ in seen) <= seen[0][0] + (1 << 20)


def make_and_destroy(ctx: Any, mode: str) -> list[int]:
    """Bytes allocated after each of many buffers."""
    seen = []
    for _ in range(10):
        buffer = buffer_of(ctx)
        call(buffer, ctx, mode)
        buffer.destroy()
        del buffer
        seen.append(allocated())
    return seen


@pytest.mark.parametrize("mode", ["throughput", "low latency"])
def test_buffers_leave_nothing_behind(three: World, mode: str) -> None:
    for seen in three.run(make_and_destroy, mode):
        assert max(seen) - seen[0] < 1 << 20


def test_the_dead_keep_no_memory() -> None:
    """One process survives one peer after another, each killed in a call; what is kept is soon freed."""
    setting = Setting(
        cuda=True,
        num_tokens=(1024, 700),
        few_tokens=(100, 77),
        hidden=7168,
        num_experts=256,
        topk=8,
        backend="cuda",
        timeout=1.5,
    )
    with World(1, timeout=120.0) as survivor:
        survivor.run(prepare, setting, 0)
        seen = []
        for _ in range(6):
            victim = World(1, timeout=120.0)
            try:
                victim.run(prepare, setting, 1)
                play(survivor, victim, Death("combine"), setting)
            finally:
                victim.discard()
            seen += survivor.run(allocated_after)
        print([number >> 20 for number in seen])
        assert max(seen[2:]) <= max(seen[:2]) + (64 << 20)


def allocated_after(ctx: Any) -> int:
    gc.collect()
    return allocated()
