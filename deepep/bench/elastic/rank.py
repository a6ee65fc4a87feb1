"""A run of `bench --mode elastic`, as one rank sees it. All ranks make the same calls in the same order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from deepep.api.elastic import ElasticBuffer
from deepep.bench.collective import collective_operations
from deepep.bench.elastic.operations import elastic_operations
from deepep.bench.elastic.oracle import ElasticOracle
from deepep.bench.figures import OURS, BenchReport
from deepep.bench.operations import Inputs
from deepep.bench.oracle import Oracle
from deepep.bench.peers import open_elastic_deep_ep
from deepep.bench.rank import TIMEOUT, Bench, Progress, WrongResultError
from deepep.bench.sweep import Sweep
from deepep.bench.workload import Workload, draw


def run_elastic_rank(
    group: Any, device: torch.device, sweep: Sweep, say: Progress = lambda line: None
) -> BenchReport:
    """Measures ElasticBuffer for all shapes of `sweep` on this rank, as `deepep.bench.rank.run_rank` does."""
    loads = [draw(sweep, shape) for shape in sweep.shapes]
    buffer = ElasticBuffer(
        group,
        num_gpu_timeout_secs=int(TIMEOUT),
        backend=sweep.backend,
        device=device,
        **largest(sweep),  # type: ignore[arg-type]  # of its integers
    )
    bench = ElasticBench(group, device, sweep, buffer, say)
    bench.report.environment["mode"] = sweep.mode
    try:
        bench.run(loads)
    except WrongResultError as wrong:
        bench.report.problems.append(str(wrong))
    buffer.destroy()
    return bench.report


def largest(sweep: Sweep) -> dict[str, int]:
    """The sizes that a buffer for all shapes of a sweep is made with."""
    return {
        "num_max_tokens_per_rank": max(shape.tokens for shape in sweep.shapes),
        "hidden": max(shape.hidden for shape in sweep.shapes),
        "num_topk": max(shape.topk for shape in sweep.shapes),
    }


class ElasticBench(Bench):
    """See `run_elastic_rank`."""

    def _measure_shape(self, load: Workload, deep_ep: Any) -> None:
        inputs = Inputs(load, self._rank, self._device, self._sweep.scales)
        self.report.skews[load.shape] = load.skew
        self._oracle = ElasticOracle(inputs) if self._sweep.check else None
        for by, buffer in ((OURS, self._buffer), ("deep_ep", deep_ep)):
            if buffer is not None:
                for sms in self._counts() or (None,):
                    operations = elastic_operations(buffer, inputs, self._sweep.dtypes, sms)
                    self._measure(by, operations, load.shape, sms)
        if "all_to_all" in self._sweep.peers:
            self._oracle = Oracle(inputs) if self._sweep.check else None
            operations = collective_operations(self._group, inputs, self._sweep.dtypes)
            self._measure(dist.get_backend(self._group), operations, load.shape, None)

    def _open_deep_ep(self) -> Any:
        if "deep_ep" not in self._sweep.peers or not self._kernels:
            return None
        buffer, why = open_elastic_deep_ep(self._group, largest(self._sweep))
        if why:
            self.report.notes.append(why)
        return buffer
