"""Processes that join ranks at work on GPUs, and ranks that go. One GPU is enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.joining import EXPERTS, HIDDEN, MOST, TOKENS, TOPK, buffer_for, hand_over, newcomer, rounds

import deepep
from deepep.errors import HandleError, PeerTimeoutError
from deepep.sim import World

pytestmark = pytest.mark.gpu

SYMMETRIC_BYTES = 64 << 20


@pytest.fixture
def fresh_world() -> Iterator[Callable[[int], World]]:
    """`fresh_world(n)`: a world for one test, which may end badly."""
    worlds = []

    def make(num_ranks: int) -> World:
        worlds.append(World(num_ranks, backend="nccl", timeout=180))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def cuda_buffer(ctx: Any, **options: Any) -> Any:
    os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(SYMMETRIC_BYTES)
    return buffer_for(ctx, "cuda", **options)


def kept(buffer: Any) -> int:
    return int(buffer.info.memory["kept memory"])


def test_a_process_takes_the_place_of_one_that_died(
    fresh_world: Callable[[int], World], tmp_path: Path
) -> None:
    """Twice: the second newcomer takes the place of the first."""

    def body(ctx: Any, path: str) -> int:
        import signal

        buffer = cuda_buffer(ctx)
        rounds(buffer, ())
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for number in range(2):
            if number:
                buffer.dismiss([1])
            buffer.low_latency_update_mask_buffer(1, True)
            rounds(buffer, (1,))
            buffer.admit(hand_over(ctx, buffer, (1,), f"{path}{number}"))
            for _ in range(3):
                rounds(buffer, ())
        buffer.low_latency_clean_mask_buffer()
        rounds(buffer, ())
        memory = kept(buffer)
        buffer.destroy()
        return memory

    def first(buffer: Any) -> None:
        for _ in range(3):
            rounds(buffer, ())
        buffer.dismiss([1])

    def second(buffer: Any) -> None:
        for _ in range(3):
            rounds(buffer, ())
        buffer.low_latency_clean_mask_buffer()
        rounds(buffer, ())
        buffer.destroy()

    path = str(tmp_path / "invitation")
    coming = [
        fresh_world(1).submit(newcomer, f"{path}{number}", 1, then)
        for number, then in enumerate((first, second))
    ]
    outcomes = fresh_world(3).try_run(body, path)
    assert [o.value for o in outcomes if o.rank != 1] == [0, 0], [o.describe() for o in outcomes]
    for each in coming:
        each.results()


def test_a_group_grows_and_shrinks(fresh_world: Callable[[int], World], tmp_path: Path) -> None:
    """A handle from before is refused by name; a graph from before goes on among those who captured it."""

    def inputs(ctx: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(ctx.rank)
        x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
        idx = torch.rand(TOKENS, 2 * EXPERTS // 3, generator=generator).topk(TOPK, dim=1).indices
        return x.cuda(), idx.cuda(), torch.rand(TOKENS, TOPK, generator=generator).cuda()

    def captured(
        buffer: Any, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        """A low-latency round trip's graph, which reads what is given; its output; what that has to be."""

        def trip() -> torch.Tensor:
            rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False)
            combined: torch.Tensor = buffer.low_latency_combine(rows, idx, weights, handle)[0]
            return combined

        wanted = trip().clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = trip()
        return graph, out, wanted

    def body(ctx: Any, path: str) -> int:
        buffer = cuda_buffer(ctx, max_num_ranks=3)
        rounds(buffer, (2,))
        x, idx, weights = inputs(ctx)
        handle = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS).handle
        graph, out, wanted = captured(buffer, x, idx, weights)
        buffer.admit(hand_over(ctx, buffer, (2,), path))
        for _ in range(3):
            rounds(buffer, ())
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, wanted)
        with pytest.raises(HandleError, match="other ranks were masked"):
            buffer.dispatch(x, handle=handle)
        del handle
        rounds(buffer, ())
        buffer.dismiss([2])
        rounds(buffer, (2,))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted)
        memory = kept(buffer)
        buffer.destroy()
        return memory

    def then(buffer: Any) -> None:
        for _ in range(3):
            rounds(buffer, ())
        with pytest.raises(deepep.MismatchError):  # the others refuse a handle
            buffer.dispatch(
                torch.zeros(1, HIDDEN, device="cuda").bfloat16(),
                topk_idx=torch.zeros(1, TOPK, dtype=torch.int64, device="cuda"),
                topk_weights=torch.ones(1, TOPK, device="cuda"),
                num_experts=EXPERTS,
            )
        rounds(buffer, ())
        buffer.dismiss([2])

    path = str(tmp_path / "invitation")
    coming = fresh_world(1).submit(newcomer, path, 2, then)
    for memory in fresh_world(2).run(body, path):
        assert 0 < memory < SYMMETRIC_BYTES  # the low-latency memory that the graph has, and no heap
    coming.results()


def test_a_rank_that_was_replaced_disturbs_nobody(
    fresh_world: Callable[[int], World], tmp_path: Path
) -> None:
    """It lives, and dispatches into the heaps that it knows: they are kept until it has ended."""

    def body(ctx: Any, path: str) -> list[int]:
        import time

        def wait_for(name: str) -> None:
            while not Path(f"{path}-{name}").exists():
                time.sleep(0.01)

        buffer = cuda_buffer(ctx, timeout=10.0)
        rounds(buffer, ())
        if ctx.rank == 1:
            wait_for("admitted")
            x = torch.ones(TOKENS, HIDDEN, device="cuda").bfloat16()
            idx = torch.arange(TOPK, device="cuda").repeat(TOKENS, 1) * (EXPERTS // TOPK)
            weights = torch.ones_like(idx).float()
            with pytest.raises(PeerTimeoutError) as caught:
                buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS)
            assert caught.value.record.waited_on == (0, 2)
            buffer.__exit__(PeerTimeoutError, caught.value, None)
            Path(f"{path}-ended").touch()
            return []
        buffer.low_latency_update_mask_buffer(1, True)
        buffer.admit(hand_over(ctx, buffer, (1,), path))
        rounds(buffer, ())
        seen = [kept(buffer)]
        Path(f"{path}-admitted").touch()
        for _ in range(30):
            rounds(buffer, ())
        wait_for("ended")
        buffer.low_latency_clean_mask_buffer()
        rounds(buffer, ())
        seen.append(kept(buffer))
        buffer.destroy()
        return seen

    def then(buffer: Any) -> None:
        for _ in range(31):
            rounds(buffer, ())
        buffer.low_latency_clean_mask_buffer()
        rounds(buffer, ())
        buffer.destroy()

    path = str(tmp_path / "invitation")
    coming = fresh_world(1).submit(newcomer, path, 1, then)
    first, nothing, last = fresh_world(3).run(body, path)
    coming.results()
    assert nothing == []
    for while_it_lives, after in (first, last):
        assert while_it_lives > SYMMETRIC_BYTES
        assert after == 0
