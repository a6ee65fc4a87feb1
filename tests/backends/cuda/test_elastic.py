"""ElasticBuffer on GPUs, between two processes: the cases of every backend, large shapes, graphs, streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.elastic_cases import CASES, ElasticCase, round_trip

from deepep.sim import World

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=240) as world:
        yield world


def elastic_of(ctx: Any, **options: Any) -> Any:
    """This rank's buffer with these options, kept until its world is rebuilt."""
    import deepep

    key = ("elastic", tuple(sorted(options.items())))
    if key not in ctx.scratch:
        how = {"num_bytes": 3 << 30, "num_gpu_timeout_secs": 20, **options}
        ctx.scratch[key] = deepep.ElasticBuffer(ctx.group, **how)
    assert ctx.scratch[key].info.backend == "cuda"
    return ctx.scratch[key]


def run_case(ctx: Any, case: ElasticCase, seed: int) -> None:
    buffer = elastic_of(ctx, allow_multiple_reduction=not case.single_reduction)
    round_trip(ctx, case, seed, buffer, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("name", CASES)
def test_round_trip(pair: World, name: str) -> None:
    for seed in range(2):
        pair.run(run_case, CASES[name], seed)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.expand])
def test_round_trip_of_rows_that_the_dispatch_spreads(pair: World, name: str) -> None:
    for seed in range(2):
        pair.run(run_case, replace(CASES[name], num_sms=64), seed)


LARGE = replace(CASES["expanded"], hidden=7168, topk=8, local_experts=32, alignment=128)


NAMES = (
    *("plain", "expanded", "fp8", "no wait", "one sum", "async"),
    *("64 SMs", "fp8, 64 SMs", "no wait, 64 SMs"),
)


@pytest.mark.parametrize("tokens", [(1500, 1024), (128, 128), (1, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_large(pair: World, tokens: tuple[int, int], name: str) -> None:
    case = {
        "plain": replace(LARGE, expand=False),
        "expanded": replace(LARGE, zero_padding=True),
        "fp8": replace(LARGE, fp8=True, column_major=True, zero_padding=True),
        "no wait": replace(LARGE, waits=False, zero_padding=True),
        "one sum": replace(LARGE, single_reduction=True),
        "async": replace(LARGE, asynchronous=True, num_biases=2),
        "64 SMs": replace(LARGE, zero_padding=True, num_sms=64),
        "fp8, 64 SMs": replace(LARGE, fp8=True, column_major=True, zero_padding=True, num_sms=64),
        "no wait, 64 SMs": replace(LARGE, waits=False, zero_padding=True, num_sms=64),
    }[name]
    pair.run(run_case, replace(case, tokens=tokens), 4)


def test_captured_and_replayed(pair: World) -> None:
    """Without host wait, in a graph: new tokens with every replay, and handles' tensors with them."""

    def run(ctx: Any, expand: bool) -> None:
        from harness.device_calls import same_bits
        from harness.elastic_cases import draw, expect

        from deepep.reference import elastic as oracle

        case = replace(LARGE, tokens=(200, 200), expand=expand, zero_padding=expand, waits=False)
        buffer = elastic_of(ctx)
        rank, device = ctx.rank, torch.device("cuda", torch.cuda.current_device())
        first = draw(case, 0)[rank]
        x, idx = first.x.to(device), first.topk_idx.to(device)
        weights = first.topk_weights.to(device)

        def step() -> Any:
            got = buffer.dispatch(
                x,
                idx,
                weights,
                num_experts=case.num_experts,
                num_max_tokens_per_rank=case.num_max_tokens,
                expert_alignment=case.alignment,
                do_cpu_sync=False,
                do_expand=expand,
                do_zero_padding=expand,
            )
            return got, buffer.combine(got.recv_x * 2, got.handle, topk_weights=got.recv_topk_weights)

        for _ in range(2):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got, (sums, returned, _) = step()
        for seed in range(1, 6):
            inputs = draw(case, seed)
            x.copy_(inputs[rank].x)
            idx.copy_(inputs[rank].topk_idx)
            weights.copy_(inputs[rank].topk_weights)
            graph.replay()
            outputs = expect(case, inputs)
            want, rows = outputs[rank], len(outputs[rank].is_real)
            real = want.is_real.to(device)
            assert same_bits(got.recv_x[:rows][real], want.recv_x[want.is_real])
            handle = got.handle
            assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == want.rank_ends
            assert handle.psum_num_recv_tokens_per_expert.tolist() == want.expert_ends
            assert torch.equal(handle.recv_src_metadata[: len(want.metadata)].cpu(), want.metadata)
            combined = oracle.combine(
                [out.recv_x * 2 for out in outputs],
                inputs,
                case.num_experts,
                alignment=case.alignment,
                expanded=expand,
                topk_weights=[out.recv_topk_weights for out in outputs],
            )[rank]
            assert same_bits(sums, combined.x)
            assert same_bits(returned, combined.topk_weights)

    for expand in (False, True):
        pair.run(run, expand)


def test_no_call_without_host_wait_waits(pair: World) -> None:
    """The host comes back while the stream is still held up by what was queued before."""

    def run(ctx: Any, expand: bool, single: bool) -> None:
        from harness.elastic_cases import draw

        case = replace(LARGE, tokens=(64, 64), expand=expand, waits=False)
        buffer = elastic_of(ctx, allow_multiple_reduction=not single)
        device = torch.device("cuda", torch.cuda.current_device())
        given = draw(case, 0)[ctx.rank]
        x, idx, weights = given.x.to(device), given.topk_idx.to(device), given.topk_weights.to(device)

        def step() -> None:
            got = buffer.dispatch(
                x,
                idx,
                weights,
                num_experts=case.num_experts,
                num_max_tokens_per_rank=64,
                expert_alignment=case.alignment,
                do_cpu_sync=False,
                do_expand=expand,
            )
            buffer.combine(got.recv_x, got.handle, topk_weights=got.recv_topk_weights)
            buffer.dispatch(x, topk_weights=weights, handle=got.handle, do_expand=expand)

        step()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # torch raises where one of its functions waits
        try:
            torch.cuda._sleep(500_000_000)  # some 0.3 s
            held = torch.cuda.Event()
            held.record()
            step()
            assert not held.query()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()

    for expand, single in ((False, False), (True, False), (True, True)):
        pair.run(run, expand, single)


def test_events_order_streams(pair: World) -> None:
    """Rows that another stream writes late, and biases that a third does: read behind their events."""

    def run(ctx: Any, expand: bool) -> None:
        from harness.device_calls import same_bits

        buffer = elastic_of(ctx)
        device = torch.device("cuda", torch.cuda.current_device())
        x = torch.zeros(64, 256, dtype=torch.bfloat16, device=device)
        bias = torch.zeros_like(x)
        idx = torch.arange(64, device=device).view(64, 1) % 4
        side = torch.cuda.Stream()

        def late(target: torch.Tensor, value: float) -> Any:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(200_000_000)
                target.fill_(value)
                return buffer.capture()

        for step in range(1, 4):
            got = buffer.dispatch(
                x,
                idx,
                num_experts=4,
                num_max_tokens_per_rank=64,
                previous_event=late(x, float(step)),
                async_with_compute_stream=True,
                allocate_on_comm_stream=True,
                do_expand=expand,
            )
            with got.event:
                pass
            assert (got.recv_x == step).all()
            sums, _, event = buffer.combine(
                got.recv_x,
                got.handle,
                bias=bias,
                previous_event_before_epilogue=late(bias, 8.0 * step),
                async_with_compute_stream=True,
                allocate_on_comm_stream=True,
            )
            event.current_stream_wait()
            assert same_bits(sums, torch.full_like(x, 9.0 * step))
            buffer.barrier()
            buffer.barrier(with_cpu_sync=True)

    for expand in (False, True):
        pair.run(run, expand)


def test_repeated_experts_without_room_are_flagged(pair: World) -> None:
    def run(ctx: Any) -> None:
        buffer = elastic_of(ctx)
        device = torch.device("cuda", torch.cuda.current_device())
        x = torch.ones(16, 64, dtype=torch.bfloat16, device=device)
        how = {"num_experts": 2, "num_max_tokens_per_rank": 16, "do_expand": True, "do_cpu_sync": False}
        twice = torch.zeros(16, 2, dtype=torch.int64, device=device)
        got = buffer.dispatch(x, twice, **how)
        assert got.recv_x.shape[0] == 32
        assert int(got.handle.overflow_flag) == (1 if ctx.rank == 0 else 0)
        once = twice.clone()
        once[:, 1] = 1
        got = buffer.dispatch(x, once, **how)
        assert int(got.handle.overflow_flag) == 0
        got = buffer.dispatch(x, once, **how, num_max_expanded_tokens=20)
        assert got.recv_x.shape[0] == 20
        assert int(got.handle.overflow_flag) == 1
        sums, _, _ = buffer.combine(got.recv_x, got.handle)
        assert sums.shape == x.shape

    pair.run(run)


def test_thirty_buffers(pair: World) -> None:
    def run(ctx: Any) -> None:
        import deepep

        x = torch.ones(8, 64, dtype=torch.bfloat16, device="cuda")
        idx = torch.zeros(8, 1, dtype=torch.int64, device="cuda")
        buffers = [deepep.ElasticBuffer(ctx.group, num_bytes=64 << 20) for _ in range(30)]
        for buffer in buffers:
            buffer.dispatch(x, idx, num_experts=2, num_max_tokens_per_rank=8)
        for buffer in buffers:
            buffer.destroy()

    pair.run(run)
