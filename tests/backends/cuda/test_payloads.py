"""Lists of tensors, and counts of experts, on two GPUs: pytest -m gpu tests/backends/cuda/test_payloads.py"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.payload_cases import EXPERTS, FORMS, RANKS, SKIPPED, exchange, topk_of

from deepep.sim import World

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def two() -> Iterator[World]:
    with World(RANKS, backend="nccl", timeout=300) as world:
        yield world


def buffer_of(ctx: Any) -> Any:
    import deepep

    buffer = deepep.Buffer(ctx.group, low_latency_mode=True, timeout=30.0)
    assert buffer.runtime.info.backend == "cuda"
    return buffer


def exchanged(ctx: Any, forms: Any) -> None:
    with buffer_of(ctx) as buffer:
        exchange(buffer, ctx.group, None, forms, ctx.device)


def test_tensors_arrive_bit_for_bit(two: World) -> None:
    two.run(exchanged, [kinds for kinds in FORMS.values() if not SKIPPED & {name for name, _ in kinds}])


def other_tensors(ctx: Any) -> None:
    """Rows of as many bytes, of other dtypes on one rank: fresh, cached, and then the same again."""
    import deepep

    idx = topk_of(ctx.rank).to(ctx.device)
    weights = torch.ones(idx.shape, device=ctx.device)
    routed = {"topk_idx": idx, "topk_weights": weights, "num_experts": EXPERTS}
    words = torch.ones(len(idx), 64, dtype=torch.int32, device=ctx.device)
    scales = torch.ones(len(idx), 4, device=ctx.device)
    mine = [words.view(torch.float32) if ctx.rank else words, scales]
    with buffer_of(ctx) as buffer:
        for _ in range(2):
            with pytest.raises(deepep.MismatchError):
                buffer.dispatch(mine, **routed)
            handle = buffer.dispatch([words, scales], **routed).handle
            buffer.dispatch(mine, handle=handle)
            torch.cuda.synchronize()
            with pytest.raises(deepep.MismatchError):  # of the call before
                buffer.dispatch([words, scales], handle=handle)
            buffer.dispatch([words, scales], handle=handle)
        torch.cuda.synchronize()


def test_other_tensors_on_one_rank_are_told_to_all(two: World) -> None:
    two.run(other_tensors)


def counted(ctx: Any) -> list[list[int]]:
    """Counts after calls of each kind, and after a graph of one was replayed three times."""
    idx = topk_of(ctx.rank).to(ctx.device)
    x, weights = (
        torch.ones(len(idx), 256, device=ctx.device).bfloat16(),
        torch.ones(idx.shape, device=ctx.device),
    )
    counts = torch.zeros(EXPERTS, dtype=torch.int64, device=ctx.device)
    routed = {"topk_idx": idx, "topk_weights": weights, "num_experts": EXPERTS}
    seen = []

    def note() -> None:
        torch.cuda.synchronize()
        seen.append(counts.tolist())
        counts.zero_()

    with buffer_of(ctx) as buffer:
        buffer.count_experts(counts)
        buffer.dispatch(x, **routed)
        note()
        buffer.dispatch(x, **routed, num_worst_tokens=16, async_finish=True).event.current_stream_wait()
        note()
        buffer.low_latency_dispatch(x, idx, 8, EXPERTS, use_fp8=False)
        note()
        buffer.dispatch(x, **routed, num_worst_tokens=16)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        counts.zero_()
        with torch.cuda.graph(graph):
            buffer.dispatch(x, **routed, num_worst_tokens=16)
        for _ in range(3):
            graph.replay()
        note()
        buffer.dispatch(x, **routed)
        seen.append(buffer.gather_expert_counts(counts, zero=True).tolist())
        note()
        del graph
    return seen


def test_entries_are_counted_in_streams_and_graphs(two: World) -> None:
    of_ranks = [[int((topk_of(rank) == expert).sum()) for expert in range(EXPERTS)] for rank in range(RANKS)]
    total = [sum(pair) for pair in zip(*of_ranks, strict=True)]
    for rank, seen in enumerate(two.run(counted)):
        once = of_ranks[rank]
        assert seen == [once, once, once, [3 * n for n in once], total, [0] * EXPERTS]
