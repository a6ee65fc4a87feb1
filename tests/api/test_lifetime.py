"""Several buffers, subgroups, other groups than torch's, destruction,
and processes that leave without a word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import deepep

pytestmark = pytest.mark.alone


def there_and_back(buffer: Any, routing: Any, factor: float = 1.0) -> None:
    """A dispatch and a combine whose result is known: every token comes back once per rank it went to."""
    num_experts = 2 * buffer.group_size
    idx = routing(buffer.rank, buffer.group_size, num_experts, 2, 4)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts)
    x = torch.full((4, 16), factor * (buffer.rank + 1)).bfloat16()
    received, *_, handle, _ = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert)
    combined = buffer.combine(received, handle)[0]
    assert torch.equal(combined, x * in_rank.sum(1, keepdim=True))


def two_buffers(ctx: Any, routing: Any) -> None:
    first, second = (deepep.Buffer(ctx.group, timeout=30.0) for _ in range(2))
    for i in range(3):
        there_and_back(first, routing, 1 + i)
        there_and_back(second, routing, 10 + i)
    # At the same time, from two threads, in whatever order each rank runs them.
    errors = []

    def work(buffer: Any, factor: float) -> None:
        try:
            for i in range(5):
                there_and_back(buffer, routing, factor + i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(b, f)) for b, f in ((first, 1.0), (second, 100.0))]
    for thread in threads[:: -1 if ctx.rank else 1]:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    # The end of one is nothing to the other.
    first.destroy()
    there_and_back(second, routing)
    second.destroy()


def test_two_buffers_in_one_process(world_of: Any, routing: Any) -> None:
    world_of(3).run(two_buffers, routing)


def subgroups(ctx: Any, routing: Any) -> None:
    import torch.distributed as dist

    # Ranks that belong to different numbers of groups, as in real meshes.
    low = dist.new_group([0, 1])
    high = dist.new_group([1, 3])
    alone = dist.new_group([2])
    if ctx.rank == 1:
        dist.new_group([1], use_local_synchronization=True)
    # In an order that all share, as for any collective; 1 takes part in both.
    for group, members in ((low, [0, 1]), (high, [1, 3]), (alone, [2])):
        if ctx.rank in members:
            buffer = deepep.Buffer(group, timeout=30.0)
            assert (buffer.rank, buffer.group_size) == (members.index(ctx.rank), len(members))
            there_and_back(buffer, routing)
            buffer.destroy()
    whole = deepep.Buffer(ctx.group, timeout=30.0)
    there_and_back(whole, routing)
    whole.destroy()


def test_buffers_of_subgroups(fresh_world: Any, routing: Any) -> None:
    fresh_world(4).run(subgroups, routing)


def world_group(ctx: Any, routing: Any) -> None:
    import torch.distributed as dist

    buffer = deepep.Buffer(dist.group.WORLD, timeout=30.0)
    there_and_back(buffer, routing)
    buffer.destroy()


def test_the_default_group(world_of: Any, routing: Any) -> None:
    world_of(2).run(world_group, routing)


def communicator(ctx: Any, routing: Any) -> None:
    """An object with mpi4py's interface, over the group that is there."""
    import torch.distributed as dist

    class Comm:
        def Get_rank(self) -> int:
            return ctx.rank

        def Get_size(self) -> int:
            return ctx.num_ranks

        def allgather(self, value: Any) -> list[Any]:
            everyone = [None] * ctx.num_ranks
            dist.all_gather_object(everyone, value, group=ctx.group)
            return everyone

    comm = Comm()
    for _ in range(2):
        buffer = deepep.Buffer(None, comm=comm, timeout=30.0)
        assert (buffer.rank, buffer.group_size) == (ctx.rank, ctx.num_ranks)
        there_and_back(buffer, routing)
        buffer.destroy()


def test_a_communicator_instead_of_a_group(fresh_world: Any, routing: Any) -> None:
    fresh_world(2).run(communicator, routing)


def backends(ctx: Any) -> None:
    from deepep.runtime import backends as registry

    for backend in ("reference", None):
        buffer = deepep.Buffer(ctx.group, backend=backend, timeout=30.0)
        assert buffer.info.backend == "reference"
        assert buffer.info.device == torch.device("cpu")
        buffer.destroy()
    with pytest.raises(deepep.RangeError, match="backend: got 'quick'"):
        deepep.Buffer(ctx.group, backend="quick")
    os.environ["DEEPEP_BACKEND"] = "reference"
    os.environ["DEEPEP_TIMEOUT"] = "12.5"
    try:
        buffer = deepep.Buffer(ctx.group)
        assert buffer.info.timeout == 12.5
        buffer.destroy()
    finally:
        del os.environ["DEEPEP_BACKEND"], os.environ["DEEPEP_TIMEOUT"]
    with pytest.raises(deepep.RangeError, match="timeout"):
        deepep.Buffer(ctx.group, timeout=0)
    no_group = registry.Backend("none", lambda: (True, ""), lambda g: (False, "it serves nobody"), None)
    registry.register(no_group)
    try:
        assert [b.name for b in registry.backends()][-2:] == ["none", "reference"]
        assert registry.choose(None, ctx.group)[0].name == "reference"
        with pytest.raises(deepep.RangeError, match="none: it serves nobody"):
            registry.choose("none", ctx.group)
    finally:
        registry._backends.pop("none")


@pytest.mark.skipif("DEEPEP_BACKEND" in os.environ, reason="DEEPEP_BACKEND has chosen one")
def test_the_choice_of_a_backend(world_of: Any) -> None:
    world_of(2).run(backends)


def forgotten(ctx: Any, routing: Any) -> int:
    """Buffers that are dropped, not destroyed: their threads and connections go with them."""
    import gc
    import weakref

    def threads() -> int:
        return sum(thread.name.startswith("deepep-rank") for thread in threading.enumerate())

    before = threads()
    for _ in range(3):
        buffer = deepep.Buffer(ctx.group, timeout=30.0)
        there_and_back(buffer, routing)
        engine = weakref.ref(buffer.runtime)
        del buffer
        gc.collect()
        assert engine() is None
    assert threads() == before
    return before


def test_forgotten_buffers_leave_nothing_behind(fresh_world: Any, routing: Any) -> None:
    assert fresh_world(2).run(forgotten, routing) == [0, 0]


SCRIPT = """
import datetime, json, os, sys, time
import torch, torch.distributed as dist
import deepep

def rank_main(scenario, rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, scenario), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    buffer = deepep.Buffer(dist.group.WORLD, low_latency_mode=True, device="cpu", timeout=20.0)
    x, idx = torch.ones(4, 128).bfloat16(), torch.tensor([[0], [1], [0], [1]])
    dispatch = lambda **how: buffer.low_latency_dispatch(x, idx, 4, 2, use_fp8=False, **how)
    received, count, handle, _, _ = dispatch()
    if scenario == "plain":
        pass
    elif scenario == "group first":
        dist.destroy_process_group()
    elif scenario == "hook":
        dispatch(return_recv_hook=True)
    elif scenario == "exception":
        if rank == 0:
            dispatch(return_recv_hook=True)
            raise KeyError("between send and hook")
    elif scenario == "under way":
        # Never waited for: it is given its chance, because the peer does wait.
        event = buffer.low_latency_combine(received, idx, torch.ones(4, 1), handle, async_finish=True)[1]
        if rank == 1:
            time.sleep(0.2)
            event.current_stream_wait()

children = {}
for scenario in ("plain", "group first", "hook", "exception", "under way"):
    for rank in range(2):
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            rank_main(scenario, rank, sys.argv[1])
            sys.exit(0)
        children[pid] = (scenario, rank, begun)
    while children:
        pid, status = os.wait()
        scenario, rank, begun = children.pop(pid)
        print(json.dumps([scenario, rank, os.waitstatus_to_exitcode(status), time.monotonic() - begun]))
"""


def test_processes_that_leave_without_destroying(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) == 10, done.stdout
    for scenario, rank, status, seconds in ends:
        assert status == (1 if scenario == "exception" and rank == 0 else 0), (scenario, rank, status)
        assert seconds < 15.0, (scenario, rank, seconds)
    assert time.monotonic() - begun < 110


def destroyed_out_of_step(ctx: Any, routing: Any) -> str:
    """One rank destroys while the others work on: they learn, at once."""
    buffer = deepep.Buffer(ctx.group, timeout=20.0)
    there_and_back(buffer, routing)
    if ctx.rank == 0:
        buffer.destroy()
        return ""
    try:
        there_and_back(buffer, routing)
    except deepep.MismatchError as error:
        return str(error)
    return "no error"


def test_destroying_out_of_step(fresh_world: Any, routing: Any) -> None:
    results = fresh_world(3).run(destroyed_out_of_step, routing)
    assert results[0] == ""
    assert results[1] == results[2]
    assert "operation: got dispatch" in results[1]
    assert "allowed: destroy" in results[1]
