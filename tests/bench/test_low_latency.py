"""Low latency measured as on GPUs, with stand-ins: figures and their floors, halves, graphs, kernel times."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepep.bench.clock import HostClock, Stage, Timing
from deepep.bench.exchange import Exchanged
from deepep.bench.floor import Copied
from deepep.bench.low_latency.graph import each_of
from deepep.bench.low_latency.kernels import ALONE, CALL, sums_of_calls
from deepep.bench.sweep import Shape, Sweep
from deepep.bench.workload import draw

SHAPES = tuple(Shape(tokens, hidden=128, topk=3, experts=8) for tokens in (1, 6))


def as_on_gpus(context: Any, wrong: bool = False, uncaptured: int = -1, elastic: bool = False) -> Any:
    """A run's report, the reference backend in the kernels' place.

    wrong: the oracle is of other rows. uncaptured: a rank that cannot capture graphs. elastic: V2 is
    installed, for which this library's ElasticBuffer stands.
    """
    from deepep import Buffer, ElasticBuffer
    from deepep.bench.low_latency import oracle as of_oracle
    from deepep.bench.low_latency import rank as module

    class StandInFloor:
        all_sms = 24
        measured = ()

        def __init__(self, *given: Any) -> None:
            pass

        def best(self, pairs: Any, wire_bytes: int, most_sms: int) -> Copied:
            return Copied(wire_bytes, 8, Timing(wire_bytes / 1e3, 0.0, 0.0))

    class StandInExchange:
        def __init__(self, *given: Any) -> None:
            self.calls = 0

        def call(self, pairs: Any, sms: int, *, reads: bool) -> Any:
            return lambda: None

        def best(self, clock: Any, pairs: Any, most_sms: int, *, reads: bool) -> Exchanged:
            assert most_sms == 24
            return Exchanged(16 if reads else 12, Timing(1e6, 2e6, 0.0))

        def check(self) -> None:
            pass

    def capture(call: Any, times: int, device: torch.device) -> Any:
        if context.rank == uncaptured:
            raise RuntimeError("operation not permitted\nwhen a stream is capturing")
        return SimpleNamespace(replay=lambda: [call() for _ in range(times)])

    class Shifted(of_oracle.LowLatencyOracle):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self._xs = [x + 1 for x in self._xs]

    def found(ranks: int, name: str) -> tuple[Any, str]:
        if not elastic or name != "ElasticBuffer":
            return None, "deep_ep: not here"
        return partial(ElasticBuffer, backend="reference", device="cpu"), ""

    sweep = Sweep(2, SHAPES, dtypes=("fp8",), mode="low-latency", check=True)
    buffer = Buffer(
        context.group, low_latency_mode=True, num_rdma_bytes=1 << 20, reduction="expert_rank", timeout=30.0
    )
    buffer._engine.info = replace(buffer._engine.info, backend="cuda")
    stand_ins = {"Floor": StandInFloor, "BareExchange": StandInExchange, "capture": capture}
    stand_ins |= {"LowLatencyOracle": Shifted} if wrong else {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stand_ins.items():
            patch.setattr(module, name, value)
        make = HostClock
        patch.setattr("deepep.bench.rank.HostClock", lambda g, d, iterations, warmup: make(g, d, 2, 0))
        patch.setattr("deepep.bench.peers._buffer_type", found)
        bench = module.LowLatencyBench(context.group, context.device, sweep, buffer, lambda line: None)
        bench.run([draw(sweep, shape) for shape in SHAPES])
    buffer.destroy()
    return bench.report


def test_every_operation_has_its_floor(world_of: Any) -> None:
    report = world_of(2).run(as_on_gpus)[0]
    found = [(f.operation, f.by, f.dtype) for f in report.figures if f.shape == SHAPES[1]]
    whole = [("dispatch", "fp8"), ("combine", "bf16"), ("dispatch + combine", "fp8")]
    halves = [(f"{name}, {half}", dtype) for name, dtype in whole[:2] for half in ("send", "receive")]
    graphs = [(f"pair, graph of {times}", "fp8") for times in (1, 8)]
    assert found == [
        *((name, "bare exchange", dtype) for name, dtype in whole),
        *((name, "deepep", dtype) for name, dtype in [*whole, *halves, *graphs]),
        *((name, "bare exchange", dtype) for name, dtype in graphs),
        ("dispatch", "gloo alone", "fp8"),
        ("combine", "gloo alone", "bf16"),
    ]
    bare = {(f.shape, f.operation, f.dtype): f.median for f in report.figures if f.by == "bare exchange"}
    for figure in report.figures:
        key = (figure.shape, figure.operation, figure.dtype)
        is_half = figure.operation.endswith(("send", "receive"))
        assert figure.exchange == (None if is_half else bare[key])
        assert is_half or figure.exchange_ratio == figure.median / bare[key]
        if figure.operation in ("dispatch", "combine"):
            load = draw(Sweep(2, SHAPES), figure.shape)
            moved = load.combined() if figure.operation == "combine" else load.dispatched("fp8")
            assert (figure.wire_bytes, figure.floor) == (moved.wire, moved.wire / 1e3)
            assert figure.exchange_sms == (16 if figure.operation == "combine" else 12)
    # 1 s against microseconds: that is no floor, and the report says so.
    assert sum("no floor to be measured against" in note for note in report.notes) == 4
    assert "deep_ep: not here" in report.notes
    assert report.problems == []


def test_v2_is_measured_by_its_cached_calls(world_of: Any) -> None:
    """It has none of low latency; of the two counts of SMs the stand-in GPU has one."""
    report = world_of(2).run(as_on_gpus, elastic=True)[0]
    by = "deep_ep V2, cached, 24 SMs"
    for shape in SHAPES:
        found = [(f.operation, f.dtype) for f in report.figures if f.shape == shape and f.by == by]
        assert found == [
            ("dispatch", "fp8"),
            ("combine", "bf16"),
            ("dispatch + combine", "fp8"),
            ("pair, graph of 1", "fp8"),
            ("pair, graph of 8", "fp8"),
        ]
    assert all(figure.exchange is not None for figure in report.figures if figure.by == by)
    assert report.notes.count("deep_ep: not here") == 1  # V1
    assert not any("Differs" in note for note in report.notes)


def test_a_wrong_result_ends_the_run(world_of: Any) -> None:
    def body(context: Any) -> str:
        from deepep.bench.rank import WrongResultError

        with pytest.raises(WrongResultError) as raised:
            as_on_gpus(context, wrong=True)
        return str(raised.value)

    complaints = world_of(2).run(body)
    assert complaints[0] == complaints[1]
    assert complaints[0].startswith("deepep dispatch fp8: rank")
    assert "bytes differ" in complaints[0]


def test_a_graph_that_one_rank_cannot_capture_is_left_out_by_all(world_of: Any) -> None:
    reports = world_of(2).run(as_on_gpus, uncaptured=1)
    for report in reports:
        assert not any("graph" in figure.operation for figure in report.figures)
    assert any("another rank could not capture" in note for note in reports[0].notes)
    assert any("not captured: operation not permitted" in note for note in reports[1].notes)


def test_a_stage_is_timed_without_what_comes_before_and_after(world_of: Any) -> None:
    def body(context: Any) -> list[str]:
        log: list[str] = []

        def begin() -> Any:
            log.append("begin")
            return lambda: log.append("call") or "result"

        clock = HostClock(context.group, context.device, 2, 1)
        clock.measure(Stage(begin, lambda made: log.append(f"end of {made}")))
        return log

    assert world_of(2).run(body)[0] == ["begin", "call", "end of result"] * 3


def test_the_time_of_one_call_of_a_graph() -> None:
    assert each_of(Timing(80.0, 96.0, 8.0), 8) == Timing(10.0, 12.0, 1.0)


def event(name: str, begin: float, end: float, device: str = "CUDA") -> Any:
    return SimpleNamespace(
        name=name, device_type=SimpleNamespace(name=device), time_range=SimpleNamespace(start=begin, end=end)
    )


def test_kernels_are_summed_by_call() -> None:
    """Those of the alignment, and the regions as the device shows them, are no kernels of the call."""
    events = [
        event(ALONE, 0, 50, "CPU"),
        event(ALONE, 5, 40),
        event("spin", 5, 30),
        event("barrier", 30, 40),
        event(CALL, 100, 200, "CPU"),
        event("aten::empty", 101, 102, "CPU"),
        event(CALL, 105, 190),
        event("spin", 105, 140),
        event("barrier", 140, 150),
        event("send", 150, 158),
        event("more", 160, 161.5),
        event("receive", 230, 260),  # between two calls
        event(CALL, 300, 400, "CPU"),
        event("send", 350, 357),
    ]
    assert sums_of_calls(events) == [9.5, 7.0]
