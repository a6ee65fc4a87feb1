"""A whole run of low-latency measurements, as one rank sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from deepep.api.buffer import Buffer
from deepep.bench.clock import Call, CudaClock, Stage, Timing
from deepep.bench.collective import ALONE, collective_operations
from deepep.bench.elastic.oracle import ElasticOracle
from deepep.bench.elastic.rank import largest
from deepep.bench.exchange import BareExchange
from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.floor import Copied, Floor
from deepep.bench.low_latency.calls import GRAPH, GRAPHS, PAIR, DecodeCalls
from deepep.bench.low_latency.elastic_calls import SMS, ElasticDecodeCalls, by_elastic, outputs
from deepep.bench.low_latency.graph import capture, each_of
from deepep.bench.low_latency.kernels import kernel_time
from deepep.bench.low_latency.oracle import LowLatencyOracle
from deepep.bench.operations import CACHED, COMBINE, DISPATCH, Inputs, TimedOperation
from deepep.bench.peers import open_elastic_deep_ep, open_low_latency_deep_ep
from deepep.bench.rank import FUNCTIONAL, TIMEOUT, Bench, Progress, WrongResultError
from deepep.bench.sweep import Dtype, Shape, Sweep
from deepep.bench.workload import Traffic, Workload, draw

#: by whom the floor's own figures are
BARE = "bare exchange"
#: a bare exchange that is so much above a plain copy is no floor
MOST_ABOVE_COPY_US = 2.5

Key = tuple[str, Dtype]  # operation, what is dispatched


@dataclass(frozen=True)
class Least:
    """The floors of an operation: a bare exchange, and a copy of its bytes without a signal."""

    timing: Timing
    sms: int
    call: Call
    copy: Copied | None = None


def run_low_latency_rank(
    group: Any, device: torch.device, sweep: Sweep, say: Progress = lambda line: None
) -> BenchReport:
    """Measures all of `sweep` on this rank, as `deepep.bench.rank.run_rank` does."""
    loads = [draw(sweep, shape) for shape in sweep.shapes]
    sizes = [
        Buffer.get_low_latency_rdma_size_hint(s.tokens, s.hidden, sweep.num_ranks, s.experts)
        for s in sweep.shapes
    ]
    buffer = Buffer(
        group,
        num_rdma_bytes=max(sizes),
        low_latency_mode=True,
        backend=sweep.backend,
        device=device,
        timeout=TIMEOUT,
        reduction="expert_rank",  # one row for each token and rank, as in the floors
    )
    bench = LowLatencyBench(group, device, sweep, buffer, say)
    try:
        bench.run(loads)
    except WrongResultError as wrong:
        bench.report.problems.append(str(wrong))
    buffer.destroy()
    return bench.report


class LowLatencyBench(Bench):
    """See `run_low_latency_rank`."""

    def run(self, loads: Sequence[Workload]) -> None:
        """Fills the report. Raises WrongResultError, on every rank."""
        sweep, report = self._sweep, self.report
        runs_on = {name: what for name, what in self._buffer.info.operations.items() if "low-latency" in name}
        report.environment |= {"mode": sweep.mode, "runs_on": runs_on, "reduction": "expert_rank"}
        if self._device.type == "cpu":
            report.notes.append(FUNCTIONAL)
        elif not self._kernels:
            report.notes.append("The reference backend serves here: there is nothing to compare with.")
        if not self._kernels:
            report.notes.append(
                "Pairs were not captured in a graph: this backend's host takes part in a call."
            )
        if not sweep.check:
            report.notes.append("Results were not compared with the reference (--no-check).")
        self._exchange: BareExchange | None = None
        if self._kernels:
            most = max(int(load.rows.max()) * load.shape.row_bytes("bf16") for load in loads)
            self._floor = Floor(self._clock, self._group, self._rank, self._device, most)
            self._exchange = BareExchange(self._group, self._rank, self._device, most, TIMEOUT)
        deep_ep, elastic = self._open_low_latency_deep_ep(), self._open_elastic_deep_ep()
        for load in loads:
            self._measure_curve(load, deep_ep, elastic)
        if self._floor is not None:
            report.copies.extend(self._floor.measured)

    def _measure_curve(self, load: Workload, deep_ep: Any, elastic: Any) -> None:
        """All figures of one T. deep_ep, elastic: DeepEP's buffers of V1 and of V2, or None."""
        shape, dtypes = load.shape, self._sweep.dtypes
        inputs = Inputs(load, self._rank, self._device, self._sweep.scales)
        most = max(other.tokens for other in self._sweep.shapes if _is_alike(other, shape))
        self.report.skews[shape] = load.skew
        oracle = LowLatencyOracle(inputs, most, "rank") if self._sweep.check else None
        least = self._floors(load)
        for by, buffer in ((OURS, self._buffer), ("deep_ep", deep_ep)):
            if buffer is None:
                continue
            calls = DecodeCalls(buffer, inputs, most)
            for name, dtype, call in calls.whole(dtypes):
                self._say(f"{shape} {by} {name} {dtype}")
                if oracle is not None and name != PAIR:
                    complaint = oracle.complaint(name, dtype, call())
                    self._agree(f"{by} {name} {dtype}", complaint, ours=by == OURS)
                self._put(load, name, by, dtype, self._clock.measure(call), least.get((name, dtype)))
            for name, dtype, stage in calls.halves(dtypes):
                self._say(f"{shape} {by} {name} {dtype}")
                kernels = self._kernel_time(stage)
                self._put(load, name, by, dtype, self._clock.measure(stage), None, kernels)
            for dtype in dtypes if self._kernels else ():
                self._measure_graphs(load, by, dtype, partial(calls.pair, dtype))
            del calls
        if elastic is not None:
            self._measure_elastic(load, inputs, elastic, least)
        for dtype in dtypes if least else ():
            self._measure_graphs(load, BARE, dtype, least[PAIR, dtype].call)
        self._compare_graphs(shape)
        if "all_to_all" in self._sweep.peers:
            for operation in collective_operations(self._group, inputs, dtypes):
                if operation.variant == ALONE and operation.dtype is not None:
                    key = (operation.name, operation.dtype)
                    by = f"{dist.get_backend(self._group)} {ALONE}"
                    timing = self._clock.measure(operation.call)
                    self._put(load, operation.name, by, operation.dtype, timing, least.get(key))

    def _measure_elastic(self, load: Workload, inputs: Inputs, buffer: Any, least: dict[Key, Least]) -> None:
        """V2's cached calls."""
        dtypes, oracle = self._sweep.dtypes, ElasticOracle(inputs) if self._sweep.check else None
        most = SMS[0] if self._floor is None else self._floor.all_sms
        for sms in (sms for sms in SMS if sms <= most):
            by, calls = by_elastic(sms), ElasticDecodeCalls(buffer, inputs, dtypes, sms)
            for name, dtype, call in calls.whole(dtypes):
                self._say(f"{load.shape} {by} {name} {dtype}")
                if oracle is not None and name != PAIR:
                    checked = CACHED if name == DISPATCH else name
                    operation = TimedOperation(checked, call, partial(outputs, name), dtype)
                    self._agree(f"{by} {name} {dtype}", oracle.complaint(operation, call()), ours=False)
                self._put(load, name, by, dtype, self._clock.measure(call), least.get((name, dtype)))
            for dtype in dtypes:
                self._measure_graphs(load, by, dtype, partial(calls.pair, dtype))

    def _put(
        self,
        load: Workload,
        name: str,
        by: str,
        dtype: Dtype,
        timing: Timing,
        least: Least | None,
        kernels: float | None = None,
    ) -> None:
        moved = _traffic(load, name, dtype)
        copy = None if least is None else least.copy
        self.report.figures.append(
            Figure(
                load.shape,
                name,
                by,
                dtype,
                least.sms if least is not None and by == BARE else None,
                timing.median,
                timing.p99,
                timing.host,
                moved.wire if moved else 0,
                moved.logical if moved else 0,
                copy.timing.median if copy else None,
                copy.sms if copy else None,
                least.timing.median if least else None,
                least.sms if least else None,
                kernels,
            )
        )

    def _floors(self, load: Workload) -> dict[Key, Least]:
        """The bare exchange and the plain copy of each operation; none where there are no kernels."""
        exchange, floor = self._exchange, self._floor
        if exchange is None or floor is None:
            return {}
        found: dict[Key, Least] = {}
        keys: list[Key] = [*((DISPATCH, dtype) for dtype in self._sweep.dtypes), (COMBINE, "bf16")]
        for name, dtype in keys:
            moved = _traffic(load, name, dtype)
            assert moved is not None
            self._say(f"{load.shape} {BARE} {name} {dtype}")
            reads = name == COMBINE
            best = exchange.best(self._clock, moved.pairs, floor.all_sms, reads=reads)
            copy = floor.best(moved.pairs, moved.wire, floor.all_sms)
            call = exchange.call(moved.pairs, best.sms, reads=reads)
            found[name, dtype] = Least(best.timing, best.sms, call, copy)
            above = best.timing.median - copy.timing.median if copy else 0.0
            if above > MOST_ABOVE_COPY_US:
                self.report.notes.append(
                    f"{load.shape} {name} {dtype}: the bare exchange is {above:.1f} us above a plain copy, "
                    f"more than {MOST_ABOVE_COPY_US}: no floor to be measured against."
                )
        for dtype in self._sweep.dtypes:
            parts = found[DISPATCH, dtype], found[COMBINE, "bf16"]

            def both(parts: tuple[Least, Least] = parts) -> None:
                parts[0].call()
                parts[1].call()

            timing = self._clock.measure(both)
            found[PAIR, dtype] = Least(timing, max(part.sms for part in parts), both)
        exchange.check()
        for (name, dtype), least in found.items():
            self._put(load, name, BARE, dtype, least.timing, least)
        return found

    def _kernel_time(self, stage: Stage) -> float | None:
        """The slowest rank's; None where there is no profiler that sees kernels."""
        clock = self._clock
        if not isinstance(clock, CudaClock):
            return None
        return clock.largest([kernel_time(stage, clock.lead_in, self._device)])[0] or None

    def _measure_graphs(self, load: Workload, by: str, dtype: Dtype, call: Call) -> None:
        for times in GRAPHS:
            self._say(f"{load.shape} {by} {GRAPH}{times} {dtype}")
            try:
                graph, why = capture(call, times, self._device), ""
            except Exception as error:  # whatever a library raises that was not made for it
                graph, why = None, f"{by}: not captured: {error}".splitlines()[0]
            if any(self._clock.largest([float(graph is None)])):
                self.report.notes.append(why or f"{by}: another rank could not capture it")
                return
            assert graph is not None
            timing = each_of(self._clock.measure(graph.replay), times)
            self._put(load, f"{GRAPH}{times}", by, dtype, timing, None)

    def _compare_graphs(self, shape: Shape) -> None:
        """Gives graphs the floor that is in a graph as well."""
        figures = self.report.figures
        bare = {(f.operation, f.dtype): f for f in figures if f.shape == shape and f.by == BARE}
        for place, figure in enumerate(figures):
            least = bare.get((figure.operation, figure.dtype))
            if figure.shape == shape and figure.exchange is None and least is not None:
                figures[place] = replace(figure, exchange=least.median)

    def _open_low_latency_deep_ep(self) -> Any:
        sweep = self._sweep
        if "deep_ep" not in sweep.peers or not self._kernels:
            return None
        largest = [max(getattr(s, name) for s in sweep.shapes) for name in ("tokens", "hidden", "experts")]
        buffer, why = open_low_latency_deep_ep(self._group, *largest)
        if why:
            self.report.notes.append(why)
        return buffer

    def _open_elastic_deep_ep(self) -> Any:
        if "deep_ep" not in self._sweep.peers or not self._kernels:
            return None
        buffer, why = open_elastic_deep_ep(self._group, largest(self._sweep))
        if why and why not in self.report.notes:
            self.report.notes.append(why)
        return buffer


def _is_alike(one: Shape, other: Shape) -> bool:
    """True for shapes of one curve."""
    return (one.hidden, one.topk, one.experts) == (other.hidden, other.topk, other.experts)


def _traffic(load: Workload, name: str, dtype: Dtype) -> Traffic | None:
    if name == DISPATCH:
        return load.dispatched(dtype)
    return load.combined() if name == COMBINE else None
