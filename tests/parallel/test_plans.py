"""Plans that ranks measure: alike on all of them, kept in files, measured again when a rank calls for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepep
from deepep.collectives import PlanTable, ReductionPlan
from deepep.collectives.plan_table import SIZES, PlanEntry
from deepep.errors import RangeError


def wrapped(context: Any, **options: Any) -> deepep.DistributedDataParallel:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
    config = deepep.ParallelConfig(timeout=120.0, **options)
    return deepep.DistributedDataParallel(model, process_group=context.group, config=config)


def backward(context: Any, model: deepep.DistributedDataParallel, step: int) -> torch.Tensor:
    """All gradients of a step, in a row."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(100 * context.rank + step)
    model(torch.randn(4, 16, generator=generator)).square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


def measured(context: Any, folder: str) -> tuple[Any, Any, bool, int]:
    """A table as measured and as pinned again; whether bits are those of the rule; versions after a call."""
    model, rule = wrapped(context, probe_seconds=0.5), wrapped(context, probe_seconds=0)
    path = Path(folder) / f"plan-{context.rank}.json"
    first = model.plan
    assert first is not None
    first.save(path)
    wanted = backward(
        context, rule, 0
    )  # of the first backward: torch cuts buckets, and so blocks, anew after it
    same = torch.equal(backward(context, model, 0), wanted)
    reducer: Any = model._bucket_reducer
    if context.rank == 1:  # as if this rank alone had found that times have changed
        reducer._has_drifted = lambda: True
    backward(context, model, 1)
    reducer.__dict__.pop("_has_drifted", None)
    backward(context, model, 2)
    pinned = wrapped(context, topology=path)
    same = same and torch.equal(backward(context, pinned, 0), wanted)
    kept = pinned.plan
    version = model.report()["plan_version"]
    for one in (model, rule, pinned):
        one.close()
    return first, kept, same, version


def test_ranks_measure_one_table_and_one_rank_may_call_for_another(
    world_of: Callable[[int], Any], tmp_path: Path
) -> None:
    found = world_of(3).run(measured, str(tmp_path), timeout=180.0)
    for first, kept, same, version in found:
        assert first == found[0][0] == kept
        assert {entry.plan.codec for entry in first.entries} == {"fixed32"}
        assert {entry.size for entry in first.entries} == set(SIZES)
        assert same
        assert version == 1


def hierarchical(context: Any) -> list[str]:
    """Schedules of a model that asks for one, of groups that are given."""
    model = wrapped(
        context, topology="Hierarchical", compression="bf16", groups=((0, 1), (2,)), probe_seconds=0.2
    )
    backward(context, model, 0)
    plans = model.report()["plans"]
    model.close()
    return [f"{plan['schedule']} {plan['groups']}" for plan in plans.values()]


def test_what_is_given_is_not_measured(world_of: Callable[[int], Any]) -> None:
    for schedules in world_of(3).run(hierarchical, timeout=120.0):
        assert set(schedules) == {"hierarchical ((0, 1), (2,))"}


def test_a_plan_does_not_override_compression() -> None:
    plan = ReductionPlan("direct", "bf16")
    assert deepep.ParallelConfig(topology=plan).topology == plan
    assert deepep.ParallelConfig("bf16", plan).topology == plan
    for compression in ("fp8", "auto"):
        with pytest.raises(RangeError, match=f"compression: got '{compression}' with a plan; allowed: off"):
            deepep.ParallelConfig(compression, plan)
    table = PlanTable(((0, 1),), (PlanEntry(4096, ReductionPlan("direct", "fixed32"), 1.0),))
    assert deepep.ParallelConfig(topology=table).topology == table
    with pytest.raises(RangeError, match="compression: got 'fp8'; allowed: codecs of the plan: fixed32"):
        deepep.ParallelConfig("fp8", table)


@pytest.mark.parametrize("name", ["max_noise", "probe_seconds", "probe_budget"])
def test_shares_and_seconds_are_numbers(name: str) -> None:
    with pytest.raises(RangeError, match=f"{name}: got -1; allowed: at least 0"):
        deepep.ParallelConfig(**{name: -1})  # type: ignore[arg-type]
    with pytest.raises(deepep.ArgumentTypeError, match=f"{name}: got str"):
        deepep.ParallelConfig(**{name: "1"})  # type: ignore[arg-type]
