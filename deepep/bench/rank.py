"""A whole run, as one rank sees it. All ranks go through the same calls in the same order."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from deepep.api.buffer import Buffer
from deepep.backends.cuda.memory.ipc import gather_over
from deepep.bench.clock import Clock, CudaClock, HostClock
from deepep.bench.collective import collective_operations
from deepep.bench.figures import OURS, BenchReport, Figure
from deepep.bench.floor import Floor
from deepep.bench.operations import LAYOUT, Inputs, TimedOperation, buffer_operations
from deepep.bench.oracle import Oracle
from deepep.bench.peers import open_deep_ep
from deepep.bench.sweep import Shape, Sweep
from deepep.bench.workload import Workload, draw
from deepep.errors import RangeError
from deepep.version import __version__

#: seconds a kernel waits for a peer
TIMEOUT = 60.0
FUNCTIONAL = "These are functional figures: CPU tensors over gloo. They say nothing about any GPU."

Progress = Callable[[str], None]


class Checker(Protocol):
    """Says what results have to be."""

    def complaint(self, operation: TimedOperation, result: object) -> str:
        """Empty if the result is right; else what is wrong with it."""


class WrongResultError(AssertionError):
    """An operation of ours returned something else than the oracle."""


def run_rank(
    group: Any, device: torch.device, sweep: Sweep, say: Progress = lambda line: None
) -> BenchReport:
    """Measures all of `sweep` on this rank; `say` is called with a line of progress now and then.

    Returns the same report on every rank, ended early if a result is wrong.

    Raises what Buffer and `draw` raise, and RangeError if the device has none of the SM counts.
    """
    loads = [draw(sweep, shape) for shape in sweep.shapes]
    buffer = Buffer(group, backend=sweep.backend, device=device, timeout=TIMEOUT)
    num_sms = Buffer.num_sms
    bench = Bench(group, device, sweep, buffer, say)
    try:
        bench.run(loads)
    except WrongResultError as wrong:
        bench.report.problems.append(str(wrong))
    finally:
        Buffer.set_num_sms(num_sms)
    buffer.destroy()
    return bench.report


class Bench:
    """See `run_rank`."""

    def __init__(self, group: Any, device: torch.device, sweep: Sweep, buffer: Any, say: Progress) -> None:
        self._group, self._device, self._sweep = group, device, sweep
        self._buffer, self._say = buffer, say
        self._rank = buffer.rank
        self._kernels = buffer.info.backend == "cuda"
        self._clock = self._make_clock()
        self._floor: Floor | None = None
        self._oracle: Checker | None = None
        self.report = BenchReport(environment(device, sweep, buffer))

    def run(self, loads: Sequence[Workload]) -> None:
        """Fills the report. Raises WrongResultError, on every rank."""
        sweep, notes = self._sweep, self.report.notes
        if self._device.type == "cpu":
            notes.append(FUNCTIONAL)
        elif not self._kernels:
            notes.append("The reference backend serves here: there is no floor, and SM counts mean nothing.")
        if not sweep.check:
            notes.append("Results were not compared with the reference (--no-check).")
        if self._kernels:
            most = max(int(load.rows.max()) * load.shape.row_bytes("bf16") for load in loads)
            self._floor = Floor(self._clock, self._group, self._rank, self._device, most)
            if not self._counts():
                raise RangeError("sms", str(sweep.sms), f"at most the device's {self._floor.all_sms}")
            if len(self._counts()) < len(sweep.sms):
                notes.append(f"SM counts above the device's {self._floor.all_sms} were left out.")
        deep_ep = self._open_deep_ep()
        for load in loads:
            self._measure_shape(load, deep_ep)
        if self._floor is not None:
            self.report.copies.extend(self._floor.measured)

    def _measure_shape(self, load: Workload, deep_ep: Any) -> None:
        inputs = Inputs(load, self._rank, self._device, self._sweep.scales)
        self.report.skews[load.shape] = load.skew
        self._oracle = Oracle(inputs) if self._sweep.check else None
        counts = self._counts()
        self._measure_buffer(OURS, Buffer, self._buffer, inputs, counts or (None,))
        if "all_to_all" in self._sweep.peers:
            operations = collective_operations(self._group, inputs, self._sweep.dtypes)
            self._measure(dist.get_backend(self._group), operations, load.shape, None)
        if deep_ep is not None:
            self._measure_buffer("deep_ep", type(deep_ep), deep_ep, inputs, _even(counts))

    def _measure_buffer(
        self, by: str, kind: Any, buffer: Any, inputs: Inputs, counts: Iterable[int | None]
    ) -> None:
        """Operations of a Buffer for each SM count; the layout, which takes none, with the first."""
        for turn, sms in enumerate(counts):
            if sms is not None:
                kind.set_num_sms(sms)
            operations = buffer_operations(buffer, inputs, self._sweep.dtypes, by_topk=by == OURS)
            if turn > 0:
                operations = (op for op in operations if op.name != LAYOUT)
            self._measure(by, operations, inputs.workload.shape, sms)

    def _measure(self, by: str, operations: Iterable[TimedOperation], shape: Shape, sms: int | None) -> None:
        for operation in operations:
            own = None if operation.name == LAYOUT else sms
            what = _described(by, operation)
            self._say(f"{shape} {what}" + (f" {own} SMs" if own else ""))
            self._check(what, operation, ours=by == OURS)
            timing = self._clock.measure(operation.call)
            floor = None
            if self._floor is not None and operation.traffic is not None:
                moved = operation.traffic
                floor = self._floor.best(moved.pairs, moved.wire, own or self._floor.all_sms)
            self.report.figures.append(Figure.of(shape, operation, by, own, timing, floor))

    def _check(self, what: str, operation: TimedOperation, *, ours: bool) -> None:
        """Compares one result with the oracle's. Raises WrongResultError for ours; notes it for others."""
        if self._oracle is not None:
            self._agree(what, self._oracle.complaint(operation, operation.call()), ours=ours)

    def _agree(self, what: str, mine: str, *, ours: bool) -> None:
        """Looks at all ranks' complaints. Raises WrongResultError, on all; of others' results notes them."""
        complaints = enumerate(raw.decode() for raw in gather_over(self._group)(mine.encode()))
        said = next((f"{what}: rank {rank}: {complaint}" for rank, complaint in complaints if complaint), "")
        if said and ours:
            raise WrongResultError(said)
        if said:
            self.report.notes.append(f"Differs from the reference: {said}")

    def _counts(self) -> tuple[int, ...]:
        """The SM counts to measure; none where they mean nothing."""
        return () if self._floor is None else tuple(n for n in self._sweep.sms if n <= self._floor.all_sms)

    def _open_deep_ep(self) -> Any:
        sweep = self._sweep
        if "deep_ep" not in sweep.peers or not self._kernels:
            return None
        counts = _even(self._counts())
        if not counts:
            self.report.notes.append("deep_ep: takes even SM counts only")
            return None
        hidden = max(shape.hidden for shape in sweep.shapes)
        buffer, why = open_deep_ep(self._group, hidden, max(counts))
        if why:
            self.report.notes.append(why)
        return buffer

    def _make_clock(self) -> Clock:
        sweep = self._sweep
        if self._device.type == "cpu":
            return HostClock(self._group, self._device, sweep.iterations, sweep.warmup)
        token = torch.zeros(1, device=self._device)

        def align() -> None:
            if self._kernels:
                self._buffer.runtime.endpoint().barrier(torch.cuda.current_stream().cuda_stream)
            else:
                dist.all_reduce(token, group=self._group)

        return CudaClock(self._group, self._device, sweep.iterations, sweep.warmup, align)


def _described(by: str, operation: TimedOperation) -> str:
    return " ".join(filter(None, (by, operation.variant, operation.name, operation.dtype)))


def _even(counts: Iterable[int]) -> tuple[int, ...]:
    return tuple(sms for sms in counts if sms % 2 == 0)


def environment(device: torch.device, sweep: Sweep, buffer: Any) -> dict[str, Any]:
    """Describes the host and software that figures were measured on."""
    on = "CPU"
    transport = "gloo"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        on = f"{sweep.num_ranks} x {properties.name}, {properties.multi_processor_count} SMs each"
        transport = "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": on,
        "functional_only": device.type == "cpu",
        "ranks": sweep.num_ranks,
        "backend": buffer.info.backend,
        "deepep": __version__,
        "torch": torch.__version__,
        "transport": transport,
        "routing": sweep.routing,
        "trace": Path(sweep.trace).name if sweep.trace is not None else None,
        "layer": sweep.layer if sweep.trace is not None else None,
        "scales": sweep.scales,
        "checked": sweep.check,
        "iterations": sweep.iterations,
        "seed": sweep.seed,
    }
