"""Neighbours that do not come, ranks that die or are left out: who is named, and who waits for whom."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.refusals import raised

from deepep import ElasticBuffer, PeerTimeoutError
from deepep.sim import World

pytestmark = pytest.mark.alone
SHORT = 0.3
"""Seconds of a wait that is in vain."""


def test_no_credit_without_a_receiver(fresh_world: Callable[[int], World]) -> None:
    """As many sends as may be under way return by themselves; the next one waits, and names the neighbour.
    Nothing passes after it, in that direction or back, until all configure the ring again.
    """

    def run(ctx: Any) -> None:
        buffer = ElasticBuffer(ctx.group, num_bytes=2 << 20, num_gpu_timeout_secs=60)
        buffer.pp_set_config(64, 2)
        if ctx.rank == 0:
            phases: list[tuple[str, str]] = []
            buffer.runtime.observe(lambda operation, phase: phases.append((operation, phase)))
            for value in range(2):
                buffer.pp_send(torch.full((4,), value), 1)
            assert phases == []
            buffer.runtime._control.timeout = SHORT
            for _ in range(2):
                with pytest.raises(PeerTimeoutError) as caught:
                    buffer.pp_send(torch.zeros(4), 1)
                record = caught.value.record
                assert (record.operation, record.waited_on) == ("pp_send", (1,))
                assert (record.expected, record.seen) == (1, 0)
            assert phases == [("pp_send", "credit")]
            buffer.runtime._control.timeout = 60.0
        dist.barrier(group=ctx.group)
        if ctx.rank == 1:
            with pytest.raises(PeerTimeoutError) as caught:
                buffer.pp_recv(torch.zeros(4, dtype=torch.int64), 0)
            assert caught.value.record.waited_on == (0,)
        buffer.pp_set_config(64, 2)
        got = torch.zeros(1)
        if ctx.rank == 0:
            buffer.pp_send(torch.ones(1), 1)
        else:
            buffer.pp_recv(got, 0)
            assert got.tolist() == [1.0]
        buffer.destroy()

    fresh_world(2).run(run)


def test_one_neighbour_is_silent(fresh_world: Callable[[int], World]) -> None:
    """The rank that waits names it; what comes from the other side arrives all the same."""

    def run(ctx: Any) -> None:
        buffer = ElasticBuffer(ctx.group, num_bytes=2 << 20, num_gpu_timeout_secs=60)
        buffer.pp_set_config(64, 1)
        got = torch.zeros(3)
        if ctx.rank == 0:
            buffer.runtime._control.timeout = SHORT
            with pytest.raises(PeerTimeoutError) as caught:
                buffer.pp_recv(got, 2)
            assert (caught.value.record.operation, caught.value.record.phase) == ("pp_recv", "header")
            assert caught.value.record.waited_on == (2,)
            buffer.runtime._control.timeout = 60.0
            buffer.pp_recv(got, 1)
            assert got.tolist() == [1.0] * 3
            buffer.pp_send(got + 1, 1)
        elif ctx.rank == 1:
            buffer.pp_send(torch.ones(3), 0)
            buffer.pp_recv(got, 0)
            assert got.tolist() == [2.0] * 3
        dist.barrier(group=ctx.group)
        buffer.destroy()

    fresh_world(3).run(run)


def test_a_neighbour_dies(fresh_world: Callable[[int], World]) -> None:
    """Whoever receives from it, or sends there beyond its credit, learns of it at once."""

    def run(ctx: Any) -> Any:
        buffer = ElasticBuffer(ctx.group, num_bytes=2 << 20, num_gpu_timeout_secs=100)
        buffer.pp_set_config(64, 1)
        store = dist.distributed_c10d._get_default_store()
        if ctx.rank == 2:
            store.wait(["sent"])
            os.kill(os.getpid(), signal.SIGKILL)
        call = buffer.pp_recv if ctx.rank == 0 else buffer.pp_send
        if ctx.rank == 1:
            call(torch.zeros(4), 2)  # it has credit for one
            store.set("sent", "1")
        with pytest.raises(PeerTimeoutError) as caught:
            call(torch.zeros(4), 2)
        return caught.value.record

    outcomes = fresh_world(3).try_run(run, timeout=60)
    assert [outcome.status.name for outcome in outcomes] == ["RETURNED", "RETURNED", "DIED"]
    assert all(outcome.value.waited_on == (2,) for outcome in outcomes[:2])


def test_a_gather_that_a_rank_does_not_come_to(fresh_world: Callable[[int], World]) -> None:
    def run(ctx: Any) -> Any:
        buffer = ElasticBuffer(ctx.group, num_bytes=2 << 20, num_gpu_timeout_secs=100)
        buffer.agrs_set_config(1024, 2)
        buffer.create_agrs_session()
        one, handle = buffer.all_gather(torch.ones(4))
        handle()
        assert one.tolist() == [[1.0] * 4] * 3
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        _, handle = buffer.all_gather(torch.ones(4))
        with pytest.raises(PeerTimeoutError) as caught:
            handle()
        return caught.value.record

    outcomes = fresh_world(3).try_run(run, timeout=60)
    assert outcomes[1].status.name == "DIED"
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.ok, outcome
        assert (outcome.value.operation, outcome.value.waited_on) == ("all_gather", (1,))


def test_a_session_waits_for_those_who_read_the_last(fresh_world: Callable[[int], World]) -> None:
    """Until the slowest rank begins the next session, nobody has, and what it reads is the last one's."""

    def run(ctx: Any) -> None:
        buffer = ElasticBuffer(ctx.group, num_bytes=2 << 20, num_gpu_timeout_secs=100)
        buffer.agrs_set_config(1024, 1)
        with buffer.agrs_new_session():
            got, handle = buffer.all_gather(torch.full((4,), ctx.rank))
            handle()

        def go_on() -> None:
            with buffer.agrs_new_session():
                buffer.all_gather(torch.full((4,), 10 + ctx.rank))[1]()

        if ctx.rank == 0:
            ahead = threading.Thread(target=go_on)
            ahead.start()
            ahead.join(SHORT)
            assert ahead.is_alive()
        dist.barrier(group=ctx.group)
        if ctx.rank == 1:
            assert got.tolist() == [[0] * 4, [1] * 4]
            go_on()
        else:
            ahead.join()
        assert got.tolist() == [[10] * 4, [11] * 4]  # the same memory: it is a session's
        buffer.destroy()

    fresh_world(2).run(run)


def test_a_fetch_asks_nobody(fresh_world: Callable[[int], World]) -> None:
    """The owner of the entries is somewhere else meanwhile."""

    def run(ctx: Any) -> None:
        buffer = ElasticBuffer(ctx.group, num_bytes=4 << 20, num_cpu_bytes=2 << 20)
        buffer.engram_write(torch.full((2, 8), float(ctx.rank)).bfloat16())
        if ctx.rank == 0:
            data, sf = buffer.engram_fetch(torch.tensor([[3, 1]], dtype=torch.int32))()
            assert data[:, 0].tolist() == [1.0, 0.0]
            assert sf is None
        dist.barrier(group=ctx.group)
        buffer.destroy()

    fresh_world(2).run(run)


def test_ranks_that_are_left_out(fresh_world: Callable[[int], World]) -> None:
    """Their parts are zeros, their entries cannot be fetched, and nothing is sent to them."""

    def run(ctx: Any) -> None:
        buffer = ElasticBuffer(ctx.group, num_bytes=4 << 20, num_cpu_bytes=2 << 20, num_gpu_timeout_secs=60)
        buffer.agrs_set_config(1024, 1)
        if ctx.rank < 2:
            buffer.runtime.mask(2, True)
            buffer.agrs_set_config(1024, 1)
            with buffer.agrs_new_session():
                got, handle = buffer.all_gather(torch.full((2,), 1 + ctx.rank))
                handle()
                assert got.tolist() == [[1, 1], [2, 2], [0, 0]]
            buffer.engram_write(torch.full((2, 8), float(ctx.rank)).bfloat16())
            fetch = buffer.engram_fetch
            assert fetch(torch.tensor([[2]], dtype=torch.int32))()[0][0, 0] == 1.0
            hook = fetch(torch.tensor([[4]], dtype=torch.int32))
            assert "an entry of rank 2, which is left out" in raised(hook)[1]
            buffer.pp_set_config(64, 1)
            with pytest.raises(PeerTimeoutError, match="left out"):
                buffer.pp_send(torch.ones(1), 2)
            if ctx.rank == 0:
                buffer.pp_send(torch.ones(1), 1)
            else:
                buffer.pp_recv(torch.ones(1), 0)
        dist.barrier(group=ctx.group)
        buffer.runtime.abandon()

    fresh_world(3).run(run)
