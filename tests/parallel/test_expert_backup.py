"""Experts of ranks that died, restored from the copies that other ranks keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepep
from deepep.nn import ExpertParallelMoE
from deepep.placement import contiguous, with_spare
from deepep.sim import World
from deepep.sim.faults import training
from deepep.sim.faults.fault import Effect
from deepep.sim.faults.training import StepEnd, judge_steps
from deepep.sim.rules.checking import Violation

STEPS = 5
KILL = Effect.KILL


@pytest.mark.parametrize(
    ("ends", "every", "wanted"),
    [
        # The second has taken over an expert of the first, and dies as copies are made: it has one step less.
        (
            [StepEnd(KILL, 1, 1, "dispatch"), StepEnd(KILL, 0, 3, "copies")],
            1,
            {1: {2: 1, 3: 1}, 3: {0: 2, 1: 2, 2: 2}},
        ),
        # Experts as at the beginning, without moments; then as they were two steps ago: copies are made
        # once a rank has died, and the next step of the experts of one that dies after its commit is lost.
        (
            [StepEnd(KILL, 2, 1, "dispatch"), StepEnd(KILL, 0, 2, "after")],
            2,
            {1: {4: 0, 5: 0}, 3: {0: 1, 1: 1, 4: 1}},
        ),
        # Who has a copy of rank 2's experts dies with it: these are lost.
        ([StepEnd(KILL, 1, 1, "combine"), StepEnd(KILL, 2, 1, "combine")], 1, {1: {2: 1, 3: 1}}),
    ],
    ids=["one-after-the-other", "before-moments", "with-the-copies"],
)
def test_experts_of_the_dead_go_on_learning(
    ends: list[StepEnd], every: int, wanted: dict[int, dict[int, int]], tmp_path: Path
) -> None:
    """With the weights of one process which sets them back, and what the optimizer keeps of them, alike."""
    with World(5 if every == 1 else 4, timeout=120.0) as world:
        accounts, _ = judge_steps(world, ends, STEPS, 20.0, str(tmp_path), True, every)
    assert {step: found for step, found in enumerate(accounts[0].restored) if found} == wanted
    if every == 2:  # the judge has teeth
        accounts[0].restored[3] = {0: 2, 1: 2, 4: 2}
        with pytest.raises(Violation, match="oracle"):
            training._demand_restored(ends, 4, accounts, every)


def misused(context: Any) -> list[str]:
    found = []
    sizes: dict[str, Any] = {"hidden": 16, "expert_hidden": 8, "num_experts": 4, "num_topk": 1}
    roomy = with_spare(contiguous(4, 2), 2)

    class OtherExperts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(16, 16)

        def expert_parameters(self) -> Any:
            return self.one.parameters()

    with deepep.Buffer(context.group, device="cpu") as buffer:

        def note(placement: Any, every: Any = 1, has_state: bool = True, *more: torch.nn.Module) -> None:
            layers = [ExpertParallelMoE(buffer, placement=placement, **sizes)] if placement != 0 else []
            module = torch.nn.Sequential(*layers, *more)
            model = deepep.DistributedDataParallel(module, process_group=context.group)
            parameters = [p for p in module.parameters() if has_state or p.ndim < 3]
            state = {"optimizer": torch.optim.SGD(parameters, 0.1)}
            try:
                next(model.attempts(state=state, expert_backup=every))
                found.append("")
            except deepep.errors.ArgumentError as error:
                found.append(f"{error.argument}: {error.got}")
            model.close()

        note(roomy)
        note(None)
        note(roomy, None)
        note(roomy, 0)
        note(roomy, "1")
        note(roomy, 1, False)
        note(roomy, 1, True, OtherExperts())
        note(0, 1, True, torch.nn.Linear(16, 16))
    return found


def test_misuse(world_of: Callable[[int], Any]) -> None:
    wanted = [
        "",
        "expert_backup: places for 0 of rank 0's experts",
        "state: a model with experts",
        "expert_backup: 0",
        "expert_backup: str",
        "expert_backup: experts that no optimizer in `state` has",
        "expert_backup: experts of another module",
        "expert_backup: a model without experts",
    ]
    assert world_of(2).run(misused, timeout=120.0) == [wanted] * 2
