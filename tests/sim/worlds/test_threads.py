"""Worlds of threads: the same runs without processes."""

from __future__ import annotations

import threading

import pytest

from deepep.sim import Status, ThreadWorld, VirtualGroup, WorldError, WorldTimeout


def test_results_by_rank_and_a_gather_that_is_safe_to_repeat():
    def gather(ctx, times):
        return [ctx.group.all_gather_object((ctx.rank, i)) for i in range(times)]

    for result in ThreadWorld(5).run(gather, 50):
        assert result == [[(rank, i) for rank in range(5)] for i in range(50)]


def test_the_gather_hands_over_the_objects_themselves():
    def share(ctx):
        mine = [ctx.rank]
        others = ctx.group.all_gather_object(mine)
        others[ctx.rank - 1].append(ctx.rank)
        ctx.group.barrier()
        return mine

    assert ThreadWorld(3).run(share) == [[0, 1], [1, 2], [2, 0]]


def test_a_failed_rank_releases_the_others():
    def fail(ctx):
        if ctx.rank == 1:
            raise KeyError("gone")
        ctx.group.barrier()

    world = ThreadWorld(3)
    outcomes = world.try_run(fail)
    assert [type(o.error) for o in outcomes] == [
        threading.BrokenBarrierError,
        KeyError,
        threading.BrokenBarrierError,
    ]
    with pytest.raises(WorldError, match="rank 1"):
        world.run(fail)
    assert world.run(lambda ctx: ctx.group.barrier()) == [None] * 3  # a new group, not the broken one


def test_a_hung_rank_is_named():
    release = threading.Event()
    outcomes = ThreadWorld(2).try_run(lambda ctx: ctx.rank == 1 and release.wait(), timeout=0.2)
    release.set()
    assert [o.status for o in outcomes] == [Status.RETURNED, Status.HUNG]
    with pytest.raises(WorldTimeout):
        ThreadWorld(2).run(lambda ctx: ctx.rank == 1 and ctx.group.barrier(), timeout=0.2)


def test_groups_are_separate():
    a, b = VirtualGroup.create(1), VirtualGroup.create(1)
    a[0].abort()
    assert b[0].all_gather_object(3) == [3]
