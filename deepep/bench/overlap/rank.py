"""A run of `bench --mode overlap`, as one rank sees it. All ranks make the same calls in the same order.

An operation goes on the communication stream, matrix products on the current one, and the time ends when both
have. The bound is the same with blocks in the operation's place that hold as many SMs for as long as it takes
alone, and do nothing: what is above it goes to memory, to waiting for peers, and to the order of launches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deepep.api.buffer import Buffer
from deepep.bench.clock import Timing
from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.operations import CACHED, COMBINE, Inputs, dispatch_laid_out
from deepep.bench.rank import FUNCTIONAL, TIMEOUT, Bench, Progress
from deepep.bench.sweep import Dtype, Shape, Sweep
from deepep.bench.workload import Workload, draw, expert_stand_in

#: Figures of an operation: by itself, the products by themselves, both; and, on CUDA, the products beside
#: blocks that hold SMs.
ALONE, PRODUCTS, TOGETHER, BOUND = "alone", "products alone", "together", "bound"

Call = Callable[[], object]


@dataclass(frozen=True)
class Overlapped:
    """An operation that is put beside products. start: issues it; the result's event is waited for later."""

    name: str
    dtype: Dtype
    start: Callable[[], Any]


def run_overlap_rank(
    group: Any, device: torch.device, sweep: Sweep, say: Progress = lambda line: None
) -> BenchReport:
    """Measures overlap for all shapes of `sweep` on this rank, as `deepep.bench.rank.run_rank` does."""
    loads = [draw(sweep, shape) for shape in sweep.shapes]
    buffer = Buffer(group, backend=sweep.backend, device=device, timeout=TIMEOUT)
    num_sms = Buffer.num_sms
    bench = OverlapBench(group, device, sweep, buffer, say)
    try:
        bench.run(loads)
    finally:
        Buffer.set_num_sms(num_sms)
    buffer.destroy()
    return bench.report


class OverlapBench(Bench):
    """See `run_overlap_rank`."""

    def run(self, loads: Sequence[Workload]) -> None:
        """Fills the report."""
        sweep, report = self._sweep, self.report
        report.environment |= {"mode": sweep.mode, "width": sweep.width}
        if self._device.type == "cpu":
            report.notes.append(FUNCTIONAL)
        deep_ep = self._open_deep_ep()
        for load in loads:
            inputs = Inputs(load, self._rank, self._device, sweep.scales)
            for sms in self._counts() or (None,):
                for by, kind, buffer in ((OURS, Buffer, self._buffer), ("deep_ep", type(deep_ep), deep_ep)):
                    if buffer is None or (by != OURS and sms is not None and sms % 2):
                        continue
                    if sms is not None:
                        kind.set_num_sms(sms)
                    for operation in _operations(buffer, inputs, sweep.dtypes):
                        self._measure_overlap(load.shape, by, operation, sms)

    def _counts(self) -> tuple[int, ...]:
        if not self._kernels:
            return ()
        most = torch.cuda.get_device_properties(self._device).multi_processor_count
        return tuple(sms for sms in self._sweep.sms if sms < most)

    def _measure_overlap(self, shape: Shape, by: str, operation: Overlapped, sms: int | None) -> None:
        self._say(f"{shape} {by} {operation.name} {operation.dtype}" + (f" {sms} SMs" if sms else ""))
        alone = self._clock.measure(lambda: _finish(operation.start()))
        products = self._products(shape, alone.median)
        by_themselves = self._clock.measure(products)

        def together() -> None:
            started = operation.start()
            products()
            _finish(started)

        both = self._clock.measure(together)
        bound = self._bound(products, alone, sms) if sms is not None else None
        for name, timing in ((ALONE, alone), (PRODUCTS, by_themselves), (TOGETHER, both), (BOUND, bound)):
            if timing is not None:
                self.report.figures.append(
                    Figure(
                        shape=shape,
                        operation=f"{operation.name}, {name}",
                        by=by,
                        dtype=operation.dtype,
                        sms=sms,
                        median=timing.median,
                        p99=timing.p99,
                        host=timing.host,
                    )
                )

    def _products(self, shape: Shape, length: float) -> Call:
        """Matrix products [T, H] x [H, width] that take about `length` microseconds: as many on all ranks."""
        x, weight = (
            torch.randn(size, device=self._device).bfloat16()
            for size in ((shape.tokens, shape.hidden), (shape.hidden, self._sweep.width))
        )
        out = torch.empty(shape.tokens, self._sweep.width, dtype=torch.bfloat16, device=self._device)
        trial = 4

        def products(count: int) -> None:
            for _ in range(count):
                torch.mm(x, weight, out=out)

        one = self._clock.measure(lambda: products(trial)).median / trial
        count = max(1, round(length / one))
        return lambda: products(count)

    def _bound(self, products: Call, alone: Timing, sms: int) -> Timing:
        kernels: Any = importlib.import_module("deepep._cuda")
        beside = torch.cuda.Stream(self._device, priority=-1)  # as the communication stream

        def held() -> None:
            current = torch.cuda.current_stream(self._device)
            beside.wait_stream(current)
            kernels.hold(round(alone.median * 1e3), sms, beside.cuda_stream)
            products()
            current.wait_stream(beside)

        return self._clock.measure(held)


def _operations(buffer: Any, inputs: Inputs, dtypes: Sequence[Dtype]) -> Iterator[Overlapped]:
    """Cached dispatches of each dtype and a combine, of a Buffer with V1's calls."""
    layout = buffer.get_dispatch_layout(inputs.topk_idx, inputs.workload.shape.experts)
    received, _, _, _, handle, _ = dispatch_laid_out(buffer, inputs, layout, inputs.x)
    for dtype in dtypes:
        x, scales = inputs.rows(dtype)
        given = x if scales is None else (x, scales)
        yield Overlapped(CACHED, dtype, partial(buffer.dispatch, given, handle=handle, async_finish=True))
    y = expert_stand_in(received, inputs.rank)
    yield Overlapped(COMBINE, "bf16", partial(buffer.combine, y, handle, async_finish=True))


def _finish(started: Any) -> object:
    """Has the current stream wait for an operation; returns what it gave."""
    started[-1].current_stream_wait()
    return started
