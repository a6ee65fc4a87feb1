"""Received rows to the rows of their lanes, and back, by the kernels of csrc/kernels/rows.

They run on the current stream, have the bits of `LocalRows`, wait for nothing and can be captured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepep import _cuda
from deepep.runtime import streams
from deepep.runtime.local_rows import LocalRows


class RowKernels(LocalRows):
    """See the module. index: of the device."""

    def __init__(self, index: int) -> None:
        self._index = index

    def sort(self, topk_idx: Tensor, slots: Tensor, counts: Tensor) -> None:
        ends = torch.empty_like(counts)
        pairs = torch.empty(topk_idx.numel(), dtype=torch.int64, device=slots.device)  # no one asks for them
        self._launch(
            _cuda.sort_pairs,
            topk_idx=topk_idx.data_ptr(),
            index_bytes=topk_idx.element_size(),
            num_local_experts=counts.shape[0],
            num_entries=topk_idx.numel(),
            num_pairs=topk_idx.numel(),
            pairs=pairs.data_ptr(),
            slots=slots.data_ptr(),
            ends=ends.data_ptr(),
        )
        counts.copy_(ends)
        counts[1:] -= ends[:-1]

    def spread(self, x: Tensor, slots: Tensor, out: Tensor) -> None:
        if slots.shape[0]:
            self._launch(_cuda.spread_rows, **_span(slots, x), x=x.data_ptr(), out=out.data_ptr())

    def reduce(self, y: Tensor, slots: Tensor, out: Tensor, biases: tuple[Tensor, ...] = ()) -> None:
        if biases or y.dtype != torch.bfloat16 or y.data_ptr() % 16:
            super().reduce(y, slots, out, biases)
        elif slots.shape[0]:
            to = out.data_ptr()
            self._launch(_cuda.reduce_rows, **_span(slots, y), y=y.data_ptr(), weights=0, out=to)

    def _launch(self, kernel: Callable[..., None], **arguments: int) -> None:
        stream = streams.current_address(self._index)
        if torch.cuda.current_device() == self._index:
            kernel(**arguments, stream=stream)
            return
        with torch.cuda.device(self._index):
            kernel(**arguments, stream=stream)


def _span(slots: Tensor, rows: Tensor) -> dict[str, int]:
    num_rows, num_topk = slots.shape
    row_bytes = rows.shape[1] * rows.element_size()
    return {"num_rows": num_rows, "row_bytes": row_bytes, "num_topk": num_topk, "slots": slots.data_ptr()}
