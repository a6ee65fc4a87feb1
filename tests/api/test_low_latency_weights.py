"""Weights of a low-latency round trip: given to the dispatch already, or to the combine alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepep

RANKS, EXPERTS, MOST = 3, 6, 5
BAD = 1


def inputs_of(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, 128], topk_idx and topk_weights [T, 4] of a rank; the last one has no tokens."""
    generator = torch.Generator().manual_seed(rank)
    num_tokens = 0 if rank == RANKS - 1 else MOST - rank
    x = torch.randn(num_tokens, 128, generator=generator).bfloat16()
    idx = torch.randint(-1, EXPERTS, (num_tokens, 4), generator=generator)
    weights = torch.randn(num_tokens, 4, generator=generator)
    if num_tokens:
        weights[0, 0], weights[0, 1] = float("nan"), -0.0
    return x, idx, weights


def dispatched(buffer: Any, weights: torch.Tensor | None, hooked: bool = False) -> Any:
    x, idx, _ = inputs_of(buffer.rank)
    sent = buffer.low_latency_dispatch(
        x, idx, MOST, EXPERTS, use_fp8=False, topk_weights=weights, return_recv_hook=hooked
    )
    if hooked:
        sent.hook()
    return sent


def early_and_late(ctx: Any, buffer_of: Any, same_bits: Any, reduction: str) -> None:
    buffer = buffer_of(ctx, reduction=reduction)
    _, idx, weights = inputs_of(ctx.rank)
    sums = []
    for early in (None, weights, weights.clone().requires_grad_()):
        for hooked in (False, True):
            sent = dispatched(buffer, early, hooked)
            back = buffer.low_latency_combine(sent.recv_x, idx, weights, sent.handle, return_recv_hook=hooked)
            if hooked:
                back.hook()
            sums.append(back.combined_x)
    assert all(same_bits(one, sums[0]) for one in sums)


@pytest.mark.parametrize("reduction", ["expert_rank", "exact"])
def test_weights_given_early_or_late_give_the_same_bits(
    world_of: Any, buffer_of: Any, same_bits: Any, reduction: str
) -> None:
    world_of(RANKS).run(early_and_late, buffer_of, same_bits, reduction)


def early_on_some(ctx: Any, buffer_of: Any) -> str:
    buffer = buffer_of(ctx)
    _, idx, weights = inputs_of(ctx.rank)
    with pytest.raises(deepep.MismatchError) as refused:
        dispatched(buffer, weights if ctx.rank == BAD else None)
    sent = dispatched(buffer, weights)
    buffer.low_latency_combine(sent.recv_x, idx, weights, sent.handle)
    return str(refused.value)


def test_all_ranks_give_them_to_the_dispatch_or_none(world_of: Any, buffer_of: Any) -> None:
    for said in world_of(RANKS).run(early_on_some, buffer_of):
        assert "topk_weights given: got" in said
        assert f"rank {BAD}" in said


def other_weights(ctx: Any, buffer_of: Any, same_bits: Any, rebuilt: bool) -> None:
    buffer = buffer_of(ctx)
    _, idx, weights = inputs_of(ctx.rank)
    given = weights.clone()
    sent = dispatched(buffer, given)
    given.fill_(7.0)  # the caller's own again
    handle = tuple(sent.handle) if rebuilt else sent.handle
    good = buffer.low_latency_combine(sent.recv_x, idx, weights, handle).combined_x
    for others in (weights + 1, torch.where(weights == 0, 0.0, weights)):
        with pytest.raises(deepep.ArgumentError) as refused:
            buffer.low_latency_combine(sent.recv_x, idx, others if ctx.rank == BAD else weights, handle)
        assert refused.value.argument == "topk_weights"
        assert refused.value.rank == BAD
    again = buffer.low_latency_combine(sent.recv_x, idx, weights, handle).combined_x
    assert same_bits(again, good)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_combine_takes_the_weights_that_its_dispatch_was_given(
    world_of: Any, buffer_of: Any, same_bits: Any, rebuilt: bool
) -> None:
    world_of(RANKS).run(other_weights, buffer_of, same_bits, rebuilt)
