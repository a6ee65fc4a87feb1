"""A dispatch that finds out its layout itself (`num_experts`): the same as one that is given it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.refusals import EXPERTS, HIDDEN, RANKS, TOKENS, TOPK, raised

from deepep import errors


def arguments(ctx: Any, routing: Any, index_dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    """Of a rank whose tokens are as many as those of the lowest and its number."""
    generator = torch.Generator().manual_seed(ctx.rank)
    idx = routing(ctx.rank, ctx.num_ranks, EXPERTS, TOPK, TOKENS + ctx.rank)
    idx[::3, 0] = -1
    return {
        "x": torch.randn(len(idx), HIDDEN, generator=generator).bfloat16(),
        "topk_idx": idx.to(index_dtype),
        "topk_weights": torch.rand(idx.shape, generator=generator),
    }


def compare(ctx: Any, buffer_of: Any, routing: Any, same_bits: Any, index_dtype: Any, how: Any) -> None:
    from deepep import Buffer

    buffer = buffer_of(ctx)
    given = arguments(ctx, routing, index_dtype)
    made = buffer.get_dispatch_layout(given["topk_idx"], EXPERTS)
    layout = {
        "num_tokens_per_rank": made.num_tokens_per_rank,
        "is_token_in_rank": made.is_token_in_rank,
        "num_tokens_per_expert": made.num_tokens_per_expert,
    }
    if how.get("async_finish"):
        how = {**how, "previous_event": Buffer.capture()}
    wanted = buffer.dispatch(**given, **layout, **how)
    # Ranks may do either: every other one is given its layout.
    inside = {"num_experts": EXPERTS} if ctx.rank % 2 == 0 else layout
    for instead in ({"num_experts": EXPERTS}, inside):
        got = buffer.dispatch(**given, **instead, **how)
        for result in (wanted, got):
            if result.event.event is not None:
                result.event.current_stream_wait()
        rows = int(got.handle[0][-1, ctx.rank])
        assert got.recv_x.shape == wanted.recv_x.shape
        assert same_bits(got.recv_x[:rows], wanted.recv_x[:rows])
        assert same_bits(got.recv_topk_idx, wanted.recv_topk_idx)
        assert same_bits(got.recv_topk_weights[:rows], wanted.recv_topk_weights[:rows])
        assert got.num_recv_tokens_per_expert_list == wanted.num_recv_tokens_per_expert_list
        assert all(same_bits(a, b) for a, b in zip(got.handle, wanted.handle, strict=True))
        again = buffer.dispatch(given["x"], handle=got.handle, num_experts=7)  # ignored, as layouts are
        assert same_bits(again.recv_x[:rows], wanted.recv_x[:rows])
        sums = [buffer.combine(wanted.recv_x, result.handle).combined_x for result in (wanted, got)]
        assert same_bits(*sums)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    "how",
    [{}, {"expert_alignment": 4}, {"num_worst_tokens": RANKS * (TOKENS + RANKS)}, {"async_finish": True}],
    ids=["waits", "aligned", "worst case", "asynchronous"],
)
def test_it_is_the_same_as_with_a_layout(
    world_of: Any, buffer_of: Any, routing: Any, same_bits: Any, index_dtype: torch.dtype, how: Any
) -> None:
    world_of(RANKS).run(compare, buffer_of, routing, same_bits, index_dtype, how)


Change = Callable[[dict[str, Any]], dict[str, Any]]
BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "a layout as well": (
        lambda a: {"num_tokens_per_rank": torch.zeros(RANKS, dtype=torch.int32)},
        errors.ArgumentError,
        "num_experts",
    ),
    "no indices": (lambda a: {"topk_idx": None}, errors.ArgumentError, "topk_idx"),
    "no weights": (lambda a: {"topk_weights": None}, errors.ArgumentError, "topk_weights"),
    "no experts": (lambda a: {"num_experts": 0}, errors.RangeError, "num_experts"),
    "a fraction of experts": (lambda a: {"num_experts": 8.0}, errors.ArgumentTypeError, "num_experts"),
    "experts that R does not divide": (
        lambda a: {"num_experts": EXPERTS + 1},
        errors.RangeError,
        "num_experts",
    ),
    "expert E": (lambda a: {"topk_idx": a["topk_idx"].clone().fill_(EXPERTS)}, errors.RangeError, "topk_idx"),
    "indices of other tokens": (
        lambda a: {"topk_idx": a["topk_idx"][1:], "topk_weights": a["topk_weights"][1:]},
        errors.ShapeError,
        "topk_idx",
    ),
    "indices of int16": (
        lambda a: {"topk_idx": a["topk_idx"].short()},
        errors.ArgumentTypeError,
        "topk_idx",
    ),
    "x on another device": (lambda a: {"x": a["x"].to("meta")}, errors.DeviceError, "x"),
}


def refused(ctx: Any, buffer_of: Any, routing: Any, change: Change, early: bool) -> Any:
    buffer = buffer_of(ctx)
    given = {**arguments(ctx, routing), "num_experts": EXPERTS}
    if ctx.rank == 1:
        given = {**given, **change(given)}

    def call() -> None:
        buffer.dispatch(**given, async_finish=early).event.current_stream_wait()

    found = raised(call)
    good = {**arguments(ctx, routing), "num_experts": EXPERTS}
    assert buffer.dispatch(**good).recv_x.shape[1] == HIDDEN  # and work goes on
    return found


@pytest.mark.parametrize("early", [False, True], ids=["waits", "asynchronous"])
@pytest.mark.parametrize("bad", BAD)
def test_what_one_rank_gets_wrong_is_refused_on_all(
    world_of: Any, buffer_of: Any, routing: Any, bad: str, early: bool
) -> None:
    change, kind, name = BAD[bad]
    for found in world_of(RANKS).run(refused, buffer_of, routing, change, early):
        assert (found[0], *found[2:]) == (kind.__name__, name, 1), found
