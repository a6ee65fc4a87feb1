"""Joining with experts: processes that take the place of ranks which died, and have their experts again."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import deepep
from deepep.errors import EvictedError
from deepep.parallel import newcomer_group
from deepep.sim import World
from deepep.sim.faults import expert_joining
from deepep.sim.faults.expert_joining import HAND_OVERS, ExpertAccount, judge_expert_joins
from deepep.sim.faults.expert_training import ExpertModel, digests, tokens_of
from deepep.sim.faults.fault import Effect
from deepep.sim.faults.joining import Join, Run
from deepep.sim.faults.training import StepEnd
from deepep.sim.rules.checking import Violation

STEPS = 7


def judge(num_ranks: int, ends: list[StepEnd], joins: list[Join], folder: Path) -> list[ExpertAccount]:
    """The accounts of a training that kept all promises."""
    run = Run(STEPS, ends, joins, 20.0, str(folder), num_ranks)
    with World(num_ranks, timeout=120.0) as world, World(len(joins), timeout=120.0) as newcomers:
        return judge_expert_joins(world, newcomers, run)


def killed(rank: int, step: int = 1, phase: str = "sum") -> StepEnd:
    return StepEnd(Effect.KILL, rank, step, phase)


def members_of(accounts: list[ExpertAccount]) -> list[tuple[int, ...]]:
    whole = next(account for account in accounts if len(account.members) == STEPS)
    return [whole.members[step] for step in range(STEPS)]


def restored_in(accounts: list[ExpertAccount]) -> dict[int, dict[int, int]]:
    return {step: found for step, found in accounts[0].restored.items() if found}


def test_who_joins_has_its_experts_again_whoever_dies_in_the_hand_over(tmp_path: Path) -> None:
    """A newcomer, and a member when another comes after it, of whose experts no step is lost: copies were
    made before. Other moments: `python -m deepep dp handover`.
    """
    ends = [killed(1), killed(3, 5, HAND_OVERS[2])]
    accounts = judge(4, ends, [Join(1, 2, "commit"), Join(1, 4)], tmp_path)
    assert members_of(accounts) == [(0, 1, 2, 3), *[(0, 2, 3)] * 4, *[(0, 1, 2)] * 2]
    restored = restored_in(accounts)
    assert restored.pop(3, {2: 3, 3: 3}) == {2: 3, 3: 3}  # if the newcomer had them when it died
    assert restored == {1: {2: 1, 3: 1}, 5: {6: 5, 7: 5}}
    assert {a.rank: a.experts[:2] for a in accounts} == {rank: (2 * rank, 2 * rank + 1) for rank in range(3)}
    accounts[0].digests["0"] = accounts[0].digests["1"]  # the judge has teeth
    run = Run(STEPS, [], [], 20.0, str(tmp_path), 4)
    with pytest.raises(Violation, match="expert 0 is not the oracle's"):
        expert_joining.judge_expert_accounts(run, accounts)


def a_rank_that_sleeps(context: Any, folder: str) -> tuple[dict[str, str], tuple[int, ...]]:
    """Hashes of weights in the end, and the experts that are here."""
    config = deepep.ParallelConfig(timeout=3.0, probe_seconds=0)
    done = Path(folder, "done")
    with deepep.Buffer(context.group, device="cpu", timeout=3.0) as buffer:
        model = ExpertModel(buffer, 3, spare=2)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        ddp = deepep.DistributedDataParallel(model, process_group=context.group, config=config)

        def step(before: Callable[[], None] = lambda: None) -> None:
            for attempt in ddp.attempts(state={"optimizer": optimizer}, expert_backup=1):
                with attempt:
                    before()
                    optimizer.zero_grad()
                    ddp(tokens_of(context.rank, 0)).square().mean().backward()
                    optimizer.step()

        def sleep() -> None:
            while not done.exists():
                time.sleep(0.01)

        step()
        if context.rank == 1:
            with pytest.raises(EvictedError):
                step(sleep)
            ddp = deepep.DistributedDataParallel.join_run(
                *(model, 1, {"optimizer": optimizer}), store=context.group, timeout=60.0, config=config
            )
            step()  # the one before which it came
        else:
            step()
            assert ddp.members == (0, 2)
            done.touch()
            until = time.monotonic() + 60.0
            while ddp.members != (0, 1, 2):
                assert time.monotonic() < until
                step()
        step()
        ddp.close()
        return digests(model), model.moe.expert_numbers


@pytest.mark.alone
def test_who_was_left_out_comes_back_to_its_experts(tmp_path: Path) -> None:
    """In the same process, with the buffer that it had."""
    with World(3, store="tcp", timeout=120.0) as world:
        found = world.run(a_rank_that_sleeps, str(tmp_path))
    assert [experts for _, experts in found] == [(2 * rank, 2 * rank + 1, -1, -1) for rank in range(3)]
    assert len({hashes["shared"] for hashes, _ in found}) == 1


def misused(context: Any) -> list[str]:
    found = []

    def note(action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            found.append(f"{type(error).__name__} {getattr(error, 'argument', '')}")

    note(lambda: newcomer_group(2, 2))
    note(lambda: newcomer_group(0, 0))
    note(lambda: newcomer_group("0", 2))  # type: ignore[arg-type]
    group = newcomer_group(1, 2)
    with deepep.Buffer(group, device="cpu") as buffer:
        assert (buffer.rank, buffer.group_size, buffer.info.masked_ranks) == (1, 2, (0,))
        model = ExpertModel(buffer, 2, spare=2)
        join = partial(deepep.DistributedDataParallel.join_run, model, 1, store=context.group, timeout=0.05)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        note(lambda: join({"optimizer": optimizer}, expert_group=context.group))
        note(lambda: join({"optimizer": torch.optim.SGD(model.first.parameters(), 0.1)}))
        note(lambda: join({"optimizer": optimizer}))
    return found


def test_misuse(world_of: Callable[[int], Any]) -> None:
    wanted = ["RangeError rank", "RangeError num_ranks", "ArgumentTypeError rank", "ModeError expert_group"]
    assert world_of(1).run(misused, timeout=60.0) == [
        [*wanted, "ModeError expert_backup", "PeerTimeoutError "]
    ]
