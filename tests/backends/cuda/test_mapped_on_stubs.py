"""Sessions, the ring and Engram storage of the CUDA backend in rank processes on stubs: no GPU is needed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import side_primitive_cases as cases
from harness.refusals import raised

from deepep import ElasticBuffer, PeerTimeoutError
from deepep.sim import World

CPU = torch.device("cpu")


def stub_buffer(ctx: Any) -> tuple[Any, Any]:
    """A rank's buffer on stubs, and the launches of it."""
    from harness.stub_mapped import Watched

    watched = Watched(ctx)
    options = {
        "num_bytes": 4 << 20,
        "num_cpu_bytes": 2 << 20,
        "num_gpu_timeout_secs": 60,
        "backend": "stub",
        "device": "cpu",
    }
    return ElasticBuffer(ctx.group, **options), watched


def in_processes(ranks: int, run: Callable[[Any], None]) -> None:
    """Runs `run` on ranks of their own: the stubs stay in their processes."""
    world = World(ranks)
    try:
        world.run(run)
    finally:
        world.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathers_of_sessions(ranks: int) -> None:
    """Each part arrives where it belongs on every rank, to the bit, and stays until the next session."""

    def run(ctx: Any) -> None:
        buffer, _ = stub_buffer(ctx)
        for seed in range(5):
            cases.run_sessions(buffer, CPU, cases.draw_sessions(random.Random(seed)), seed)
        buffer.destroy()

    in_processes(ranks, run)


@pytest.mark.parametrize("ranks", [2, 3])
def test_sends_around_a_ring(ranks: int) -> None:
    """Each tensor arrives as it was sent, in the order of its way's sends, whatever overwrites it there."""

    def run(ctx: Any) -> None:
        buffer, _ = stub_buffer(ctx)
        for seed in range(8):
            dice = random.Random(seed)
            inflight = dice.choice((1, 2, 3))
            buffer.pp_set_config(8 * 8 * 8, inflight)
            cases.run_ring(buffer, CPU, cases.draw_ring(dice, ranks, inflight), seed)
        assert buffer.info.memory["tensors on their way around the ring"] > 0
        buffer.destroy()

    in_processes(ranks, run)


def test_neighbours_that_do_not_come() -> None:
    """The call that waited in vain returns; the next with that neighbour, either way, names it, at once. With
    the other neighbour all goes on. A rank that took too long learns that its tensor may have been written
    over; and everything is as new when the ring is configured again.
    """

    def run(ctx: Any) -> None:
        buffer, watched = stub_buffer(ctx)
        buffer.pp_set_config(64, 2)
        got = torch.zeros(4)
        if ctx.rank == 0:
            buffer.pp_send(torch.full((4,), 1.0), 1)
            buffer.pp_send(torch.full((4,), 2.0), 1)
            watched.ring.patience = 0.2
            buffer.pp_send(torch.full((4,), 3.0), 1)  # no slot is free
            for call, peer in ((buffer.pp_send, 1), (buffer.pp_recv, 1)):
                with pytest.raises(PeerTimeoutError) as caught:
                    call(got, peer)
                record = caught.value.record
                assert (record.operation, record.phase, record.waited_on) == ("pp_send", "credit", (1,))
            watched.ring.patience = 60.0
            buffer.pp_recv(got, 2)
            assert got.tolist() == [5.0] * 4
        if ctx.rank == 2:
            buffer.pp_send(torch.full((4,), 5.0), 0)
        dist.barrier(group=ctx.group)
        if ctx.rank == 1:
            buffer.pp_recv(got, 0)
            with pytest.raises(PeerTimeoutError) as caught:
                buffer.pp_recv(got, 0)
            record = caught.value.record
            assert (record.operation, record.phase, record.waited_on) == ("pp_recv", "overwritten", (0,))
        buffer.pp_set_config(64, 2)
        buffer.pp_send(torch.full((4,), float(ctx.rank)), (ctx.rank + 1) % 3)
        buffer.pp_recv(got, (ctx.rank - 1) % 3)
        assert got.tolist() == [float((ctx.rank - 1) % 3)] * 4
        buffer.destroy()

    in_processes(3, run)


def test_what_a_ring_refuses() -> None:
    """Another kind of tensor is raised by the next call, which is not made; what does not fit, by its own."""

    def run(ctx: Any) -> None:
        buffer, _ = stub_buffer(ctx)
        peer = 1 - ctx.rank
        assert raised(lambda: buffer.pp_send(torch.ones(1), peer))[0] == "ModeError"
        buffer.pp_set_config(64, 3)
        assert raised(lambda: buffer.pp_send(torch.ones(17), peer))[0] == "CapacityError"
        assert raised(lambda: buffer.pp_send(torch.ones(4, 4).T, peer))[0] == "LayoutError"
        assert raised(lambda: buffer.pp_recv(torch.ones(4), ctx.rank))[0] == "RangeError"
        for sent, taken, words in (
            (torch.ones(4), torch.zeros(5), "20 bytes, in an earlier pp_recv"),
            (torch.ones(4), torch.zeros(4, dtype=torch.int32), "another dtype of 16 bytes"),
        ):
            buffer.pp_send(sent, peer)
            buffer.pp_recv(taken, peer)
            kind, text = raised(lambda: buffer.pp_recv(taken, peer))[:2]  # noqa: B023
            assert kind == "MismatchError"
            assert words in text
            got = torch.zeros(2, dtype=torch.int64)
            buffer.pp_send(torch.full((2,), ctx.rank), peer)
            buffer.pp_recv(got, peer)
            assert got.tolist() == [peer] * 2
        torch.cuda.is_current_stream_capturing = lambda: True
        assert raised(lambda: buffer.pp_set_config(64, 2))[2] == "pp_set_config"
        torch.cuda.is_current_stream_capturing = lambda: False
        buffer.destroy()

    in_processes(2, run)


@pytest.mark.parametrize("ranks", [2, 3])
def test_entries_of_all_ranks(ranks: int) -> None:
    def run(ctx: Any) -> None:
        buffer, watched = stub_buffer(ctx)
        for seed in range(2):
            watched.barriers = 0
            cases.run_tables(buffer, CPU, [cases.draw_table(random.Random(4 * seed + i)) for i in range(4)])
            assert watched.barriers == 8
        buffer.release_memory()
        wrong = buffer.engram_fetch(torch.tensor([[0, 1 << 20]], dtype=torch.int32))
        assert raised(wrong)[0] == "RangeError"
        assert buffer.info.memory["Engram storage"] == 2 << 20  # what was written stays
        buffer.destroy()

    in_processes(ranks, run)


def test_barriers_of_a_session() -> None:
    """One when it begins, and one behind each gather; memory goes when it is released, and comes again."""

    def run(ctx: Any) -> None:
        buffer, watched = stub_buffer(ctx)
        buffer.agrs_set_config(1 << 20, 2)
        for number in (1, 2):
            with buffer.agrs_new_session():
                assert watched.barriers == 1
                for done in (1, 2):
                    got, handle = buffer.all_gather([torch.full((4,), ctx.rank), torch.ones(2)])[::2]
                    handle()
                    assert got.tolist() == [[0] * 4, [1] * 4]
                    assert watched.barriers == 1 + done
                assert buffer.info.memory["session memory"] == 1 << 20
            watched.barriers = 0
            buffer.release_memory()
            assert buffer.info.memory["session memory"] == 0, number
            assert buffer.info.memory["kept memory"] == 0
        buffer.destroy()

    in_processes(2, run)


def test_calls_that_do_not_fit_together() -> None:
    """A refusal is raised on its rank at once; the others raise what differs when the session ends."""

    def run(ctx: Any) -> None:
        buffer, _ = stub_buffer(ctx)
        buffer.agrs_set_config(1024, 3)
        for bad in (torch.ones(5), torch.ones(4).to_sparse(), torch.ones(4, dtype=torch.int32)):
            buffer.create_agrs_session()
            if ctx.rank == 1 and bad.is_sparse:
                assert raised(lambda: buffer.all_gather(bad))[0] == "LayoutError"  # noqa: B023
            else:
                buffer.all_gather(torch.ones(4) if ctx.rank == 0 else bad)[1]()
            assert raised(buffer.destroy_agrs_session)[0] == "MismatchError"
        with buffer.agrs_new_session():
            got, handle = buffer.all_gather(torch.full((4,), ctx.rank))
            handle()
            assert got.tolist() == [[0] * 4, [1] * 4]
        torch.cuda.is_current_stream_capturing = lambda: True
        assert raised(buffer.create_agrs_session)[2] == "create_agrs_session"
        torch.cuda.is_current_stream_capturing = lambda: False
        assert raised(lambda: buffer.engram_write(torch.ones(1)))[0] == "ShapeError"
        buffer.destroy()

    in_processes(2, run)


def test_a_barrier_that_a_rank_does_not_come_to() -> None:
    """The next call raises it, with the rank's name, and so do all until the sessions are configured anew."""

    def run(ctx: Any) -> None:
        buffer, watched = stub_buffer(ctx)
        buffer.agrs_set_config(1024, 4)
        buffer.create_agrs_session()
        watched.missing = 1 << (1 - ctx.rank)
        buffer.all_gather(torch.ones(4))
        for call in (lambda: buffer.all_gather(torch.ones(4)), buffer.destroy_agrs_session):
            with pytest.raises(PeerTimeoutError) as caught:
                call()
            assert caught.value.record.operation == "all_gather"
            assert caught.value.record.waited_on == (1 - ctx.rank,)
        with pytest.raises(PeerTimeoutError):
            buffer.create_agrs_session()
        watched.missing = 0
        dist.barrier(group=ctx.group)
        buffer.agrs_set_config(1024, 4)
        with buffer.agrs_new_session():
            got, handle = buffer.all_gather(torch.full((2,), ctx.rank))
            handle()
            assert got.tolist() == [[0, 0], [1, 1]]
        buffer.destroy()

    in_processes(2, run)


def test_ranks_that_are_left_out() -> None:
    """Their parts are zeros, though what lay there was not; a session from before they were is over."""

    def run(ctx: Any) -> None:
        buffer, _ = stub_buffer(ctx)
        buffer.agrs_set_config(1024, 2)
        with buffer.agrs_new_session():
            buffer.all_gather(torch.full((4,), 7))[1]()
        buffer.create_agrs_session()
        buffer.engram_write(torch.zeros(2, 8).bfloat16())
        dist.barrier(group=ctx.group)
        alone = dist.new_group([0, 1])
        if ctx.rank < 2:
            ctx.group = alone  # of those who come to barriers
            buffer.runtime.mask(2, True)
            assert raised(lambda: buffer.all_gather(torch.ones(1)))[0] == "ModeError"
            buffer.destroy_agrs_session()
            with buffer.agrs_new_session():
                got, handle = buffer.all_gather(torch.full((4,), 1 + ctx.rank))
                handle()
                assert got.tolist() == [[1] * 4, [2] * 4, [0] * 4]
            at = torch.tensor([[2, 1]], dtype=torch.int32)
            assert raised(lambda: buffer.engram_fetch(at))[0] == "ModeError"
            buffer.engram_write(torch.full((2, 8), float(ctx.rank)).bfloat16())
            assert buffer.engram_fetch(at)()[0][:, 0].tolist() == [1.0, 0.0]
            assert "left out" in raised(buffer.engram_fetch(at + 2))[1]
        dist.barrier()
        buffer.runtime.abandon()

    in_processes(3, run)
