"""Attempts: a rank that dies at any moment of a step, and the weights that the others should have then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepep
from deepep.collectives import PlanTable, ReductionPlan
from deepep.collectives.plan_table import PlanEntry
from deepep.errors import PeerTimeoutError
from deepep.parallel.config import ParallelConfig, config_among
from deepep.sim import World
from deepep.sim.faults.fault import Effect
from deepep.sim.faults.training import StepEnd, judge_steps
from deepep.sim.rules.checking import Violation

STEPS = 4


@pytest.mark.parametrize(
    "ends",
    [
        [StepEnd(Effect.KILL, 1, 1, "forward")],
        [StepEnd(Effect.KILL, 0, 0, "sum")],
        [StepEnd(Effect.KILL, 0, 1, "bucket"), StepEnd(Effect.KILL, 3, 1, "after")],
        [StepEnd(Effect.KILL, 3, 0, "commit", 0.0003), StepEnd(Effect.KILL, 4, 0, "commit", 0.0003)],
    ],
    ids=["forward", "first-sum", "two-at-once", "two-while-committing"],
)
def test_survivors_have_the_oracles_weights(ends: list[StepEnd], tmp_path: Path) -> None:
    with World(max(3, *(end.rank + 1 for end in ends)), timeout=120.0) as world:
        judge_steps(world, ends, STEPS, 20.0, str(tmp_path))


@pytest.mark.alone
def test_who_is_frozen_is_left_out_and_told(tmp_path: Path) -> None:
    with World(3, store="tcp", timeout=120.0) as world:
        judge_steps(world, [StepEnd(Effect.STALL, 1, 1, "sum")], STEPS, 4.0, str(tmp_path))


def test_other_weights_than_the_oracles_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge has teeth: as if a step had been summed over other ranks than its survivors say."""
    from deepep.sim.faults import training

    real = training.oracle
    monkeypatch.setattr(training, "oracle", lambda members, buckets: real([(0,), *members[1:]], buckets))
    with World(2, timeout=120.0) as world, pytest.raises(Violation, match="oracle"):
        judge_steps(world, [], 2, 20.0, str(tmp_path))


def wrapped(context: Any, **options: Any) -> deepep.DistributedDataParallel:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    return deepep.DistributedDataParallel(
        model, process_group=context.group, config=ParallelConfig(timeout=60.0), **options
    )


def backward(model: torch.nn.Module) -> torch.Tensor:
    model(torch.ones(4, 4)).square().mean().backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def a_forward_fails(context: Any, keep: str) -> tuple[int, bool]:
    """Rank 0 misses a peer in something of its own, once: all ranks' bodies run again, as the first time."""
    model, plain = wrapped(context), wrapped(context)
    torch.manual_seed(context.rank)
    wanted = backward(plain)
    torch.manual_seed(context.rank)
    runs, found = 0, None
    for attempt in model.attempts(keep=keep):
        with attempt:
            runs += 1
            loss = model(torch.ones(4, 4)).square().mean()
            if context.rank == 0 and runs == 1:
                record = deepep.errors.FaultRecord("dispatch", "payload", 0, (1,), 2, 1, 0.0)
                raise PeerTimeoutError(record, "as a Buffer's")
            loss.backward()
            found = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    members = model.report()["members"]
    for one in (model, plain):
        one.close()
    return runs, found is not None and torch.equal(found, wanted) and members == (0, 1)


@pytest.mark.parametrize("keep", ["buckets", "recompute"])
def test_a_forward_that_fails_runs_again_on_all(world_of: Callable[[int], Any], keep: str) -> None:
    assert world_of(2).run(a_forward_fails, keep, timeout=120.0) == [(2, True)] * 2


def misused(context: Any) -> list[str]:
    found = []

    def note(action: Callable[[], Any]) -> None:
        try:
            action()
            found.append("")
        except Exception as error:
            found.append(type(error).__name__)

    def twice() -> None:
        for attempt in model.attempts():
            with attempt:
                backward(model)
                backward(model)

    def stepped() -> None:
        for attempt in model.attempts():
            with attempt:
                backward(model)
                optimizer.step()

    model = wrapped(context)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    note(lambda: next(model.attempts(keep="all")))
    note(lambda: next(model.attempts(min_members=0)))
    note(twice)
    note(stepped)
    note(lambda: backward(model))  # outside of an attempt: as ever
    summed = wrapped(context, gradient="sum")
    note(lambda: next(summed.attempts()))
    for one in (model, summed):
        one.close()
    return found


def test_misuse(world_of: Callable[[int], Any]) -> None:
    wanted = ["RangeError", "RangeError", "ModeError", "", "", "ModeError"]
    assert world_of(2).run(misused, timeout=120.0) == [wanted] * 2


def too_few(context: Any, least: int) -> tuple[str, str]:
    """The error of a rank whose peers are gone."""
    model = wrapped(context)
    if context.rank > 0:
        import os

        os._exit(0)
    try:
        for attempt in model.attempts(min_members=least or None):
            with attempt:
                backward(model)
    except PeerTimeoutError as error:
        return type(error).__name__, error.reason
    return "", f"{model.members}"


@pytest.mark.parametrize(("least", "text"), [(0, "fewer than min_members=2"), (1, "(0,)")])
def test_a_minority_stops_unless_it_may_go_on(least: int, text: str) -> None:
    with World(2, timeout=120.0) as world:
        outcome = world.try_run(too_few, least)[0]
    kind, reason = outcome.value
    assert text in reason
    assert kind == ("PeerTimeoutError" if least == 0 else "")


def test_plans_among_those_who_are_left() -> None:
    plan = ReductionPlan("hierarchical", "fp8", "bf16", ((0, 2), (1,), (3, 4)))
    assert plan.among([0, 2, 3, 4]).groups == ((0, 1), (2, 3))
    assert plan.among([1, 4]).for_ranks(2).groups == ((0,), (1,))
    assert plan.among(range(5)) == plan
    table = PlanTable(plan.groups, (PlanEntry(4096, plan, 1.0),))
    assert table.among([0, 3]).entries[0].plan.groups == table.among([0, 3]).groups == ((0,), (1,))
    config = ParallelConfig(topology=plan, compression="fp8", groups=((0, 1), (2, 3, 4)))
    assert config_among(config, [2, 3]).topology == plan.among([2, 3])
    assert config_among(config, [2, 3]).groups == ((0, 1),)
    assert config_among(ParallelConfig(), [1]) == ParallelConfig()
