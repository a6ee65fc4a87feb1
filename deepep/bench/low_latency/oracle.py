"""Results that low-latency calls have to return on this rank, by deepep.reference's global view."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from deepep.bench.low_latency.calls import stand_in_rows
from deepep.bench.operations import COMBINE, Inputs
from deepep.bench.oracle import difference
from deepep.bench.sweep import Dtype
from deepep.reference import low_latency
from deepep.reference.low_latency import LowLatencyOutput


class LowLatencyOracle:
    """Expectations of one workload, computed when first asked for, and kept.

    most: M. reduce: where a combine sums, as `deepep.reference.low_latency.combine` takes it.
    """

    def __init__(self, inputs: Inputs, most: int, reduce: Literal["token", "rank"]) -> None:
        self._inputs, self._most, self._reduce = inputs, most, reduce
        load = inputs.workload
        ranks = range(load.num_ranks)
        self._xs = [load.x(rank).to(inputs.device) for rank in ranks]
        self._idx = [load.topk_idx[rank].to(inputs.device) for rank in ranks]
        self._weights = [load.topk_weights[rank].to(inputs.device) for rank in ranks]
        self._sums: Tensor | None = None

    def complaint(self, name: str, dtype: Dtype, made: Any) -> str:
        """Empty if what an operation returned is right, bit for bit; else what is wrong with it."""
        if name == COMBINE:
            if self._sums is None:
                self._sums = self._combined()
            return difference("combined_x", made[0], self._sums)
        rows, scales = made[0] if isinstance(made[0], tuple) else (made[0], None)
        expected = self._dispatched(dtype)[self._inputs.rank]
        wrong = difference("recv_count", made[1], expected.recv_count)
        if wrong:
            return wrong
        # Past the counts there may be anything.
        place = _is_row(expected)
        parts = [difference("recv_x", _bytes(rows)[place], _bytes(expected.recv_x)[place])]
        if scales is not None and expected.recv_scales is not None:
            parts.append(difference("recv_scales", scales[place], expected.recv_scales[place]))
        return "; ".join(filter(None, parts))

    def _dispatched(self, dtype: Dtype) -> list[LowLatencyOutput]:
        experts = self._inputs.workload.shape.experts
        return low_latency.dispatch(self._xs, self._idx, self._most, experts, fp8=dtype == "fp8")

    def _combined(self) -> Tensor:
        received = self._dispatched("bf16")
        ys = [stand_in_rows(out.recv_x, rank) for rank, out in enumerate(received)]
        sums = low_latency.combine(
            ys,
            self._idx,
            self._weights,
            received,
            num_max_tokens=self._most,
            num_experts=self._inputs.workload.shape.experts,
            reduce=self._reduce,
        )
        return sums[self._inputs.rank]


def _bytes(rows: Tensor) -> Tensor:
    """The rows for an index: not every kernel of torch's takes FP8."""
    return rows.view(torch.uint8)


def _is_row(output: LowLatencyOutput) -> Tensor:
    """[L, R*M] bool: rows that are valid."""
    return output.recv_src_info >= 0
