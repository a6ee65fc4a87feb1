"""Entries by expert that a buffer's dispatches count, and their sum over the ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

RANKS, EXPERTS, HIDDEN = 2, 4, 128
COUNTED = [[4, 2, 1, 0], [0, 1, 0, 1]]  # of entries_of(rank)


def entries_of(rank: int) -> torch.Tensor:
    """[T, 2], an expert named twice and no expert among them."""
    if rank:
        return torch.tensor([[1, 3]])
    return torch.tensor([[0, 1], [0, 0], [2, -1], [1, 0]])


def counted(ctx: Any, buffer_of: Any, backend: str | None) -> list[Any]:
    """Counts after each kind of dispatch, all of the same entries; then what all ranks counted, and zeros."""
    from deepep import ElasticBuffer

    buffer = buffer_of(ctx, backend=backend)
    idx = entries_of(ctx.rank)
    x, weights = torch.ones(len(idx), HIDDEN).bfloat16(), torch.ones(idx.shape)
    counts = torch.zeros(2, EXPERTS, dtype=torch.int64)
    seen = []

    def note() -> None:
        seen.append(counts[0].tolist())
        counts.zero_()

    buffer.count_experts(counts[0])
    layout = buffer.get_dispatch_layout(idx, EXPERTS)
    named = {
        "num_tokens_per_rank": layout[0],
        "num_tokens_per_expert": layout[2],
        "is_token_in_rank": layout[3],
    }
    note()  # a layout alone is no dispatch
    handle = buffer.dispatch(x, **named, topk_idx=idx, topk_weights=weights).handle
    note()
    buffer.dispatch(x, **named)
    note()
    buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS)
    note()
    buffer.dispatch(x, topk_idx=idx.int(), topk_weights=weights, num_experts=EXPERTS, async_finish=True)[
        -1
    ].current_stream_wait()
    note()
    buffer.low_latency_dispatch(x, idx, 4, EXPERTS, use_fp8=False)
    note()
    sent = buffer.low_latency_dispatch(x, idx, 4, EXPERTS, use_fp8=False, return_recv_hook=True)
    sent.hook()
    note()
    buffer.dispatch(x, handle=handle)
    note()  # a cached one is not counted
    buffer.count_experts(counts[1])
    for _ in range(2):
        buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS)
    assert counts[0].sum() == 0
    total = buffer.gather_expert_counts(counts, zero=True)
    seen.append((total.tolist(), counts.tolist()))
    buffer.count_experts(None)
    buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS)
    note()
    with ElasticBuffer(
        ctx.group, num_bytes=2 << 20, num_max_tokens_per_rank=4, hidden=HIDDEN, backend=backend
    ) as v2:
        v2.count_experts(counts[0])
        v2.dispatch(x, idx, weights, num_experts=EXPERTS, do_expand=True)
        note()
    return seen


@pytest.mark.parametrize("backend", [None, "emulator"])
def test_every_dispatch_with_a_new_route_is_counted_once(
    world_of: Any, buffer_of: Any, backend: str | None
) -> None:
    if backend == "emulator":
        pytest.importorskip("deepep._emulator")
    none = [0] * EXPERTS
    both = [2 * sum(pair) for pair in zip(*COUNTED, strict=True)]
    for rank, seen in enumerate(world_of(RANKS).run(counted, buffer_of, backend)):
        once = COUNTED[rank]
        assert seen == [none, *[once] * 6, none, ([none, both], [none, none]), none, once]


def refused(ctx: Any, buffer_of: Any) -> list[int]:
    """Counts after a dispatch that is refused on all ranks, for rank 0's sake, and after one that is not."""
    from deepep import ArgumentError

    buffer = buffer_of(ctx)
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    buffer.count_experts(counts)
    idx = torch.tensor([[1, 7 if ctx.rank == 0 else 2]])
    x, weights = torch.ones(1, HIDDEN).bfloat16(), torch.ones(idx.shape)
    for bad in (idx, idx.float(), [[1, 2]]):
        given = bad if ctx.rank == 0 else idx
        with pytest.raises(ArgumentError):
            buffer.dispatch(x, topk_idx=given, topk_weights=weights, num_experts=EXPERTS)
    found = counts.tolist()
    buffer.dispatch(x, topk_idx=idx.clamp(max=3), topk_weights=weights, num_experts=EXPERTS)
    buffer.count_experts(None)
    return [*found, *counts.tolist()]


def test_what_is_refused_is_not_counted(world_of: Any, buffer_of: Any) -> None:
    first, second = world_of(RANKS).run(refused, buffer_of)
    assert first == [0, 0, 0, 0, 0, 1, 0, 1]
    assert second == [0, 0, 0, 0, 0, 1, 1, 0]


def misused(ctx: Any, buffer_of: Any) -> list[str]:
    """Names of the errors."""
    buffer = buffer_of(ctx)
    bad = [[1], torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)]
    bad += [torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(8, dtype=torch.int64)[::2]]
    found = []
    for counts in bad:
        try:
            buffer.count_experts(counts)
        except Exception as error:
            found.append(type(error).__name__)
    mine = torch.zeros(2 + ctx.rank, dtype=torch.int64)
    for counts, zero in (
        (mine, False),
        (mine if ctx.rank else "text", False),
        (mine[:2], "yes" if ctx.rank else True),
    ):
        try:
            buffer.gather_expert_counts(counts, zero)
        except Exception as error:
            found.append(type(error).__name__)
    with torch.inference_mode():
        mine = mine[:2] + ctx.rank
    found.append(buffer.gather_expert_counts(mine, zero=True).tolist() + mine.tolist())
    return found


def test_misuse_is_refused_on_all_ranks(world_of: Any, buffer_of: Any) -> None:
    own = [
        "ArgumentTypeError",
        "ArgumentTypeError",
        "ShapeError",
        "ShapeError",
        "ArgumentTypeError",
        "ShapeError",
    ]
    first, second = world_of(RANKS).run(misused, buffer_of)
    wanted = [*own, "MismatchError", "ArgumentTypeError", "ArgumentTypeError", [1, 1, 0, 0]]
    assert first == second == wanted
