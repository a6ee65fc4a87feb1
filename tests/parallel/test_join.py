"""Joining: processes that take the place of ranks which died, while the others train."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepep
from deepep.collectives.plan import ReductionPlan
from deepep.errors import ArgumentError, EvictedError
from deepep.runtime.control.stores import base_of, open_store, place_of
from deepep.runtime.control.transport import store_of
from deepep.sim import World
from deepep.sim.faults import joining
from deepep.sim.faults.fault import Effect
from deepep.sim.faults.joining import DEATHS, Join, JoinAccount, Run, judge_joins
from deepep.sim.faults.training import StepEnd
from deepep.sim.rules.checking import Violation

STEPS = 7


def accounts_of(run: Run) -> list[JoinAccount]:
    """The accounts of a training that kept all promises."""
    with World(run.num_ranks, timeout=120.0) as world, World(len(run.joins), timeout=120.0) as newcomers:
        return judge_joins(world, newcomers, run)


def judge(
    num_ranks: int, ends: list[StepEnd], joins: list[Join], folder: Path, falters: int = -1
) -> list[tuple[int, ...]]:
    """The members of each step of a training that kept all promises."""
    accounts = accounts_of(Run(STEPS, ends, joins, 20.0, str(folder), num_ranks, falters))
    whole, *_ = [account for account in accounts if len(account.members) == STEPS]
    return [whole.members[step] for step in range(STEPS)]


def killed(rank: int, step: int = 1, phase: str = "sum") -> StepEnd:
    return StepEnd(Effect.KILL, rank, step, phase)


def test_who_takes_the_place_of_one_that_died_has_the_oracles_weights(tmp_path: Path) -> None:
    """The lowest rank, too: the others follow it from the next step on."""
    members = judge(3, [killed(0)], [Join(0, 3)], tmp_path)
    assert members == [(0, 1, 2), *[(1, 2)] * 3, *[(0, 1, 2)] * 3]


def test_who_joins_shares_by_measured_speeds_and_reduces_by_a_pinned_plan(tmp_path: Path) -> None:
    """The plan names all ranks: without one, it is for those who are left, then for all again. The newcomer,
    whose speed nobody knows yet, takes its first steps by the weights that the members have.
    """
    plan = ReductionPlan("ring", groups=((2, 0, 1),), pieces=2)
    run = Run(STEPS, [killed(1)], [Join(1, 3)], 20.0, str(tmp_path), 3, is_measured=True, plan=plan)
    accounts = accounts_of(run)
    counts = {account.rank: len(account.samples[STEPS - 1]) for account in accounts}
    assert counts == {0: 6, 1: 6, 2: 12}


def test_two_join_at_once_and_samples_count_once(tmp_path: Path) -> None:
    members = judge(4, [killed(1, 0), killed(3, 2, "forward")], [Join(3, 3), Join(1, 3)], tmp_path)
    assert members[3] == (0, 2)
    assert members[4] == (0, 1, 2, 3)


@pytest.mark.parametrize("death", DEATHS)
def test_who_dies_while_it_joins_leaves_the_others_going_on(death: str, tmp_path: Path) -> None:
    """And another process may join after it."""
    members = judge(3, [killed(2)], [Join(2, 2, death), Join(2, 4)], tmp_path)
    assert members[2:5] == [(0, 1)] * 3
    assert members[5] == (0, 1, 2)


def test_one_of_two_dies_while_they_join(tmp_path: Path) -> None:
    members = judge(4, [killed(1, 0), killed(3, 1)], [Join(1, 2, "transfer"), Join(3, 2)], tmp_path)
    assert members[3:] == [(0, 2, 3)] * 4


def test_a_member_that_loses_the_new_link_is_not_left_behind(tmp_path: Path) -> None:
    """Though others may have it: all have come in, or all are where they were, and admit again."""
    assert judge(4, [killed(3)], [Join(3, 2)], tmp_path, falters=1)[-1] == (0, 1, 2, 3)


def test_other_weights_than_the_members_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge has teeth: as if the ranks of a step had been others than they say."""
    real = joining.oracle

    def other(members: Any, *arguments: Any) -> str:
        return real([*members[:-1], members[-1][1:]], *arguments)

    monkeypatch.setattr(joining, "oracle", other)
    with pytest.raises(Violation, match="oracle"):
        judge(3, [killed(0)], [Join(0, 3)], tmp_path)


class Moody:
    """Something of the user's that now and then does not give its state."""

    is_broken = False

    def state_dict(self) -> dict[str, Any]:
        if self.is_broken:
            raise RuntimeError("not now")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


class Trained:
    """A rank's model, optimizer and generator, for as many steps as somebody needs."""

    def __init__(self, width: int = 4, optimizer: Any = torch.optim.SGD) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(width, width)
        self.optimizer = optimizer(self.module.parameters(), 0.1)
        self.draws = torch.Generator()
        self.moody = Moody()
        self.state = {"optimizer": self.optimizer, "draws": self.draws, "moody": self.moody}
        self.steps = 0

    def wrap(self, context: Any, timeout: float) -> None:
        config = deepep.ParallelConfig(timeout=timeout, probe_seconds=0)
        self.ddp = deepep.DistributedDataParallel(self.module, process_group=context.group, config=config)

    def join(self, rank: int, store: Any, timeout: float, **options: Any) -> None:
        config = deepep.ParallelConfig(timeout=timeout, probe_seconds=0, **options)
        self.ddp = deepep.DistributedDataParallel.join_run(
            self.module, rank, self.state, store=store, timeout=60.0, config=config
        )

    def step(self, before: Callable[[], None] = lambda: None) -> None:
        for attempt in self.ddp.attempts(state=self.state):
            with attempt:
                self.optimizer.zero_grad()
                loss = self.ddp(torch.ones(2, self.module.in_features)).square().mean()
                before()
                loss.backward()
                self.optimizer.step()
        self.steps += 1

    def step_until(self, members: tuple[int, ...]) -> None:
        until = time.monotonic() + 90.0
        while self.ddp.members != members:
            assert time.monotonic() < until, self.ddp.members
            self.step()

    def end(self) -> tuple[list[float], int]:
        """Weights, and a number that is drawn."""
        self.step()
        self.ddp.close()
        drawn = int(torch.randint(1 << 30, (1,), generator=self.draws))
        return self.module.weight.flatten().tolist(), drawn


def publish(path: Path, group: Any) -> None:
    """Has others find a group's store."""
    path.with_suffix(".new").write_text(place_of(base_of(store_of(group))))
    path.with_suffix(".new").rename(path)


def members_that_lost_one(context: Any, folder: str) -> Any:
    mine = Trained()
    mine.draws.manual_seed(context.rank)
    mine.wrap(context, 20.0)
    if context.rank == 2:
        publish(Path(folder, "store"), context.group)
        os._exit(0)
    mine.step_until((0, 1))
    mine.moody.is_broken = context.rank == 1
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        while len(warned) < 2:
            mine.step()
            mine.moody.is_broken = context.rank == 1 and not warned
    mine.draws.manual_seed(7)  # a rank that is not like the others: nobody can be given what they have
    mine.step_until((0, 1, 2))
    return mine.end(), [str(each.message) for each in warned]


def one_that_differs(context: Any, folder: str) -> Any:
    while not Path(folder, "store").exists():
        time.sleep(0.01)
    store = open_store(Path(folder, "store").read_text(), 20.0)
    found = []

    def note(other: Trained, **options: Any) -> None:
        try:
            other.join(2, store, 20.0, **options)
        except ArgumentError as error:
            found.append((error.argument, error.got))

    note(Trained(), seed=1)
    note(Trained(width=5))
    note(Trained(optimizer=torch.optim.Adam))
    note(Trained())
    note(Trained())
    mine = Trained()
    mine.join(2, store, 20.0)
    mine.step()
    return mine.end(), found


def test_who_would_train_something_else_is_refused(tmp_path: Path) -> None:
    """Before anybody stops for it; and where members differ among themselves nobody joins."""
    with World(3, timeout=120.0) as world, World(1, timeout=120.0) as fresh:
        joined = fresh.submit(one_that_differs, str(tmp_path))
        outcomes = world.try_run(members_that_lost_one, str(tmp_path))
        end, found = joined.results()[0]
    assert [name for name, _ in found] == ["config", "parameters", "state", "state", "state"]
    assert "seed=1" in found[0][1]
    assert found[2][1] == "optimizer: Adam, draws: Generator, moody: Moody"
    assert found[3][1] == "moody: not now"
    assert "objects.draws" in found[4][1]
    for outcome in outcomes[:2]:
        assert outcome.ok, outcome.describe()
        theirs, warned = outcome.value
        assert theirs == end
        assert ["not now" in warned[0], "objects.draws" in warned[1]] == [True, True]
        assert len(warned) == 2


def a_rank_that_sleeps(context: Any, folder: str) -> Any:
    def sleep() -> None:
        while not Path(folder, "taken").exists():
            time.sleep(0.01)

    mine = Trained()
    mine.wrap(context, 3.0)
    mine.step()
    if context.rank == 1:
        with pytest.raises(EvictedError, match="rank 1"):
            mine.step(sleep)
        mine.join(1, context.group, 3.0)
        mine.step()
        return mine.end()
    mine.step()
    assert mine.ddp.members == (0, 2)
    publish(Path(folder, f"store-{context.rank}"), context.group)
    for members in ((0, 1, 2), (0, 2), (0, 1, 2)):  # another takes its place, and goes; then it comes back
        mine.step_until(members)
    return mine.end()


def one_in_between(context: Any, folder: str) -> None:
    while not Path(folder, "store-0").exists():
        time.sleep(0.01)
    mine = Trained()
    mine.join(1, open_store(Path(folder, "store-0").read_text(), 20.0), 3.0)
    Path(folder, "taken").touch()
    mine.step()
    mine.ddp._bucket_reducer.comm.abandon()  # type: ignore[union-attr]


@pytest.mark.alone
def test_who_was_left_out_comes_back(tmp_path: Path) -> None:
    """Though another process has been in its place, which it waits for."""
    with World(3, store="tcp", timeout=120.0) as world, World(1, timeout=120.0) as fresh:
        between = fresh.submit(one_in_between, str(tmp_path))
        ends = world.run(a_rank_that_sleeps, str(tmp_path))
        between.results()
    assert ends == [ends[0]] * 3


def misused(context: Any) -> list[str]:
    found = []

    def note(action: Callable[[], Any]) -> None:
        try:
            action()
            found.append("")
        except Exception as error:
            found.append(type(error).__name__)

    mine = Trained()
    mine.wrap(context, 20.0)
    note(lambda: next(mine.ddp.attempts(state={"model": object()})))
    note(lambda: next(mine.ddp.attempts(state=[mine.optimizer])))  # type: ignore[arg-type]
    join = deepep.DistributedDataParallel.join_run
    note(lambda: join(mine.module, -1, mine.state, store=context.group))
    note(lambda: join(mine.module, 0, mine.state, store="here"))
    note(lambda: join(mine.module, 0, mine.state, store=context.group, gradient="sum"))
    note(lambda: join(mine.module, 0, mine.state, store=context.group, timeout=0.05))
    mine.ddp.close()
    return found


def test_misuse(world_of: Callable[[int], Any]) -> None:
    wanted = ["ArgumentTypeError"] * 2 + ["RangeError", "ArgumentTypeError", "ModeError", "PeerTimeoutError"]
    assert world_of(1).run(misused, timeout=120.0) == [wanted]
