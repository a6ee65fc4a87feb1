"""Combines and low-latency calls that one rank gets wrong: the same typed error on every rank,
naming the rank and the argument; then work goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.refusals import BAD, EXPERTS, HIDDEN, RANKS, TOKENS, TOPK, high_throughput_arguments, raised

import deepep
from deepep import errors

MOST = 8  # M


def combine(a: Any, **changes: Any) -> Any:
    return a["buffer"].combine(**{"x": a["received"], "handle": a["handle"], **changes})


def ll_dispatch(a: Any, **changes: Any) -> Any:
    arguments = {
        "x": a["x"],
        "topk_idx": a["idx"],
        "num_max_dispatch_tokens_per_rank": MOST,
        "num_experts": EXPERTS,
    }
    return a["buffer"].low_latency_dispatch(**{**arguments, **changes})


def ll_combine(a: Any, **changes: Any) -> Any:
    arguments = {
        "x": a["ll_received"],
        "topk_idx": a["idx"],
        "topk_weights": a["weights"],
        "handle": a["ll_handle"],
    }
    return a["buffer"].low_latency_combine(**{**arguments, **changes})


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


# what rank 1 does, what the others do, the error, the argument it names; `a` has the buffer and everything
# that a good call needs
OTHERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], type[Exception], str]] = {
    "combine of int8": (
        lambda a: combine(a, x=a["received"].to(torch.int8)),
        combine,
        errors.ArgumentTypeError,
        "x",
    ),
    "combine of fewer rows": (lambda a: combine(a, x=a["received"][1:]), combine, errors.ShapeError, "x"),
    "weights of fewer rows": (
        lambda a: combine(a, topk_weights=torch.ones(1, TOPK)),
        combine,
        errors.ShapeError,
        "topk_weights",
    ),
    "bias of fewer tokens": (
        lambda a: combine(a, bias=torch.zeros(1, HIDDEN).bfloat16()),
        combine,
        errors.ShapeError,
        "bias",
    ),
    "bias of float32": (
        lambda a: combine(a, bias=torch.zeros(TOKENS, HIDDEN)),
        combine,
        errors.ArgumentTypeError,
        "bias",
    ),
    "three biases": (
        lambda a: combine(a, bias=(a["x"], a["x"], a["x"])),
        combine,
        errors.ArgumentTypeError,
        "bias",
    ),
    "handle of another buffer": (
        lambda a: combine(a, handle=a["foreign"]),
        combine,
        errors.HandleError,
        "handle",
    ),
    "handle of low latency": (
        lambda a: combine(a, handle=a["ll_handle"]),
        combine,
        errors.HandleError,
        "handle",
    ),
    "no handle": (lambda a: combine(a, handle=None), combine, errors.ArgumentTypeError, "handle"),
    "another operation": (
        lambda a: a["buffer"].dispatch(a["x"], handle=a["handle"]),
        combine,
        errors.MismatchError,
        "operation",
    ),
    "T over M": (
        lambda a: ll_dispatch(a, num_max_dispatch_tokens_per_rank=TOKENS - 1),
        ll_dispatch,
        errors.CapacityError,
        "x",
    ),
    "M of its own": (
        lambda a: ll_dispatch(a, num_max_dispatch_tokens_per_rank=MOST + 1),
        ll_dispatch,
        errors.MismatchError,
        "num_max_dispatch_tokens_per_rank",
    ),
    "M of 0": (
        lambda a: ll_dispatch(a, num_max_dispatch_tokens_per_rank=0),
        ll_dispatch,
        errors.RangeError,
        "num_max_dispatch_tokens_per_rank",
    ),
    "low latency of float32": (
        lambda a: ll_dispatch(a, x=a["x"].float()),
        ll_dispatch,
        errors.ArgumentTypeError,
        "x",
    ),
    "fp8 of its own": (
        lambda a: ll_dispatch(a, use_fp8=False),
        ll_dispatch,
        errors.MismatchError,
        "use_fp8",
    ),
    "H no multiple of 128": (
        lambda a: ll_dispatch(a, x=a["x"][:, :64].contiguous()),
        ll_dispatch,
        errors.ShapeError,
        "x",
    ),
    "packed scales not rounded": (
        lambda a: ll_dispatch(a, use_ue8m0=True),
        ll_dispatch,
        errors.ArgumentError,
        "use_ue8m0",
    ),
    "H no multiple of 512": (
        lambda a: ll_dispatch(a, x=a["x"][:, :128].contiguous(), use_ue8m0=True, round_scale=True),
        ll_dispatch,
        errors.ShapeError,
        "x",
    ),
    "low latency expert E": (
        lambda a: ll_dispatch(a, topk_idx=a["idx"] + EXPERTS),
        ll_dispatch,
        errors.RangeError,
        "topk_idx",
    ),
    "low latency E not of R": (
        lambda a: ll_dispatch(a, num_experts=EXPERTS + 1),
        ll_dispatch,
        errors.RangeError,
        "num_experts",
    ),
    "statistics of int64": (
        lambda a: ll_dispatch(a, cumulative_local_expert_recv_stats=ints(2).long()),
        ll_dispatch,
        errors.ArgumentTypeError,
        "cumulative_local_expert_recv_stats",
    ),
    "wait statistics of [R, R]": (
        lambda a: ll_dispatch(a, dispatch_wait_recv_cost_stats=ints(RANKS, RANKS).long()),
        ll_dispatch,
        errors.ShapeError,
        "dispatch_wait_recv_cost_stats",
    ),
    "event and hook": (
        lambda a: ll_dispatch(a, async_finish=True, return_recv_hook=True),
        ll_dispatch,
        errors.ArgumentError,
        "return_recv_hook",
    ),
    "low latency combine of float32": (
        lambda a: ll_combine(a, x=a["ll_received"].float()),
        ll_combine,
        errors.ArgumentTypeError,
        "x",
    ),
    "low latency combine of other slots": (
        lambda a: ll_combine(a, x=a["ll_received"][:, 1:].contiguous()),
        ll_combine,
        errors.ShapeError,
        "x",
    ),
    "low latency handle of another buffer": (
        lambda a: ll_combine(a, handle=a["ll_foreign"]),
        ll_combine,
        errors.HandleError,
        "handle",
    ),
    "low latency handle of dispatch": (
        lambda a: ll_combine(a, handle=a["handle"]),
        ll_combine,
        errors.HandleError,
        "handle",
    ),
    "low latency handle of four": (
        lambda a: ll_combine(a, handle=tuple(a["ll_handle"])[:4]),
        ll_combine,
        errors.ArgumentTypeError,
        "handle",
    ),
    "LogFMT without copy": (
        lambda a: ll_combine(a, use_logfmt=True, zero_copy=True),
        ll_combine,
        errors.ArgumentError,
        "use_logfmt",
    ),
    "LogFMT of its own": (
        lambda a: ll_combine(a, use_logfmt=True),
        ll_combine,
        errors.MismatchError,
        "use_logfmt",
    ),
    "a buffer for another buffer's handle": (
        lambda a: a["buffer"].get_next_low_latency_combine_buffer(a["ll_foreign"]),
        ll_combine,
        errors.HandleError,
        "handle",
    ),
    "zero copy of nothing": (
        lambda a: ll_combine(a, zero_copy=True),
        ll_combine,
        errors.ArgumentError,
        "zero_copy",
    ),
    "out of float32": (
        lambda a: ll_combine(a, out=torch.zeros(TOKENS, HIDDEN)),
        ll_combine,
        errors.ArgumentTypeError,
        "out",
    ),
    "clean with a size of its own": (
        lambda a: a["buffer"].clean_low_latency_buffer(MOST, HIDDEN + 128, EXPERTS),
        lambda a: a["buffer"].clean_low_latency_buffer(MOST, HIDDEN, EXPERTS),
        errors.MismatchError,
        "hidden",
    ),
}


def other_calls(ctx: Any, buffer_of: Any, routing: Any, bad: Any, good: Any) -> Any:
    if "a" not in ctx.scratch:
        buffer, foreign = buffer_of(ctx), deepep.Buffer(ctx.group, low_latency_mode=True, timeout=30.0)
        idx = routing(ctx.rank, RANKS, EXPERTS, TOPK, TOKENS)
        arguments = high_throughput_arguments(buffer, idx)
        received, _, _, _, handle, _ = buffer.dispatch(**arguments)
        a = {"buffer": buffer, "idx": idx, "x": arguments["x"], "weights": arguments["topk_weights"]}
        a |= {"received": received, "handle": handle, "foreign": foreign.dispatch(**arguments)[4]}
        a["ll_received"], _, a["ll_handle"], _, _ = ll_dispatch(a, use_fp8=False)
        a["ll_received"].zero_()
        a["ll_foreign"] = ll_dispatch({**a, "buffer": foreign})[2]
        ctx.scratch["a"] = a
    a = ctx.scratch["a"]
    outcome = raised(lambda: (bad if ctx.rank == BAD else good)(a))
    good(a)
    return outcome


@pytest.mark.parametrize("case", OTHERS)
def test_other_calls_refuse(world_of: Any, buffer_of: Any, routing: Any, case: str) -> None:
    bad, good, kind, argument = OTHERS[case]
    outcomes = world_of(RANKS).run(other_calls, buffer_of, routing, bad, good)
    assert len(set(outcomes)) == 1, outcomes
    assert (outcomes[0][0], outcomes[0][2:]) == (kind.__name__, (argument, BAD))
