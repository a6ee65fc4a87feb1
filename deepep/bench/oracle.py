"""Results that the operations have to return on this rank, by deepep.reference's global view of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.bench.operations import (
    CACHED,
    COMBINE,
    DISPATCH,
    FRESH,
    LAYOUT,
    Inputs,
    Outputs,
    TimedOperation,
)
from deepep.bench.sweep import Dtype
from deepep.bench.workload import expert_stand_in, fp8_rows
from deepep.reference import high_throughput
from deepep.reference.high_throughput import DispatchInput, DispatchOutput


class Oracle:
    """Expectations of one workload, computed when first asked for, in R times a rank's memory, and kept."""

    def __init__(self, inputs: Inputs) -> None:
        self._rank = inputs.rank
        self._load = inputs.workload
        self._device = inputs.device
        self._scales = inputs.scales
        self._known: dict[tuple[str, Dtype | None], Outputs] = {}

    def complaint(self, operation: TimedOperation, result: object) -> str:
        """Empty if the result is right, bit for bit; else what is wrong with it."""
        name = DISPATCH if operation.name in (CACHED, *FRESH) else operation.name
        key = (name, operation.dtype)
        if key not in self._known:
            self._known[key] = self._expect(*key)
        expected = self._known[key]
        wrong = [difference(name, got, expected[name]) for name, got in operation.outputs(result).items()]
        return "; ".join(filter(None, wrong))

    def _expect(self, name: str, dtype: Dtype | None) -> Outputs:
        if name == LAYOUT:
            layout = self._load.layouts[self._rank]
            return {
                "num_tokens_per_rank": layout.num_tokens_per_rank.to(self._device),
                "num_tokens_per_expert": layout.num_tokens_per_expert.to(self._device),
                "is_token_in_rank": layout.is_token_in_rank.to(self._device),
            }
        assert dtype is not None
        received = self._dispatched(dtype)
        if name == COMBINE:
            return self._combined(received)
        mine = received[self._rank]
        return {
            "recv_x": mine.recv_x,
            "recv_scales": mine.recv_scales,
            "recv_topk_idx": mine.recv_topk_idx,
            "recv_topk_weights": mine.recv_topk_weights,
            "num_recv_tokens_per_expert": mine.num_recv_tokens_per_expert,
        }

    def _dispatched(self, dtype: Dtype) -> list[DispatchOutput]:
        inputs = []
        for rank, layout in enumerate(self._load.layouts):
            x, scales = self._load.x(rank).to(self._device), None
            if dtype == "fp8":
                x, scales = fp8_rows(x, self._scales)
            inputs.append(
                DispatchInput(
                    x,
                    layout.is_token_in_rank.to(self._device),
                    scales,
                    self._load.topk_idx[rank].to(self._device),
                    self._load.topk_weights[rank].to(self._device),
                    layout.num_tokens_per_expert.to(self._device),
                )
            )
        return high_throughput.dispatch(inputs, self._load.shape.experts)

    def _combined(self, received: list[DispatchOutput]) -> Outputs:
        ys = [expert_stand_in(out.recv_x, rank) for rank, out in enumerate(received)]
        tables = [layout.is_token_in_rank.to(self._device) for layout in self._load.layouts]
        sums = high_throughput.combine(ys, tables)[self._rank].x
        returned = [y[out.src_rank == self._rank] for y, out in zip(ys, received, strict=True)]
        return {"combined_x": sums, "returned_rows": torch.cat(returned)}


def difference(name: str, got: Tensor | list[int] | None, expected: Tensor | list[int] | None) -> str:
    """Empty for the same dtype, shape and bits (not strides); else what differs."""
    if not (isinstance(got, Tensor) and isinstance(expected, Tensor)):
        return "" if type(got) is type(expected) and got == expected else f"{name}: got {_brief(got)}"
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        want = f"{expected.dtype} {list(expected.shape)}"
        return f"{name}: got {got.dtype} {list(got.shape)}, expected {want}"
    raw, raw_expected = (
        t.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (got, expected)
    )
    wrong = int((raw != raw_expected).sum())
    return f"{name}: {wrong} of {raw.numel()} bytes differ" if wrong else ""


def _brief(value: object) -> str:
    return f"{value!r:.60}, expected something else"
