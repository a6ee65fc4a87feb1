"""BucketReducer alone: what it asks of its communicator, bucket by bucket."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.futures import Future

from deepep.collectives import Communicator, PlanTable, ReductionPlan
from deepep.collectives.plan_table import PlanEntry
from deepep.parallel.config import ParallelConfig
from deepep.parallel.hook import BucketReducer


class Recorder:
    """In the place of a Communicator of two ranks; `refusal` is raised, if there is one."""

    hosts = ("a", "a")
    members = (0, 1)

    def __init__(self, refusal: Exception | None = None) -> None:
        self.dice: list[Any] = []
        self.refusal = refusal

    def all_reduce(self, tensor: torch.Tensor, plan: Any, *, dice: Any, **how: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.dice.append(dice)
        done: Future[torch.Tensor] = Future()
        done.set_result(tensor)
        return SimpleNamespace(get_future=lambda: done, callers=frozenset(), aside=[], seconds=0.0)

    continue_with = all_reduce


def reducer_of(comm: Any) -> BucketReducer:
    return BucketReducer(comm, ParallelConfig("fp8", min_compressed_bytes=0, seed=5))


def bucket(index: int, count: int) -> Any:
    return SimpleNamespace(
        index=lambda: index, buffer=lambda: torch.ones(8), is_last=lambda: index == count - 1
    )


def test_no_two_reductions_share_their_dice() -> None:
    """Also where the first backward has one bucket and the others three, as torch's have."""
    comm = Recorder()
    reducer = reducer_of(comm)
    for count in (1, 3, 3):
        for index in range(count):
            reducer.reduce(bucket(index, count))
    assert comm.dice == [(5, step, index) for step, count in enumerate((1, 3, 3)) for index in range(count)]


def test_outside_of_a_backward_a_refusal_is_raised_at_once() -> None:
    """A rank that has joined has no end of a backward at which to raise."""
    with pytest.raises(ConnectionError):
        reducer_of(Recorder(ConnectionError())).reduce(bucket(0, 1))


def test_the_recorder_has_the_communicators_methods() -> None:
    assert all(hasattr(Communicator, name) for name in ("all_reduce", "continue_with"))


def test_plans_follow_the_members() -> None:
    """Those who are left, those who come back, and one that has joined; not who is in none of them."""
    plan = ReductionPlan("hierarchical", "fp8", "bf16", ((0, 2), (1,)))
    table = PlanTable(plan.groups, (PlanEntry(4096, plan, 1.0, True),))
    comm: Any = Recorder()
    comm.members = (0, 1, 2)
    reducer, newcomer = BucketReducer(comm, ParallelConfig(), table), BucketReducer(comm, ParallelConfig())
    comm.members = (0, 2)
    reducer.restart()
    assert reducer.table == table.among([0, 2])
    comm.members = (0, 1, 2)
    newcomer.load_plan_state(reducer.plan_state())
    for each in (reducer, newcomer):
        each.restart()
        assert each.table == table
    newcomer.load_plan_state({"table": table.among([0, 2]).encode(), "ranks": [0, 2]})
    newcomer.restart()
    assert newcomer.table is None
