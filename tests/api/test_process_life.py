"""The life of a rank's process: signals, forks, and its end, as its peers and its children see them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch.distributed as dist
from harness.rank_threads import raised, works

import deepep

pytestmark = pytest.mark.alone

LONG = 60.0  # a time-out that no test waits for


def interrupted(ctx: Any) -> Any:
    """Ctrl-C on rank 1 while it waits for the others."""
    buffer = deepep.Buffer(ctx.group, timeout=LONG)
    assert works(buffer, ctx.rank, ctx.num_ranks)
    found = None
    if ctx.rank == 1:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        found = raised(lambda: works(buffer, ctx.rank, ctx.num_ranks))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    dist.barrier(group=ctx.group)
    if ctx.rank != 1:
        found = raised(lambda: works(buffer, ctx.rank, ctx.num_ranks))
    dist.barrier(group=ctx.group)
    assert works(buffer, ctx.rank, ctx.num_ranks)
    buffer.destroy()
    return type(found).__name__, str(found)


def test_ctrl_c_in_a_call(fresh_world: Any) -> None:
    """The rank gets its KeyboardInterrupt, the others learn of it in the same call, and all go on."""
    first, second, third = fresh_world(3).run(interrupted)
    assert second[0] == "KeyboardInterrupt"
    for kind, text in (first, third):
        assert kind == "PeerTimeoutError"
        assert "rank 1 raised KeyboardInterrupt" in text


def forking(ctx: Any) -> Any:
    """Rank 1 forks; the child uses the buffer, drops it, and ends with its exit handlers."""
    import atexit
    import gc

    buffer = deepep.Buffer(ctx.group, timeout=LONG)
    assert works(buffer, ctx.rank, ctx.num_ranks)
    status = 0
    if ctx.rank == 1:
        child = os.fork()
        if child == 0:
            refused = isinstance(raised(lambda: works(buffer, 1, ctx.num_ranks)), deepep.DestroyedError)
            buffer.destroy()
            del buffer
            gc.collect()
            atexit._run_exitfuncs()
            os._exit(0 if refused else 3)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    dist.barrier(group=ctx.group)
    assert works(buffer, ctx.rank, ctx.num_ranks)
    buffer.destroy()
    return status


def test_a_forked_child_gets_an_error_and_the_rank_lives(fresh_world: Any) -> None:
    assert fresh_world(2).run(forking) == [0, 0]


WORLD = """
import atexit, os, sys
from deepep.sim import World
world = World(2, store="tcp")
assert world.run(lambda ctx: ctx.rank) == [0, 1]
child = os.fork()
if child == 0:
    del world
    atexit._run_exitfuncs()  # multiprocessing's among them, which end the children that it knows of
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.path.isdir(world._folder.name))
print(world.run(lambda ctx: ctx.rank), world.generation)
world.close()
print([name for name in os.listdir(sys.argv[1]) if name.startswith("deepep")])
"""


@pytest.mark.own_backend
def test_a_forked_child_ends_nothing_of_a_world(tmp_path: Any) -> None:
    """Neither its ranks, nor its folder, nor its store; whose own end leaves nothing behind."""
    ran = subprocess.run(
        [sys.executable, "-c", WORLD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=LONG,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TMPDIR": str(tmp_path)},
    )
    assert ran.stdout.splitlines() == ["0 True", "[0, 1] 1", "[]"], ran.stdout + ran.stderr


def closing(ctx: Any) -> int:
    """A child of rank 0 ends: the parent's engine is not told, whatever a backend would do then."""
    import atexit

    from deepep.backends.reference.engine import ReferenceEngine

    parent, leave, close = os.getpid(), ReferenceEngine.leave, ReferenceEngine.close

    def only_here(function: Any) -> Any:
        def call(engine: Any) -> None:
            if os.getpid() != parent:
                os._exit(4)
            function(engine)

        return call

    ReferenceEngine.leave, ReferenceEngine.close = only_here(leave), only_here(close)
    buffer, other = (deepep.Buffer(ctx.group, timeout=LONG) for _ in range(2))
    child = os.fork()
    if child == 0:
        other.destroy()
        atexit._run_exitfuncs()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    dist.barrier(group=ctx.group)
    for one in (buffer, other):
        assert works(one, ctx.rank, ctx.num_ranks)
        one.destroy()
    return status


def test_a_forked_child_closes_no_engine(fresh_world: Any) -> None:
    assert fresh_world(2).run(closing) == [0, 0]


ENDS = """
import os, signal, sys, threading, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from harness.rank_threads import exchange
from deepep import Buffer
rank, how = int(sys.argv[1]), sys.argv[4]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with none
sign = sys.argv[2] + ".ends"

def interrupt():
    open(sign, "w").close()
    os.kill(os.getpid(), signal.SIGINT)

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
buffer = Buffer(dist.group.WORLD, timeout=60.0)
exchange(buffer, rank, 2)
if rank == 0:
    if how == "interrupt":
        threading.Timer(0.5, interrupt).start()
        exchange(buffer, rank, 2)
    elif how == "leave":
        open(sign, "w").close()
        sys.exit(0)
else:
    try:
        import time
        while not os.path.exists(sign):  # or it would take part in the call that is to be interrupted
            time.sleep(0.02)
        time.sleep(0.5)
        exchange(buffer, rank, 2)
    except Exception as error:
        print(type(error).__name__, error.record.waited_on, flush=True)
        os._exit(0)
"""


def ends(folder: Any, how: str) -> tuple[int, str]:
    """The status of rank 0, and what rank 1 says."""
    arguments = [str(folder / how), os.path.dirname(os.path.dirname(__file__)), how]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ENDS, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    said = ranks[1].communicate(timeout=LONG + 30)[0]
    return ranks[0].wait(30), said.strip()


def test_processes_that_end_in_the_middle(tmp_path: Any) -> None:
    """By Ctrl-C in a call, or without `destroy`: no abort, and the peer is told with the name."""
    status, said = ends(tmp_path, "interrupt")
    assert (status, said) == (-signal.SIGINT, "PeerTimeoutError (0,)")
    status, said = ends(tmp_path, "leave")
    assert (status, said) == (0, "PeerTimeoutError (0,)")
