"""Choice of plans on CUDA by timing, on clocks that say what a GPU would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepep.collectives import PlanTable, ReductionPlan, choosing_on_devices
from deepep.collectives.choosing_on_devices import DEVICE_SIZES, candidates_on_device, choose_on_device
from deepep.collectives.communicator import Communicator
from deepep.collectives.plan_table import PlanEntry
from deepep.parallel import planning
from deepep.parallel.config import ParallelConfig

ONE_HOST = ((0, 1, 2, 3),)


class Clock:
    """Seconds of each schedule: a start, and a rate; the first run of each takes a second more. Stands for a
    communicator of two ranks, too, of which the other takes twice as long for the schedules `slow`.
    """

    def __init__(self, slow: tuple[str, ...] = (), **rates: tuple[float, float]) -> None:
        self.rates, self.slow = rates, slow
        self.runs: list[tuple[str, str, int]] = []
        self._given: list[float] = []

    def __call__(self, comm: Any, plan: ReductionPlan, size: int) -> float:
        start, rate = self.rates[plan.schedule]
        is_first = (plan.schedule, plan.codec, size) not in self.runs
        self.runs.append((plan.schedule, plan.codec, size))
        return start + size / rate + is_first

    def gather(self, values: list[float]) -> list[list[float]]:
        ran = [schedule for schedule, _, _ in self.runs[-len(values) :]]
        return [values, [s * (1 + (name in self.slow)) for name, s in zip(ran, values, strict=True)]]


def chosen(clock: Clock, seconds: float = 10.0, **options: Any) -> dict[tuple[str, int], str]:
    options = {"codecs": ("fixed32",), "groups": ONE_HOST, **options}
    table = choose_on_device(clock, seconds=seconds, timed=clock, **options)  # type: ignore[arg-type]
    return {(entry.plan.codec, entry.size): entry.plan.schedule for entry in table.entries}


def test_nvlink_is_chosen_where_it_is_fastest_and_nowhere_else() -> None:
    clock = Clock(native=(50e-6, 300e9), nvlink=(10e-6, 200e9), direct=(90e-6, 100e9), oneshot=(80e-6, 50e9))
    found = chosen(clock, codecs=("fp8", "fixed32"))
    assert [found["fixed32", size] for size in DEVICE_SIZES] == ["nvlink", "nvlink", "nvlink", "native"]
    assert {found["fp8", size] for size in DEVICE_SIZES} == {"nvlink"}
    clock = Clock(("nvlink",), native=(15e-6, 3e11), nvlink=(1e-5, 2e11), direct=(1, 1e11), oneshot=(1, 1e11))
    assert set(chosen(clock).values()) == {"native"}  # the slowest rank's times decide
    assert clock.runs.count(("direct", "fixed32", DEVICE_SIZES[0])) == 2  # as it has no hope


def test_time_is_bounded_and_plans_in_use_stay() -> None:
    """Sizes beyond the budget go by the last choice; what was not timed at all by the rule."""
    clock = Clock(native=(1.0, 1e12), nvlink=(0.5, 1e12), direct=(2.0, 1e12), oneshot=(2.0, 1e12))
    found = chosen(clock, 1.0, codecs=("fixed32", "bf16"))
    assert {found["fixed32", size] for size in DEVICE_SIZES} == {"nvlink"}
    assert {found["bf16", size] for size in DEVICE_SIZES} == {"direct"}
    assert {size for _, _, size in clock.runs} == {DEVICE_SIZES[0]}
    current = PlanTable(ONE_HOST, tuple(PlanEntry(s, ReductionPlan("native"), 1.0) for s in DEVICE_SIZES), 3)
    clock = Clock(native=(1.0, 1e12), nvlink=(0.95, 1e12), direct=(2.0, 1e12), oneshot=(2.0, 1e12))
    assert set(chosen(clock, 1e9, current=current).values()) == {"native"}
    table = choose_on_device(clock, ("fixed32",), 1e9, ONE_HOST, current, clock)  # type: ignore[arg-type]
    assert table.version == 4


def test_between_hosts_there_is_no_nvlink() -> None:
    for codec, inner in (("fp8", "bf16"), ("fixed32", "")):
        plans = candidates_on_device(codec, ((0, 1), (2, 3)), 64 << 20)
        assert "nvlink" not in {plan.schedule for plan in plans}
        assert ReductionPlan("hierarchical", codec, inner, ((0, 1), (2, 3)), 4) in plans
    assert [p.schedule for p in candidates_on_device("fp8", ((0,), (1,)), 1 << 20)] == ["direct"]


def measured(context: Any) -> PlanTable:
    choosing_on_devices.DEVICE_SIZES = (4096, 16384)
    with Communicator(context.group, timeout=60.0) as comm:
        return choose_on_device(comm, ("fp8", "fixed32"), 10.0, ((0, 1),))


def test_ranks_come_to_one_table(world_of: Callable[[int], Any]) -> None:
    """In place, on the CPU, where kernels are absent and `nvlink` is direct."""
    first, other = world_of(2).run(measured, timeout=120.0)
    assert first == other
    assert [(e.size, e.plan.codec) for e in first.entries] == [
        (size, codec) for size in (4096, 16384) for codec in ("fp8", "fixed32")
    ]


def test_auto_measures_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device, num_ranks, hosts = torch.device("cuda"), 2, ["a", "a"]

    asked: list[Any] = []
    monkeypatch.setattr(planning, "choose_on_device", lambda *given, current: asked.append(given))
    comm: Any = OnCuda()
    planning.table_of(comm, ParallelConfig("fp8"))
    assert asked == [(comm, ("fp8", "fixed32"), 1.0, ((0, 1),))]
    for options in ({"probe_seconds": 0}, {"topology": "ring"}, {"topology": "native"}):
        assert planning.table_of(comm, ParallelConfig(**options)) is None  # type: ignore[arg-type]
    assert len(asked) == 1
