"""`Buffer` in low latency between two processes, against the oracle, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.low_latency_trips import FORMATS, LowLatencyShape, bits, check_received, prepare

from deepep.sim import World

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=120) as world:
        yield world


def buffer_of(ctx: Any, reduction: str = "expert_rank") -> Any:
    import deepep

    if "buffer" in ctx.scratch and ctx.scratch["buffer"].info.reduction != reduction:
        ctx.scratch.pop("buffer").destroy()
    if "buffer" not in ctx.scratch:
        ctx.scratch["buffer"] = deepep.Buffer(
            ctx.group, low_latency_mode=True, timeout=20.0, reduction=reduction
        )
    assert ctx.scratch["buffer"].info.operations["low-latency dispatch"] == "CUDA kernels"
    return ctx.scratch["buffer"]


def through_buffer(ctx: Any, shape: LowLatencyShape, seed: int, early: str, zero_copy: bool) -> None:
    """A round trip of `Buffer` and its bits."""
    from deepep.backends.cuda.low_latency_launch import LowLatencyArrays

    buffer = buffer_of(ctx, "exact" if shape.exact else "expert_rank")
    case = prepare(shape, seed)
    x, idx, weights = (t.cuda() for t in case.inputs[ctx.rank])
    how = {"async_finish": early == "event", "return_recv_hook": early == "hook"}
    stats = torch.full((shape.local_experts,), 5, dtype=torch.int32, device="cuda")
    received, count, handle, event, hook = buffer.low_latency_dispatch(
        *(x, idx, shape.num_max_tokens, shape.num_experts, stats),
        use_fp8=shape.fp8,
        round_scale=shape.round_scale,
        use_ue8m0=shape.ue8m0,
        topk_weights=weights if shape.with_weights else None,
        **how,
    )
    if early == "event":
        event.current_stream_wait()
    if hook is not None:
        hook()
    rows, scales = received if shape.fp8 else (received, None)
    check_received(LowLatencyArrays(rows, scales, count, handle[0], handle[1]), case.layouts[ctx.rank])
    assert torch.equal(stats.cpu(), case.layouts[ctx.rank].recv_count + 5)
    outputs = case.rows[ctx.rank].cuda()
    if zero_copy:
        buffer.get_next_low_latency_combine_buffer(handle).copy_(outputs)
    out = torch.empty((len(x), shape.hidden), dtype=torch.bfloat16, device="cuda") if zero_copy else None
    sums, event, hook = buffer.low_latency_combine(
        *(outputs, idx, weights, tuple(handle)),
        zero_copy=zero_copy,
        use_logfmt=shape.logfmt,
        out=out,
        **how,
    )
    if early == "event":
        event.current_stream_wait()
    if hook is not None:
        hook()
    assert out is None or sums is out
    assert torch.equal(bits(sums), bits(case.sums[ctx.rank]))


@pytest.mark.parametrize("early", ["sync", "event", "hook"])
@pytest.mark.parametrize("zero_copy", [False, True])
def test_buffer_where_every_row_returns(pair: World, zero_copy: bool, early: str) -> None:
    shape = LowLatencyShape((64, 50), most=64, hidden=1536, topk=8, local_experts=16, exact=True)
    for with_weights in (False, True):
        pair.run(through_buffer, replace(shape, with_weights=with_weights), 0, early, zero_copy)


@pytest.mark.parametrize("early", ["sync", "event", "hook"])
@pytest.mark.parametrize("exact", [False, True])
def test_buffer_in_logfmt(pair: World, exact: bool, early: str) -> None:
    shape = LowLatencyShape((64, 50), most=64, hidden=1536, topk=8, exact=exact, logfmt=True)
    pair.run(through_buffer, shape, 0, early, False)


@pytest.mark.parametrize("early", ["sync", "event", "hook"])
@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_buffer(pair: World, form: str, zero_copy: bool, early: str) -> None:
    shape = LowLatencyShape(
        (64, 50), most=64, hidden=1536, topk=8, local_experts=16, pattern="distinct", **FORMATS[form]
    )
    for with_weights in (False, True):
        pair.run(through_buffer, replace(shape, with_weights=with_weights), 0, early, zero_copy)


def test_buffer_at_full_size(pair: World) -> None:
    shape = LowLatencyShape(
        (128, 100), most=128, hidden=7168, topk=8, local_experts=128, pattern="distinct", fp8=True
    )
    pair.run(through_buffer, shape, 0, "sync", False)


def test_memory_grows_with_the_shapes_of_calls_and_graphs_go_on(pair: World) -> None:
    def run(ctx: Any, through: Any, shapes: list[LowLatencyShape]) -> None:
        import deepep

        if "buffer" in ctx.scratch:
            ctx.scratch.pop("buffer").destroy()
        sizes = []
        for shape in shapes:
            through(ctx, shape, 1, "sync", False)
            memory = ctx.scratch["buffer"].info.memory
            sizes.append(memory["low-latency memory"])
            assert memory["symmetric memory"] == 0
        assert sizes[0] < sizes[1] <= sizes[2] == sizes[3]
        assert isinstance(ctx.scratch["buffer"], deepep.Buffer)

    small = LowLatencyShape((5, 8), hidden=256)
    large = LowLatencyShape((64, 60), hidden=2048, topk=8)
    pair.run(run, through_buffer, [small, large, replace(large, hidden=1024, local_experts=8), small])


def test_what_one_rank_does_wrong_all_raise(pair: World) -> None:
    """A refusal, and arguments that differ: MismatchError on both, no time-out, and the buffer goes on."""

    def run(ctx: Any, through: Any, shape: LowLatencyShape) -> None:
        import deepep

        through(ctx, shape, 0, "sync", False)
        buffer = ctx.scratch["buffer"]
        x = torch.zeros((4, shape.hidden), dtype=torch.bfloat16, device="cuda")
        idx = torch.zeros((4, shape.topk), dtype=torch.int64, device="cuda")
        most = shape.num_max_tokens

        def call(num_max_tokens: int, **how: bool) -> None:
            buffer.low_latency_dispatch(x, idx, num_max_tokens, shape.num_experts, use_fp8=False, **how)
            torch.cuda.synchronize()

        # Rank 1 has too many tokens: it raises at once, rank 0 by the next call, which both make.
        if ctx.rank == 1:
            with pytest.raises(deepep.CapacityError):
                call(2)
            call(most)
        else:
            call(most)
            with pytest.raises(deepep.MismatchError):
                call(most)
        # Rank 1 wants what ranks have not agreed on: it is told so by the kernel of rank 0.
        if ctx.rank == 1:
            with pytest.raises(deepep.MismatchError):
                call(4 * most)
            call(most)
        else:
            call(most)
            with pytest.raises(deepep.MismatchError):
                call(most)
        # Both want other new sizes: they meet, and each is told the name of what differs.
        with pytest.raises(deepep.MismatchError, match="num_max_dispatch_tokens_per_rank"):
            call((8 + ctx.rank) * most)
        through(ctx, shape, 1, "hook", False)

    pair.run(run, through_buffer, LowLatencyShape((16, 16), most=16))


def test_a_captured_decode_step(pair: World) -> None:
    """Dispatch, a stand-in for experts and combine in a graph, with hooks, replayed with new inputs."""

    def run(ctx: Any, shape: LowLatencyShape, cases: Any, buffer_of: Any) -> None:
        buffer, seeds = buffer_of(ctx), range(4)
        held = [t.cuda() for t in cases(shape, 0).inputs[ctx.rank]]

        def step(hooked: bool) -> torch.Tensor:
            rows, _, handle, _, hook = buffer.low_latency_dispatch(
                *(held[0], held[1], shape.num_max_tokens, shape.num_experts),
                use_fp8=False,
                return_recv_hook=hooked,
            )
            if hook is not None:
                hook()
            sums, _, hook = buffer.low_latency_combine(
                rows * 2, held[1], held[2], handle, return_recv_hook=hooked
            )
            if hook is not None:
                hook()
            return sums

        def take(seed: int) -> None:
            for to, new in zip(held, cases(shape, seed).inputs[ctx.rank], strict=True):
                to.copy_(new)

        wanted = []
        for seed in seeds:
            take(seed)
            wanted.append(step(False).clone())
        graphs = []
        for hooked in (False, True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = step(hooked)
            graphs.append((graph, out))
        for turn in range(200):
            take(turn % 4)
            graph, out = graphs[turn % 3 % 2]
            if turn % 5 == 4:
                assert torch.equal(bits(step(turn % 2 == 0)), bits(wanted[turn % 4]))
                continue
            graph.replay()
            assert torch.equal(bits(out), bits(wanted[turn % 4]))

    pair.run(run, LowLatencyShape((32, 30), most=32), prepare, buffer_of)
