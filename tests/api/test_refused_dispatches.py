"""A dispatch that one rank gets wrong: the same typed error on every rank,
naming the rank and the argument; then work goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.refusals import BAD, EXPERTS, HIDDEN, RANKS, TOKENS, TOPK, high_throughput_arguments, raised

from deepep import errors


def fp8(arguments: dict[str, Any], **scales: Any) -> dict[str, Any]:
    shape, dtype = scales.get("shape", (TOKENS, 4)), scales.get("dtype", torch.float32)
    return {"x": (torch.zeros(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn), torch.ones(shape).to(dtype))}


# what is wrong -> (the arguments that rank 1 passes instead, the error, the argument it names)
DISPATCH: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "x not a tensor": (lambda a: {"x": 1.0}, errors.ArgumentTypeError, "x"),
    "x a list of no tensors": (lambda a: {"x": [1.0]}, errors.ArgumentTypeError, "x[0]"),
    "x of integers": (lambda a: {"x": a["x"].long()}, errors.ArgumentTypeError, "x"),
    "x of bytes without scales": (lambda a: {"x": a["x"].byte()}, errors.ArgumentTypeError, "x"),
    "x on another device": (lambda a: {"x": a["x"].to("meta")}, errors.DeviceError, "x"),
    "x of one dimension": (lambda a: {"x": a["x"][0]}, errors.ShapeError, "x"),
    "x not contiguous": (lambda a: {"x": torch.ones(HIDDEN, TOKENS).bfloat16().t()}, errors.LayoutError, "x"),
    "x of odd rows": (lambda a: {"x": a["x"][:, :12].contiguous()}, errors.ShapeError, "x"),
    "bf16 with scales": (lambda a: {"x": (a["x"], torch.ones(TOKENS, 4))}, errors.ArgumentTypeError, "x"),
    "three parts of x": (lambda a: {"x": (a["x"],) * 3}, errors.ArgumentTypeError, "x"),
    "scales of float64": (lambda a: fp8(a, dtype=torch.float64), errors.ArgumentTypeError, "scales"),
    "scales of other tokens": (lambda a: fp8(a, shape=(TOKENS + 1, 4)), errors.ShapeError, "scales"),
    "topk_idx of int16": (
        lambda a: {"topk_idx": a["topk_idx"].short()},
        errors.ArgumentTypeError,
        "topk_idx",
    ),
    "topk_idx of float32": (
        lambda a: {"topk_idx": a["topk_idx"].float()},
        errors.ArgumentTypeError,
        "topk_idx",
    ),
    "topk_idx of other tokens": (lambda a: {"topk_idx": a["topk_idx"][:2]}, errors.ShapeError, "topk_idx"),
    "topk_idx transposed": (
        lambda a: {"topk_idx": a["topk_idx"].t().contiguous().t()},
        errors.LayoutError,
        "topk_idx",
    ),
    "K of 33": (
        lambda a: {
            "topk_idx": torch.full((TOKENS, 33), -1),
            "topk_weights": torch.zeros(TOKENS, 33),
        },
        errors.ShapeError,
        "topk_idx",
    ),
    "expert E": (lambda a: {"topk_idx": a["topk_idx"].clone().fill_(EXPERTS)}, errors.RangeError, "topk_idx"),
    "expert -2": (lambda a: {"topk_idx": a["topk_idx"].clone().fill_(-2)}, errors.RangeError, "topk_idx"),
    "topk_weights of bf16": (
        lambda a: {"topk_weights": a["topk_weights"].bfloat16()},
        errors.ArgumentTypeError,
        "topk_weights",
    ),
    "topk_weights of other K": (
        lambda a: {"topk_weights": torch.ones(TOKENS, 1)},
        errors.ShapeError,
        "topk_weights",
    ),
    "topk_idx alone": (lambda a: {"topk_weights": None}, errors.ArgumentError, "topk_weights"),
    "topk_weights alone": (lambda a: {"topk_idx": None}, errors.ArgumentError, "topk_idx"),
    "no layout": (lambda a: {"is_token_in_rank": None}, errors.ArgumentError, "is_token_in_rank"),
    "layout of int64": (
        lambda a: {"num_tokens_per_rank": a["num_tokens_per_rank"].long()},
        errors.ArgumentTypeError,
        "num_tokens_per_rank",
    ),
    "layout of other ranks": (
        lambda a: {"is_token_in_rank": a["is_token_in_rank"][:, :2].contiguous()},
        errors.ShapeError,
        "is_token_in_rank",
    ),
    "E not of R": (
        lambda a: {"num_tokens_per_expert": torch.zeros(RANKS * 2 + 1, dtype=torch.int32)},
        errors.RangeError,
        "num_tokens_per_expert",
    ),
    "negative counts": (
        lambda a: {"num_tokens_per_expert": a["num_tokens_per_expert"] - 100},
        errors.RangeError,
        "num_tokens_per_expert",
    ),
    "counts that do not add up": (
        lambda a: {"num_tokens_per_rank": a["num_tokens_per_rank"] + 1},
        errors.RangeError,
        "num_tokens_per_rank",
    ),
    "alignment of 0": (lambda a: {"expert_alignment": 0}, errors.RangeError, "expert_alignment"),
    "alignment of 1.5": (lambda a: {"expert_alignment": 1.5}, errors.ArgumentTypeError, "expert_alignment"),
    "worst case negative": (lambda a: {"num_worst_tokens": -1}, errors.RangeError, "num_worst_tokens"),
    "worst case too small": (lambda a: {"num_worst_tokens": 1}, errors.CapacityError, "num_worst_tokens"),
    "worst case without top-k": (
        lambda a: {"num_worst_tokens": 99, "topk_idx": None, "topk_weights": None},
        errors.ArgumentError,
        "topk_idx",
    ),
    "allocation on the stream without an event": (
        lambda a: {"allocate_on_comm_stream": True, "async_finish": False},
        errors.ArgumentError,
        "allocate_on_comm_stream",
    ),
    "an event of another kind": (
        lambda a: {"previous_event": object()},
        errors.ArgumentTypeError,
        "previous_event",
    ),
    "a config of another kind": (lambda a: {"config": 20}, errors.ArgumentTypeError, "config"),
    "a handle of another kind": (
        lambda a: {"handle": (1, 2), "topk_idx": None, "topk_weights": None},
        errors.ArgumentTypeError,
        "handle",
    ),
    "top-k with a handle": (lambda a: {"handle": a["handle"]}, errors.ArgumentError, "topk_idx"),
}

DISAGREEMENTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "H": (lambda a: {"x": a["x"][:, :256].contiguous()}, "hidden"),
    "dtype of x": (lambda a: {"x": a["x"].float()}, "x dtype"),
    "E": (lambda a: {"num_tokens_per_expert": torch.ones(2 * EXPERTS, dtype=torch.int32)}, "num_experts"),
    "K": (
        lambda a: {
            "topk_idx": a["topk_idx"][:, :1].contiguous(),
            "topk_weights": a["topk_weights"][:, :1].contiguous(),
        },
        "num_topk",
    ),
    "dtype of topk_idx": (lambda a: {"topk_idx": a["topk_idx"].int()}, "topk_idx dtype"),
    "top-k at all": (lambda a: {"topk_idx": None, "topk_weights": None}, "num_topk"),
    "scales at all": (lambda a: fp8(a), "x dtype"),
    "handle": (
        lambda a: {"handle": a["handle"], "topk_idx": None, "topk_weights": None},
        "cached",
    ),
}


def dispatch_with(ctx: Any, buffer_of: Any, routing: Any, change: Any) -> Any:
    buffer = buffer_of(ctx)
    arguments = high_throughput_arguments(buffer, routing(ctx.rank, RANKS, EXPERTS, TOPK, TOKENS))
    if "good" not in ctx.scratch:
        ctx.scratch["good"] = buffer.dispatch(**arguments)
    good = ctx.scratch["good"]
    changes = change({**arguments, "handle": good[4]}) if ctx.rank == BAD else {}
    outcome = raised(lambda: buffer.dispatch(**{**arguments, **changes}))
    again = buffer.dispatch(**arguments)
    assert torch.equal(again[0], good[0])
    assert torch.equal(again[1], good[1])
    return outcome


@pytest.mark.parametrize("case", DISPATCH)
def test_dispatch_refuses(world_of: Any, buffer_of: Any, routing: Any, case: str) -> None:
    change, kind, argument = DISPATCH[case]
    outcomes = world_of(RANKS).run(dispatch_with, buffer_of, routing, change)
    assert len(set(outcomes)) == 1, outcomes
    name, message, named, rank = outcomes[0]
    assert (name, named, rank) == (kind.__name__, argument, BAD)
    assert message.startswith(f"rank {BAD}: {argument}: got ")
    assert "; allowed: " in message


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_dispatch_needs_agreement(world_of: Any, buffer_of: Any, routing: Any, case: str) -> None:
    change, argument = DISAGREEMENTS[case]
    outcomes = world_of(RANKS).run(dispatch_with, buffer_of, routing, change)
    assert len(set(outcomes)) == 1, outcomes
    name, message, named, rank = outcomes[0]
    assert (name, named, rank) == ("MismatchError", argument, BAD)
    assert "as on rank 0" in message


def two_bad_ranks(ctx: Any, buffer_of: Any, routing: Any) -> Any:
    change = {1: {"expert_alignment": 0}, 2: {"num_worst_tokens": -5}}.get(ctx.rank, {})
    buffer = buffer_of(ctx)
    arguments = high_throughput_arguments(buffer, routing(ctx.rank, RANKS, EXPERTS, TOPK, TOKENS))
    return raised(lambda: buffer.dispatch(**{**arguments, **change}))


def test_of_two_bad_ranks_all_name_the_lower(world_of: Any, buffer_of: Any, routing: Any) -> None:
    outcomes = world_of(RANKS).run(two_bad_ranks, buffer_of, routing)
    assert {o[2:] for o in outcomes} == {("expert_alignment", 1)}


def refused_layouts(ctx: Any, buffer_of: Any, routing: Any) -> Any:
    buffer = buffer_of(ctx)
    idx = routing(ctx.rank, RANKS, EXPERTS, TOPK, TOKENS)
    arguments = high_throughput_arguments(buffer, idx)
    outcomes = []
    for bad in (idx.float(), idx + EXPERTS, idx[0], idx.t()):
        if ctx.rank == BAD:
            outcomes.append(raised(lambda bad=bad: buffer.get_dispatch_layout(bad, EXPERTS)))
        else:
            outcomes.append(raised(lambda: buffer.dispatch(**arguments)))
    if ctx.rank == BAD:
        outcomes.append(raised(lambda: buffer.get_dispatch_layout(idx, EXPERTS + 1)))
    else:
        outcomes.append(raised(lambda: buffer.dispatch(**arguments)))
    buffer.dispatch(**arguments)
    return outcomes


def test_a_layout_that_is_refused_refuses_the_dispatch_of_the_others(
    world_of: Any, buffer_of: Any, routing: Any
) -> None:
    outcomes = world_of(RANKS).run(refused_layouts, buffer_of, routing)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert [o[0] for o in outcomes[0]] == [
        "ArgumentTypeError",
        "RangeError",
        "ShapeError",
        "LayoutError",
        "RangeError",
    ]
