"""A whole run as on GPUs, the reference backend in the kernels' place: which SM counts, and whose floor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from deepep.bench.clock import Timing
from deepep.bench.floor import Copied
from deepep.bench.operations import FRESH
from deepep.bench.sweep import Shape, Sweep
from deepep.bench.workload import draw
from deepep.errors import RangeError

SHAPE = Shape(tokens=9, hidden=128, topk=3, experts=8)
ALL_SMS = 24


def as_on_gpus(context: Any, sms: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """(the report, what happened on the way) of a run on one rank."""
    from deepep import Buffer
    from deepep.bench import rank as module

    log: list[Any] = []

    class StandInFloor:
        all_sms = 24
        measured = (Copied(1, 2, Timing(3.0, 4.0, 5.0)),)

        def __init__(self, clock: Any, group: Any, rank: int, device: torch.device, most_bytes: int) -> None:
            log.append(("room", most_bytes))

        def best(self, pairs: Any, wire_bytes: int, most_sms: int) -> Copied:
            log.append(("floor", wire_bytes, most_sms))
            return Copied(wire_bytes, min(8, most_sms), Timing(1000.0 / most_sms, 0.0, 0.0))

    class DeepEP(Buffer):
        @staticmethod
        def set_num_sms(new_num_sms: int) -> None:
            log.append(("deep_ep", new_num_sms))

    def open_deep_ep(group: Any, hidden: int, most_sms: int) -> tuple[Any, str]:
        log.append(("opened for", hidden, most_sms))
        return DeepEP(group, timeout=30.0), ""

    sweep = Sweep(2, (SHAPE,), dtypes=("bf16",), sms=sms)
    buffer = Buffer(context.group, timeout=30.0)
    buffer._engine.info = replace(buffer._engine.info, backend="cuda")
    real = {name: getattr(module, name) for name in ("Floor", "open_deep_ep", "HostClock")}
    module.Floor, module.open_deep_ep = StandInFloor, open_deep_ep
    module.HostClock = lambda group, device, iterations, warmup: real["HostClock"](group, device, 2, 0)
    bench = module.Bench(context.group, context.device, sweep, buffer, lambda line: None)
    chosen: list[int] = []
    measure = bench._clock.measure
    bench._clock.measure = lambda call: (chosen.append(Buffer.num_sms), measure(call))[1]
    before = Buffer.num_sms
    try:
        bench.run([draw(sweep, SHAPE)])
    finally:
        Buffer.set_num_sms(before)
        for name, value in real.items():
            setattr(module, name, value)
    for figure, sms_then in zip(bench.report.figures, chosen, strict=True):
        assert figure.by != "deepep" or figure.sms in (None, sms_then)
    return bench.report, log


def test_a_run_on_gpus(world_of: Any) -> None:
    report, log = world_of(2).run(as_on_gpus, (8, 13, 48))[0]
    theirs = ["dispatch", "cached dispatch", "combine"]
    ours = [*FRESH, "cached dispatch", "combine"]
    assert [(f.operation, f.by, f.sms) for f in report.figures] == [
        ("layout", "deepep", None),
        *((name, "deepep", sms) for sms in (8, 13) for name in ours),  # the device has no 48
        ("dispatch", "gloo alone", None),
        ("dispatch", "gloo with permute", None),
        ("combine", "gloo alone", None),
        ("combine", "gloo with reduce", None),
        ("layout", "deep_ep", None),
        *((name, "deep_ep", 8) for name in theirs),  # 13 is odd
    ]
    load = draw(Sweep(2, (SHAPE,)), SHAPE)
    assert log[0] == ("room", int(load.rows.max()) * 256)
    assert log[1] == ("opened for", 128, 8)
    assert ("deep_ep", 8) in log
    assert ("deep_ep", 13) not in log
    for figure in report.figures:
        if figure.operation == "layout":
            assert figure.floor is None
            continue
        # Its own SM count's floor; who chooses himself is measured against that of all SMs.
        assert figure.floor == 1000.0 / (figure.sms or ALL_SMS)
        traffic = load.combined() if figure.operation == "combine" else load.dispatched("bf16")
        assert ("floor", traffic.wire, figure.sms or ALL_SMS) in log
        assert (figure.wire_bytes, figure.logical_bytes) == (traffic.wire, traffic.logical)
    assert any("24 were left out" in note for note in report.notes)
    assert report.problems == []
    assert [copied.sms for copied in report.copies] == [2]


def test_a_device_without_any_of_the_counts(world_of: Any) -> None:
    def refused(context: Any) -> None:
        with pytest.raises(RangeError, match="at most the device's 24"):
            as_on_gpus(context, (25, 132))

    world_of(2).run(refused)
