"""Results that ElasticBuffer's operations have to return on this rank, by the view that the reference has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepep.bench.elastic.operations import ALIGNMENT, COMBINE_EXPANDED, FRESH_EXPANDED
from deepep.bench.operations import COMBINE, Inputs, TimedOperation
from deepep.bench.oracle import difference
from deepep.bench.sweep import Dtype
from deepep.bench.workload import expert_stand_in, fp8_rows
from deepep.reference import elastic
from deepep.reference.elastic import ElasticInput, ElasticOutput


@dataclass(frozen=True)
class ElasticOracle:
    """Expectations of one workload, in R times a rank's memory and more: made anew for each operation."""

    inputs: Inputs

    def complaint(self, operation: TimedOperation, result: object) -> str:
        """Empty if all real rows of the result are right, bit for bit; else what is wrong with them."""
        got, rank = operation.outputs(result), self.inputs.rank
        assert operation.dtype is not None
        if operation.name in (COMBINE, COMBINE_EXPANDED):
            expanded = operation.name == COMBINE_EXPANDED
            received = self._received(operation.dtype, expanded)
            ys = [expert_stand_in(out.recv_x, source) for source, out in enumerate(received)]
            sums = elastic.combine(
                ys, self._given("bf16"), self._experts, alignment=ALIGNMENT, expanded=expanded
            )
            return difference("combined_x", got["combined_x"], sums[rank].x)
        wanted = self._received(operation.dtype, operation.name in FRESH_EXPANDED)[rank]
        wrong = [_rows_differ(name, mine, getattr(wanted, name), wanted) for name, mine in got.items()]
        return "; ".join(filter(None, wrong))

    @property
    def _experts(self) -> int:
        return self.inputs.workload.shape.experts

    def _given(self, dtype: Dtype) -> list[ElasticInput]:
        load, device = self.inputs.workload, self.inputs.device
        given = []
        for rank in range(load.num_ranks):
            x, scales = load.x(rank).to(device), None
            if dtype == "fp8":
                x, scales = fp8_rows(x, self.inputs.scales)
            topk = load.topk_idx[rank].to(device), load.topk_weights[rank].to(device)
            given.append(ElasticInput(x, *topk, scales))
        return given

    def _received(self, dtype: Dtype, expanded: bool) -> list[ElasticOutput]:
        return elastic.dispatch(
            self._given(dtype),
            self._experts,
            num_max_tokens=self.inputs.workload.shape.tokens,
            alignment=ALIGNMENT,
            expand=expanded,
        )


def _rows_differ(name: str, got: object, expected: Tensor | None, wanted: ElasticOutput) -> str:
    """Compares the rows that are real: a buffer may hand out more, behind them and in gaps."""
    if not (isinstance(got, Tensor) and isinstance(expected, Tensor)):
        return "" if got is expected is None else f"{name}: got {type(got).__name__}"
    real = wanted.is_real.nonzero().squeeze(1)
    if got.dim() != expected.dim() or got.shape[0] < expected.shape[0]:
        return f"{name}: got {list(got.shape)}, expected {list(expected.shape)}"
    return difference(name, _taken(got, real), _taken(expected, real))


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], also of FP8, which has no indexing."""
    if rows.element_size() > 1:
        return rows[index]
    return rows.contiguous().view(torch.uint8)[index].view(rows.dtype)
