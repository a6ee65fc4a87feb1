"""Calls of an ElasticBuffer: what one rank gets wrong, all refuse, and work goes on; events are heeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepep import ElasticBuffer, errors
from deepep.runtime.completion import HostCompletion
from deepep.sim import World

HIDDEN, EXPERTS, TOKENS, TOPK = 64, 4, 6, 2
SIZES = {"num_max_tokens_per_rank": 8, "hidden": HIDDEN, "num_topk": 4}


def elastic_of(ctx: Any, **options: Any) -> Any:
    """This rank's buffer with these options, kept until its world is rebuilt."""

    key = ("elastic arguments", tuple(sorted(options.items())))
    if key not in ctx.scratch:
        ctx.scratch[key] = ElasticBuffer(ctx.group, **{**SIZES, "num_gpu_timeout_secs": 30, **options})
    return ctx.scratch[key]


def rows_of(rank: int) -> dict[str, Any]:
    """Good arguments of a dispatch."""
    generator = torch.Generator().manual_seed(rank)
    return {
        "x": torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16(),
        "topk_idx": torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOPK] for _ in range(TOKENS)]),
        "topk_weights": torch.rand(TOKENS, TOPK, generator=generator),
        "num_experts": EXPERTS,
    }


# Calls: what one rank gets wrong, all refuse

Change = Callable[[dict[str, Any]], dict[str, Any]]
BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "no topk_idx": (lambda a: {"topk_idx": None}, errors.ArgumentError, "topk_idx"),
    "topk_idx flat": (lambda a: {"topk_idx": a["topk_idx"].flatten()}, errors.ShapeError, "topk_idx"),
    "an expert that is not there": (
        lambda a: {"topk_idx": a["topk_idx"] + EXPERTS},
        errors.RangeError,
        "topk_idx",
    ),
    "no num_experts": (lambda a: {"num_experts": None}, errors.ArgumentError, "num_experts"),
    "num_experts of 5": (lambda a: {"num_experts": 5}, errors.RangeError, "num_experts"),
    "too many tokens": (lambda a: {"num_max_tokens_per_rank": TOKENS - 1}, errors.CapacityError, "x"),
    "M above the buffer's": (
        lambda a: {"num_max_tokens_per_rank": 9},
        errors.CapacityError,
        "num_max_tokens_per_rank",
    ),
    "rows too long": (lambda a: {"x": torch.ones(TOKENS, 128).bfloat16()}, errors.CapacityError, "x"),
    "K above the buffer's": (
        lambda a: {"topk_idx": torch.zeros(TOKENS, 5, dtype=torch.int64), "topk_weights": None},
        errors.CapacityError,
        "topk_idx",
    ),
    "weights of float64": (
        lambda a: {"topk_weights": a["topk_weights"].double()},
        errors.ArgumentTypeError,
        "topk_weights",
    ),
    "alignment of 0": (lambda a: {"expert_alignment": 0}, errors.RangeError, "expert_alignment"),
    "more qps than there are": (lambda a: {"num_qps": 18}, errors.RangeError, "num_qps"),
    "SMs below 0": (lambda a: {"num_sms": -1}, errors.RangeError, "num_sms"),
    "padding without gaps": (lambda a: {"do_zero_padding": True}, errors.ArgumentError, "do_zero_padding"),
    "loads of int64": (
        lambda a: {"cumulative_local_expert_recv_stats": torch.zeros(2, dtype=torch.int64)},
        errors.ArgumentTypeError,
        "cumulative_local_expert_recv_stats",
    ),
    "loads of all experts": (
        lambda a: {"cumulative_local_expert_recv_stats": torch.zeros(EXPERTS, dtype=torch.int32)},
        errors.ShapeError,
        "cumulative_local_expert_recv_stats",
    ),
    "an event of something else": (
        lambda a: {"previous_event": "soon"},
        errors.ArgumentTypeError,
        "previous_event",
    ),
    "another": (
        lambda a: {"previous_event_before_epilogue": 1},
        errors.ArgumentTypeError,
        "previous_event_before_epilogue",
    ),
    "a flag that is none": (lambda a: {"do_expand": 2}, errors.ArgumentTypeError, "do_expand"),
    "a capacity without do_expand": (
        lambda a: {"num_max_expanded_tokens": 4, "do_cpu_sync": False},
        errors.ArgumentError,
        "num_max_expanded_tokens",
    ),
    "three parts of x": (lambda a: {"x": (a["x"],) * 3}, errors.ArgumentTypeError, "x"),
    "x not a tensor": (lambda a: {"x": 1.0}, errors.ArgumentTypeError, "x"),
    "x a list of no tensors": (lambda a: {"x": [1.0]}, errors.ArgumentTypeError, "x[0]"),
}


def refused(ctx: Any, call: Callable[[], Any], kind: type[Exception], argument: str) -> None:
    """`call` raises this, of rank 1's argument."""
    with pytest.raises(kind) as raised:
        call()
    assert (raised.value.argument, raised.value.rank) == (argument, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BAD)
def test_a_dispatch_is_refused_on_all_ranks(world_of: Callable[[int], World], name: str) -> None:
    change, kind, argument = BAD[name]

    def run(ctx: Any) -> None:
        buffer, given = elastic_of(ctx), rows_of(ctx.rank)
        wrong = {**given, **change(given)} if ctx.rank == 1 else given
        refused(ctx, lambda: buffer.dispatch(**wrong), kind, argument)
        buffer.combine(buffer.dispatch(**given).recv_x, buffer.dispatch(**given).handle)

    world_of(2).run(run)


WITH_HANDLE: dict[str, tuple[Change, type[Exception], str]] = {
    "topk_idx": (lambda a: {"topk_idx": a["topk_idx"]}, errors.ArgumentError, "topk_idx"),
    "loads": (
        lambda a: {"cumulative_local_expert_recv_stats": torch.zeros(2, dtype=torch.int32)},
        errors.ArgumentError,
        "cumulative_local_expert_recv_stats",
    ),
    "do_expand": (lambda a: {"do_expand": True}, errors.HandleError, "do_expand"),
    "num_experts": (lambda a: {"num_experts": 2 * EXPERTS}, errors.HandleError, "num_experts"),
    "expert_alignment": (lambda a: {"expert_alignment": 2}, errors.HandleError, "expert_alignment"),
    "num_max_tokens_per_rank": (
        lambda a: {"num_max_tokens_per_rank": 7},
        errors.HandleError,
        "num_max_tokens_per_rank",
    ),
    "other tokens": (lambda a: {"x": a["x"][:3]}, errors.ShapeError, "x"),
    "something else": (lambda a: {"handle": (1, 2)}, errors.ArgumentTypeError, "handle"),
}


@pytest.mark.parametrize("name", WITH_HANDLE)
def test_what_a_handle_does_not_go_with(world_of: Callable[[int], World], name: str) -> None:
    change, kind, argument = WITH_HANDLE[name]

    def run(ctx: Any) -> None:
        buffer, given = elastic_of(ctx), rows_of(ctx.rank)
        handle = buffer.dispatch(**given).handle
        good = {"x": given["x"], "handle": handle}
        same = {"num_experts": EXPERTS, "expert_alignment": 1, "num_max_tokens_per_rank": 8, "num_sms": 0}
        wrong = {**good, **change(given)} if ctx.rank == 1 else good
        refused(ctx, lambda: buffer.dispatch(**wrong), kind, argument)
        buffer.dispatch(**good, **same)

    world_of(2).run(run)


COMBINES: dict[str, tuple[bool, Change, type[Exception], str]] = {
    "a row less": (False, lambda a: {"x": a["x"][:-1]}, errors.ShapeError, "x"),
    "a row less, expanded": (True, lambda a: {"x": a["x"][:-1]}, errors.ShapeError, "x"),
    "rows of int32, expanded": (True, lambda a: {"x": a["x"].int()}, errors.ArgumentTypeError, "x"),
    "weights of other rows": (
        True,
        lambda a: {"topk_weights": torch.ones(3)},
        errors.ShapeError,
        "topk_weights",
    ),
    "weights of [N, K], expanded": (
        True,
        lambda a: {"topk_weights": torch.ones(len(a["x"]), TOPK)},
        errors.ShapeError,
        "topk_weights",
    ),
    "three biases": (
        False,
        lambda a: {"bias": (torch.ones(TOKENS, HIDDEN).bfloat16(),) * 3},
        errors.ArgumentTypeError,
        "bias",
    ),
    "a bias of other tokens": (
        True,
        lambda a: {"bias": torch.ones(1, HIDDEN).bfloat16()},
        errors.ShapeError,
        "bias",
    ),
    "no handle": (False, lambda a: {"handle": None}, errors.ArgumentTypeError, "handle"),
    "SMs below 0": (False, lambda a: {"num_sms": -1}, errors.RangeError, "num_sms"),
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", COMBINES)
def test_a_combine_is_refused_on_all_ranks(world_of: Callable[[int], World], name: str, single: bool) -> None:
    expand, change, kind, argument = COMBINES[name]

    def run(ctx: Any) -> None:
        buffer = elastic_of(ctx, allow_multiple_reduction=not single)
        got = buffer.dispatch(**rows_of(ctx.rank), do_expand=expand)
        good = {"x": got.recv_x, "handle": got.handle}
        wrong = {**good, **change(good)} if ctx.rank == 1 else good
        if not (single and expand and name == "no handle"):
            refused(ctx, lambda: buffer.combine(**wrong), kind, argument)
        buffer.combine(**good)

    world_of(2).run(run)


def test_a_handle_is_its_buffers_alone(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        from deepep import HandleError

        one, other = elastic_of(ctx), elastic_of(ctx, num_topk=3)
        got = one.dispatch(**rows_of(ctx.rank))
        for call in (
            lambda: other.combine(got.recv_x, got.handle),
            lambda: other.dispatch(rows_of(ctx.rank)["x"], handle=got.handle),
        ):
            with pytest.raises(HandleError, match="another buffer"):
                call()

    world_of(2).run(run)


def test_after_the_end(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        from deepep import DestroyedError

        buffer = ElasticBuffer(ctx.group, **SIZES)
        got = buffer.dispatch(**rows_of(ctx.rank))
        buffer.destroy()
        buffer.destroy()
        for call in (
            lambda: buffer.dispatch(**rows_of(ctx.rank)),
            lambda: buffer.combine(got.recv_x, got.handle),
            buffer.barrier,
            buffer.get_comm_stream,
            lambda: buffer.info,
        ):
            with pytest.raises(DestroyedError):
                call()

    world_of(2).run(run)


# Events: futures that the test holds, in the place of a stream's work


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("argument", ["previous_event", "previous_event_before_epilogue"])
def test_events_are_waited_for(world_of: Callable[[int], World], argument: str, expand: bool) -> None:
    def run(ctx: Any) -> None:
        from concurrent.futures import Future

        from deepep import EventHandle, EventOverlap

        buffer, given = elastic_of(ctx), rows_of(ctx.rank)
        for wrap in (EventHandle, lambda completion: EventOverlap(EventHandle(completion))):
            passed: Future[None] = Future()
            event = wrap(HostCompletion(passed))
            how = {"do_expand": expand, "do_cpu_sync": False, "async_with_compute_stream": True}
            got = buffer.dispatch(**given, **how, **{argument: event})
            rows = got.event.event.completion
            with pytest.raises(TimeoutError):
                _future_of(rows).result(0.2)
            passed.set_result(None)
            got.event.current_stream_wait()
            passed = Future()
            _, _, done = buffer.combine(
                got.recv_x,
                got.handle,
                async_with_compute_stream=True,
                allocate_on_comm_stream=True,
                **{argument: wrap(HostCompletion(passed))},
            )
            with pytest.raises(TimeoutError):
                _future_of(done.event.completion).result(0.2)
            passed.set_result(None)
            done.current_stream_wait()

    world_of(2).run(run)


def _future_of(completion: Any) -> Any:
    return completion.future


@pytest.mark.parametrize("expand", [False, True])
def test_an_event_that_failed_ends_the_combine_on_all_ranks(
    fresh_world: Callable[[int], World], expand: bool
) -> None:
    def run(ctx: Any) -> None:
        from concurrent.futures import Future

        from deepep import EventHandle

        buffer = elastic_of(ctx)
        got = buffer.dispatch(**rows_of(ctx.rank), do_expand=expand)
        failed: Future[None] = Future()
        failed.set_exception(RuntimeError("device lost"))
        event = EventHandle(HostCompletion(failed)) if ctx.rank == 0 else None
        with pytest.raises(RuntimeError, match="device lost"):  # on rank 1 PeerTimeoutError, with its words
            buffer.combine(got.recv_x, got.handle, previous_event_before_epilogue=event)

    fresh_world(2).run(run)


def test_a_synchronous_call_waits_for_its_events(world_of: Callable[[int], World]) -> None:
    def run(ctx: Any) -> None:
        import threading
        from concurrent.futures import Future

        from deepep import EventHandle

        buffer, given = elastic_of(ctx), rows_of(ctx.rank)
        for argument in ("previous_event", "previous_event_before_epilogue"):
            passed: Future[None] = Future()
            timer = threading.Timer(0.2, passed.set_result, (None,))
            timer.start()
            buffer.dispatch(**given, **{argument: EventHandle(HostCompletion(passed))})
            assert passed.done()

    world_of(2).run(run)
