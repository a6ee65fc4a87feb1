"""Worlds of rank processes: results, failures, deaths, hangs, rebuilding."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from deepep.sim import RankDied, Status, World, WorldError, WorldTimeout


class Own(Exception):
    """An exception type of this test module, which no rank can import."""

    def __init__(self, rank: int, word: str) -> None:
        super().__init__(f"{word} from {rank}")
        self.rank = rank
        self.word = word


def rank_sum(ctx, offset):
    total = torch.tensor([ctx.rank + offset])
    dist.all_reduce(total, group=ctx.group)
    return total


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_results_come_back_by_rank_and_the_group_works(world_of, num_ranks):
    results = world_of(num_ranks).run(rank_sum, 10)
    assert [r.item() for r in results] == [sum(range(num_ranks)) + 10 * num_ranks] * num_ranks
    assert world_of(num_ranks).run(lambda ctx: ctx.rank) == list(range(num_ranks))


def test_a_store_served_over_tcp_works_and_survives_its_ranks():
    def die(ctx):
        if ctx.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return dist.distributed_c10d._get_default_store().add("count", 1)

    with World(2, store="tcp") as world:
        assert [r.item() for r in world.run(rank_sum, 0)] == [1, 1]
        outcomes = world.try_run(die)
        assert [o.status for o in outcomes] == [Status.DIED, Status.RETURNED]
    with pytest.raises(ValueError, match="store: got 'carrier pigeon'"):
        World(2, store="carrier pigeon")


def test_arguments_per_rank_and_by_keyword(world_of):
    result = world_of(2).run(lambda ctx, a, b, *, c: (ctx.rank, a, b, c), 1, per_rank=[(5,), (6,)], c="k")
    assert result == [(0, 1, 5, "k"), (1, 1, 6, "k")]
    with pytest.raises(ValueError, match="per_rank: got 1"):
        world_of(2).run(rank_sum, per_rank=[(1,)])


def test_scratch_is_kept_and_threads_are_one(world_of):
    world = world_of(2)

    def count(ctx):
        ctx.scratch["n"] = ctx.scratch.get("n", 0) + 1
        return ctx.scratch["n"], torch.get_num_threads()

    first = world.run(count)
    assert world.run(count) == [(n + 1, 1) for n, _ in first]


def test_an_exception_comes_back_with_its_type_rank_and_traceback(world_of):
    world = world_of(4)

    def fail(ctx):
        if ctx.rank in (1, 3):
            raise Own(ctx.rank, "hello")

    with pytest.raises(WorldError) as caught:
        world.run(fail)
    failures = caught.value.failures
    assert sorted(failures) == [1, 3]
    assert isinstance(failures[3], Own)
    assert failures[3].rank == 3
    assert failures[3].word == "hello"
    assert "rank 1 raised Own: hello from 1" in str(caught.value)
    assert "test_world.py" in str(caught.value)
    assert "rank_process.py" not in str(caught.value)
    assert [r.item() for r in world.run(rank_sum, 0)] == [6] * 4


def test_what_cannot_travel_is_reported(world_of):
    with pytest.raises(WorldError, match="could not be sent"):
        world_of(1).run(lambda ctx: threading.Lock())


def test_a_rank_that_waits_for_a_failed_one_does_not_hold_up_the_report():
    with World(2, grace=0.2) as world:

        def fail(ctx):
            if ctx.rank == 0:
                raise Own(0, "early")
            time.sleep(60)

        started = time.monotonic()
        with pytest.raises(WorldError, match="rank 0 raised Own") as caught:
            world.run(fail)
        assert time.monotonic() - started < 30  # of the other's minute
        assert caught.value.ranks(Status.HUNG) == (1,)


def test_a_death_is_noticed_at_once_and_named():
    def die(ctx):
        if ctx.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier(group=ctx.group)

    with World(4) as world:
        started = time.monotonic()
        with pytest.raises(RankDied, match=r"rank 2 died \(SIGKILL\)") as caught:
            world.run(die)
        assert time.monotonic() - started < 30  # the group's own time-out is 60 s
        assert caught.value.ranks(Status.DIED) == (2,)
        assert [r.item() for r in world.run(rank_sum, 0)] == [6] * 4
        assert world.generation == 2


def test_a_crash_is_told_with_its_stack():
    def crash(ctx):
        if ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)

    with World(2) as world, pytest.raises(RankDied, match=r"rank 1 died \(SIGSEGV\)") as caught:
        world.run(crash)
    assert "in crash" in str(caught.value)


def test_try_run_tells_what_survivors_did():
    def die(ctx):
        if ctx.rank == 1:
            os._exit(7)
        return ctx.rank

    outcomes = World(3).try_run(die)
    assert [o.status for o in outcomes] == [Status.RETURNED, Status.DIED, Status.RETURNED]
    assert [o.value for o in outcomes] == [0, None, 2]
    assert outcomes[1].exitcode == 7


def test_a_hang_ends_at_the_deadline_and_shows_where():
    def hang_here(ctx):
        if ctx.rank == 1:
            dist.barrier(group=ctx.group)

    with World(2) as world:
        started = time.monotonic()
        with pytest.raises(WorldTimeout, match="rank 1 still running") as caught:
            world.run(hang_here, timeout=0.5)
        assert 0.5 <= time.monotonic() - started < 30  # the world's own time-out is 60 s
        assert isinstance(caught.value, TimeoutError)
        assert "hang_here" in str(caught.value)
        assert [r.item() for r in world.run(rank_sum, 0)] == [1, 1]


def test_kill_stop_and_resume_from_outside():
    def meet(ctx):
        dist.barrier(group=ctx.group)
        return ctx.rank

    with World(2) as world:
        world.stop(1)
        pending = world.submit(meet)
        with pytest.raises(RuntimeError, match="a run is in progress"):
            world.submit(meet)
        world.resume(1)
        assert [o.value for o in pending.outcomes()] == [0, 1]
        world.stop(0)
        pending = world.submit(meet)
        world.kill(0)
        outcomes = pending.outcomes()
        assert outcomes[0].status is Status.DIED
        assert outcomes[1].status is Status.RAISED
        pids = [r.pid for r in world.ranks]
        world.kill(1)
        assert world.run(meet, timeout=10) == [0, 1]  # killed between runs: a new world, no error
        assert pids != [r.pid for r in world.ranks]


def test_close_ends_the_processes_and_is_idempotent():
    world = World(2)
    pids = [r.pid for r in world.ranks]
    world.close()
    world.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


SCRIPT = """
import deepep.sim
print("main runs", flush=True)
world = deepep.sim.World(2)
print(world.run(lambda ctx: ctx.rank), *[r.pid for r in world.ranks], flush=True)
{end}
"""


HANG = """
import os, threading, time
threading.Timer(0.5, os.kill, (os.getpid(), 9)).start()
world.run(lambda ctx: time.sleep(60))
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "import os; os.kill(os.getpid(), 9)", HANG])
def test_a_script_without_a_guard_runs_once_and_leaves_nothing_behind(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=end))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0] == "main runs"
    assert len(lines) == 2, done.stdout + done.stderr
    assert lines[1].startswith("[0, 1] ")
    deadline = time.monotonic() + 10
    for pid in map(int, lines[1].split()[2:]):
        while _runs(pid):
            assert time.monotonic() < deadline, f"rank process {pid} outlives its parent"
            threading.Event().wait(0.02)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


INTERRUPTED = """
import signal
from deepep.sim import World
from deepep.sim.worlds import rank_handle

rank_handle.PRELOADED.append("interrupts_itself")
with World(1) as world:
    print(world.run(lambda ctx: signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()))
print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == set())
"""


def test_ctrl_c_while_ranks_start_is_for_the_parent_alone(tmp_path):
    """It reaches the whole foreground: here the fork server, at the worst moment."""
    sent = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "interrupts_itself.py").write_text(sent)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.stdout.split() == ["[True]", "True"], done.stdout + done.stderr
    assert done.stderr == ""


def test_importing_the_simulator_loads_no_hypothesis():
    code = "import sys, deepep.sim; print('hypothesis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_modules_of_a_class_of_their_own_travel() -> None:
    """torch's configuration modules: a function that uses one takes it along if the parent has it loaded."""
    import torch
    import torch._inductor.config

    from deepep.sim.worlds.travel import pack, unpack

    def threads() -> int:
        return int(torch._inductor.config.compile_threads)

    assert unpack(pack((threads,)))[0]() == torch._inductor.config.compile_threads
