"""Bad input on one rank: the same typed error on every rank,
naming the rank and the argument; then work goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepep
from deepep import errors

RANKS, BAD, TOKENS, TOPK, EXPERTS, HIDDEN, MOST = 3, 1, 4, 2, 6, 512, 8
Call = Callable[[Any, dict[str, Any]], Any]


def high_throughput_arguments(buffer: Any, idx: torch.Tensor) -> dict[str, Any]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
    return {
        "x": torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16),
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": idx,
        "topk_weights": torch.ones(TOKENS, TOPK),
    }


def fp8(arguments: dict[str, Any], **scales: Any) -> dict[str, Any]:
    shape, dtype = scales.get("shape", (TOKENS, 4)), scales.get("dtype", torch.float32)
    return {"x": (torch.zeros(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn), torch.ones(shape).to(dtype))}


# what is wrong -> (the arguments that rank 1 passes instead, the error, the argument it names)
DISPATCH: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "x not a tensor": (lambda a: {"x": [1.0]}, errors.ArgumentTypeError, "x"),
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


def raised(call: Callable[[], Any]) -> tuple[str, str, str, int | None]:
    """Type, message, argument and rank of what `call` raises."""
    try:
        call()
    except errors.ArgumentError as error:
        return type(error).__name__, str(error), error.argument, error.rank
    raise AssertionError("nothing was raised")


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


# Combine, low latency and modes: (what rank 1 does, what the others do, error, argument). `a` has the buffer
# and
# everything that a good call needs.


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


def wrong_modes(ctx: Any) -> list[str]:
    plain = deepep.Buffer(ctx.group, timeout=30.0)
    x, idx = torch.ones(2, 128).bfloat16(), torch.zeros(2, 1, dtype=torch.int64)
    calls = (
        lambda: plain.low_latency_dispatch(x, idx, 4, ctx.num_ranks),
        lambda: plain.low_latency_combine(x, idx, torch.ones(2, 1), None),
        lambda: plain.clean_low_latency_buffer(4, 128, ctx.num_ranks),
        lambda: plain.get_next_low_latency_combine_buffer(None),
        lambda: plain.low_latency_update_mask_buffer(0, True),
        lambda: plain.low_latency_query_mask_buffer(ints(ctx.num_ranks)),
        plain.low_latency_clean_mask_buffer,
    )
    outcomes = [raised(call)[0] for call in calls]
    plain.destroy()
    return outcomes


def test_calls_in_the_wrong_mode(world_of: Any) -> None:
    for outcomes in world_of(2).run(wrong_modes):
        assert outcomes == ["ModeError"] * 7


def constructors(ctx: Any) -> list[Any]:
    import threading

    bad, threads = ctx.rank == 1, threading.active_count()
    outcomes = [
        raised(lambda: deepep.Buffer(ctx.group, num_nvl_bytes=100 if bad else 128, timeout=30.0)),
        raised(lambda: deepep.Buffer(ctx.group, num_rdma_bytes=-128 if bad else 0, timeout=30.0)),
        raised(lambda: deepep.Buffer(ctx.group, low_latency_mode=bad, timeout=30.0)),
        raised(lambda: deepep.Buffer(ctx.group, enable_shrink=bad, timeout=30.0)),
    ]
    deepep.Buffer(ctx.group, timeout=30.0).destroy()
    for thread in threading.enumerate():
        if thread.name.startswith("deepep-rank") and threading.active_count() > threads:
            thread.join(5.0)
    assert threading.active_count() == threads
    return outcomes


def test_constructors_that_do_not_fit(world_of: Any) -> None:
    outcomes = world_of(2).run(constructors)
    assert outcomes[0] == outcomes[1]
    assert [(o[0], *o[2:]) for o in outcomes[0]] == [
        ("RangeError", "num_nvl_bytes", 1),
        ("RangeError", "num_rdma_bytes", 1),
        ("MismatchError", "low_latency", 1),
        ("MismatchError", "masks", 1),
    ]


def test_a_buffer_needs_a_group() -> None:
    with pytest.raises(ValueError, match="group, comm"):
        deepep.Buffer(None)
    with pytest.raises(errors.ArgumentTypeError, match="mpi4py"):
        deepep.Buffer(None, comm=object())


def destroyed(ctx: Any) -> list[str]:
    idx = torch.zeros(2, 1, dtype=torch.int64)
    buffer = deepep.Buffer(ctx.group, explicitly_destroy=True, timeout=30.0, low_latency_mode=True)
    other = deepep.Buffer(ctx.group, timeout=30.0)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, ctx.num_ranks)
    x = torch.ones(2, 8).bfloat16()
    received, *_, handle, _ = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert)
    buffer.destroy()
    buffer.destroy()
    names = []
    for call in (
        lambda: buffer.combine(received, handle),
        lambda: buffer.dispatch(x, handle),
        lambda: buffer.get_dispatch_layout(idx, ctx.num_ranks),
        lambda: buffer.low_latency_dispatch(x, idx, 4, ctx.num_ranks),
        lambda: buffer.get_local_buffer_tensor(torch.uint8),
        buffer.get_comm_stream,
    ):
        try:
            call()
        except errors.DestroyedError as error:
            names.append(type(error).__name__)
    names.append(raised(lambda: other.combine(received, handle))[0])
    other.destroy()
    return names


def test_a_destroyed_buffer_and_its_handles(world_of: Any) -> None:
    for names in world_of(2).run(destroyed):
        assert names == ["DestroyedError"] * 6 + ["HandleError"]


def test_errors_keep_their_parts_when_they_travel() -> None:
    import pickle

    error = errors.CapacityError("num_worst_tokens", "1", "at least 2", 3)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.CapacityError
    assert (copy.argument, copy.got, copy.allowed, copy.rank) == ("num_worst_tokens", "1", "at least 2", 3)
    assert str(copy) == str(error) == "rank 3: num_worst_tokens: got 1; allowed: at least 2"
    record = errors.FaultRecord("dispatch", "payload", 0, (2,), 3, 2, 1.5)
    fault = pickle.loads(pickle.dumps(errors.PeerTimeoutError(record, "closed")))
    assert fault.record == record
    assert isinstance(fault, TimeoutError)
    assert "rank 2" in str(fault)
    assert issubclass(errors.ArgumentTypeError, TypeError)
    assert issubclass(errors.ArgumentError, ValueError)
