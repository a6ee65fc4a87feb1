"""All-gather sessions, sends around a ring and Engram storage, of two processes, on two GPUs or on one:
pytest -m gpu tests/backends/cuda/test_mapped.py
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import side_primitive_cases as cases
from harness.refusals import raised

from deepep.sim import World

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=240) as world:
        yield world


def buffer_of(ctx: Any) -> Any:
    """This rank's buffer, kept until its world is rebuilt."""
    import deepep

    if "mapped" not in ctx.scratch:
        how = {"num_bytes": 1 << 30, "num_cpu_bytes": 256 << 20, "num_gpu_timeout_secs": 20}
        ctx.scratch["mapped"] = deepep.ElasticBuffer(ctx.group, **how)
    assert ctx.scratch["mapped"].info.backend == "cuda"
    return ctx.scratch["mapped"]


@pytest.mark.parametrize("seed", range(8))
def test_gathers_of_sessions(pair: World, seed: int) -> None:
    def run(ctx: Any) -> None:
        cases.run_sessions(buffer_of(ctx), ctx.device, cases.draw_sessions(random.Random(seed)), seed)

    pair.run(run)


@pytest.mark.parametrize("seed", range(8))
def test_entries_of_all_ranks(pair: World, seed: int) -> None:
    def run(ctx: Any) -> None:
        tables = [cases.draw_table(random.Random(8 * seed + i)) for i in range(4)]
        cases.run_tables(buffer_of(ctx), ctx.device, tables)

    pair.run(run)


def test_many_large_gathers_of_late_ranks(pair: World) -> None:
    """Streams that are late by turns: nobody reads what is not there, nor what the next session brings."""

    def run(ctx: Any) -> None:
        buffer, elements = buffer_of(ctx), 8 << 20
        size = buffer.get_agrs_num_max_session_bytes(ctx.group, [(elements,)] * 3, torch.int32)
        buffer.agrs_set_config(size, 3)
        sums = []
        for session in range(12):
            if session % 2 == ctx.rank:
                torch.cuda._sleep(20_000_000)
            with buffer.agrs_new_session():
                pending = [
                    buffer.all_gather(
                        torch.full((elements,), 100 * session + 10 * i + ctx.rank, device=ctx.device).int()
                    )
                    for i in range(3)
                ]
                for i, (got, handle) in enumerate(pending):
                    handle()
                    low, high = got.amin(1), got.amax(1)
                    sums.append((100 * session + 10 * i, low, high))
        for base, low, high in sums:
            assert low.tolist() == high.tolist() == [base, base + 1]

    pair.run(run)


def test_what_differs_is_found_when_the_session_ends(pair: World) -> None:
    def run(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        buffer.agrs_set_config(4096, 1)
        buffer.create_agrs_session()
        buffer.all_gather(torch.ones(4 + ctx.rank, device=ctx.device))[1]()
        assert raised(buffer.destroy_agrs_session)[0] == "MismatchError"
        with buffer.agrs_new_session():
            got, handle = buffer.all_gather(torch.full((4,), ctx.rank, device=ctx.device))
            handle()
            assert got.tolist() == [[0] * 4, [1] * 4]

    pair.run(run)


@pytest.mark.parametrize("seed", range(8))
def test_sends_around_a_ring(pair: World, seed: int) -> None:
    def run(ctx: Any) -> None:
        buffer, dice = buffer_of(ctx), random.Random(seed)
        inflight = dice.choice((1, 2, 3))
        buffer.pp_set_config(8 * 8 * 8, inflight)
        cases.run_ring(buffer, ctx.device, cases.draw_ring(dice, 2, inflight), seed)

    pair.run(run)


def test_many_large_sends_of_late_ranks(pair: World) -> None:
    """The hosts run ahead of their streams, which are late by turns: no slot is written before it was read,
    and none is read before it was written.
    """

    def run(ctx: Any) -> None:
        buffer, elements, peer = buffer_of(ctx), 4 << 20, 1 - ctx.rank
        buffer.pp_set_config(4 * elements, 2)
        bounds = []
        for step in range(24):
            if (step // 3) % 2 == ctx.rank:
                torch.cuda._sleep(10_000_000)
            t = torch.full((elements,), 10 * step + ctx.rank, device=ctx.device, dtype=torch.int32)
            buffer.pp_send(t, peer)
            t.fill_(-1)
            got = torch.empty_like(t)
            buffer.pp_recv(got, peer)
            bounds.append((10 * step + peer, got.amin(), got.amax()))
        for expected, low, high in bounds:
            assert (low.item(), high.item()) == (expected, expected)

    pair.run(run)


def test_what_a_ring_refuses(pair: World) -> None:
    def run(ctx: Any) -> None:
        buffer, peer = buffer_of(ctx), 1 - ctx.rank
        buffer.pp_set_config(64, 2)
        assert raised(lambda: buffer.pp_send(torch.ones(17, device=ctx.device), peer))[0] == "CapacityError"
        assert raised(lambda: buffer.pp_send(torch.ones(1), peer))[0] == "DeviceError"
        assert raised(lambda: buffer.pp_recv(torch.ones(1, device=ctx.device), ctx.rank))[0] == "RangeError"
        buffer.pp_send(torch.ones(4, device=ctx.device), peer)
        buffer.pp_recv(torch.ones(4, device=ctx.device, dtype=torch.int32), peer)
        torch.cuda.synchronize()
        got = torch.zeros(2, device=ctx.device)
        kind, text = raised(lambda: buffer.pp_recv(got, peer))[:2]
        assert kind == "MismatchError"
        assert "another dtype of 16 bytes" in text
        buffer.pp_send(torch.full((2,), 1.0 + ctx.rank, device=ctx.device), peer)
        buffer.pp_recv(got, peer)
        assert got.tolist() == [1.0 + peer] * 2

    pair.run(run)


def test_sends_in_a_graph(pair: World) -> None:
    """Both ranks' graphs are replayed, and calls outside of graphs go on behind them."""

    def run(ctx: Any) -> None:
        buffer, peer = buffer_of(ctx), 1 - ctx.rank
        buffer.pp_set_config(1024, 3)
        sent, got = torch.zeros(2, 64, device=ctx.device), torch.zeros(2, 64, device=ctx.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(2):
                buffer.pp_send(sent[i], peer)
            for i in range(2):
                buffer.pp_recv(got[i], peer)
        for step in range(7):
            sent.copy_(torch.tensor([[2.0 * step], [2.0 * step + 1]]).expand(2, 64) + 100 * ctx.rank)
            graph.replay()
            expected = [[2.0 * step + 100 * peer] * 64, [2.0 * step + 1 + 100 * peer] * 64]
            assert got.tolist() == expected
        for step in range(4):
            buffer.pp_send(torch.full((64,), float(step + 10 * ctx.rank), device=ctx.device), peer)
            buffer.pp_recv(got[0], peer)
            assert got[0].tolist() == [float(step + 10 * peer)] * 64

    pair.run(run)


def test_a_neighbour_that_does_not_come(pair: World) -> None:
    """Its kernel leaves at the deadline, the next call raises, the context lives; all is well when the ring
    is configured again. A rank that was only late learns that its tensor may have been written over.
    """

    def run(ctx: Any) -> None:
        import deepep

        how = {"num_bytes": 64 << 20, "num_gpu_timeout_secs": 3}
        buffer = deepep.ElasticBuffer(ctx.group, **how)
        buffer.pp_set_config(4096, 1)
        t, got = torch.ones(1024, device=ctx.device), torch.zeros(1024, device=ctx.device)
        if ctx.rank == 0:
            buffer.pp_send(t, 1)
            buffer.pp_send(t + 1, 1)
            torch.cuda.synchronize()
            for _ in range(2):
                with pytest.raises(deepep.PeerTimeoutError) as caught:
                    buffer.pp_send(t, 1)
                record = caught.value.record
                assert (record.operation, record.phase, record.waited_on) == ("pp_send", "credit", (1,))
            assert (t + 1).sum().item() == 2048
        torch.distributed.barrier()
        if ctx.rank == 1:
            buffer.pp_recv(got, 0)
            torch.cuda.synchronize()
            with pytest.raises(deepep.PeerTimeoutError) as caught:
                buffer.pp_recv(got, 0)
            assert caught.value.record.phase == "overwritten"
        buffer.pp_set_config(4096, 1)
        buffer.pp_send(t + ctx.rank, 1 - ctx.rank)
        buffer.pp_recv(got, 1 - ctx.rank)
        assert got.tolist() == [2.0 - ctx.rank] * 1024
        buffer.destroy()

    pair.run(run)


def test_a_neighbour_dies() -> None:
    def run(ctx: Any) -> Any:
        import deepep

        buffer = deepep.ElasticBuffer(ctx.group, num_bytes=64 << 20, num_gpu_timeout_secs=3)
        buffer.pp_set_config(4096, 1)
        got = torch.zeros(1024, device=ctx.device)
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        buffer.pp_recv(got, 1)
        torch.cuda.synchronize()
        with pytest.raises(deepep.PeerTimeoutError) as caught:
            buffer.pp_recv(got, 1)
        assert got.sum().item() == got.sum().item()
        buffer.runtime.abandon()
        return caught.value.record

    with World(2, backend="nccl", timeout=240) as world:
        outcomes = world.try_run(run, timeout=120)
    assert [outcome.status.name for outcome in outcomes] == ["RETURNED", "DIED"]
    record = outcomes[0].value
    assert (record.operation, record.phase, record.waited_on) == ("pp_recv", "tensor", (1,))
