"""Receive arrays: the up to five arrays that a dispatch receives into, by a spec that is worked out once.

A call may spend some 25 us of host time, and torch takes most of it: so what depends on shapes and dtypes
alone is kept from call to call, and arrays are made like a template: half of what `torch.empty` takes.

Shapes: K top-k, H hidden, P scales per row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from deepep import _cuda
from deepep.backends.cuda.memory.tensor_set import Array, TensorSet

_ALIGNMENT = 128
_MOST_KEPT = 256

Row = tuple[tuple[int, ...], torch.dtype]
"""A row's shape in an array, and its dtype."""


@dataclass(slots=True)
class ReceiveArrays:
    """Arrays of the heap that a dispatch's rows arrive in, for `capacity` rows.

    overflow_stream: where that is the overflow area (overflow.py), the stream to copy them out on.
    """

    x: torch.Tensor  # [capacity, H]
    source: torch.Tensor | None  # [capacity] int32: each row's token; None: not wanted
    scales: torch.Tensor | None  # [capacity, P]
    topk_idx: torch.Tensor | None  # [capacity, K]
    topk_weights: torch.Tensor | None  # [capacity, K] float32
    places: torch.Tensor | None = None  # [capacity, K] int32, of a dispatch that spreads rows
    overflow_stream: torch.cuda.Stream | None = None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All of them, in order."""
        return self.x, self.source, self.scales, self.topk_idx, self.topk_weights, self.places

    def copy(self, rows: int) -> ReceiveArrays:
        """The first `rows` rows, in memory of the current stream."""
        copies = (None if t is None else t[:rows].clone() for t in self.tensors())
        return ReceiveArrays(*copies)  # type: ignore[arg-type]

    def cut(self, rows: int) -> None:
        """Keeps the first `rows` rows, in place."""
        for tensor in self.tensors():
            if tensor is not None:
                if tensor.dim() == 1:
                    tensor.resize_(rows)
                else:
                    tensor.resize_(rows, tensor.shape[1])


@dataclass(slots=True)
class ExpandedArrays:
    """Arrays that a dispatch spreads received rows to: a row for each of their entries, grouped by expert.

    N: rows there is room to receive. X: expanded rows there is room for; where the host waits and more come,
    rows stay as they are received. overflow: None where no entry can be without a row.
    """

    places: torch.Tensor  # [T, K] int32: is written
    recv_places: torch.Tensor | None  # [N, K] int32, of the heap; None: rows are not spread here
    x: torch.Tensor  # [X, H]
    scales: torch.Tensor | None  # [X, P], or by columns what X rounded up to 4 takes
    weights: torch.Tensor  # [X] float32
    slots: torch.Tensor  # [N, K] int64
    expert_counts: torch.Tensor  # [L] int32
    overflow: torch.Tensor | None  # [1] int32, 0 before
    origins: torch.Tensor | None = None  # [X] int32, where there are scales by columns: is written
    tiles: torch.Tensor | None = None  # int32, 0 before, likewise: as many as num_scale_tiles
    alignment: int = 1
    column_major: bool = False
    zero_padding: bool = False

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All but those of the heap."""
        filled = (self.x, self.scales, self.weights, self.slots, self.expert_counts, self.overflow)
        return (self.places, *filled, self.origins, self.tiles)

    def argument(self) -> _cuda.ExpandedRows:
        """As a launch takes it."""
        return _cuda.ExpandedRows(
            places=self.places.data_ptr(),
            recv_places=0 if self.recv_places is None else self.recv_places.data_ptr(),
            x=self.x.data_ptr(),
            scales=0 if self.scales is None else self.scales.data_ptr(),
            weights=self.weights.data_ptr(),
            slots=self.slots.data_ptr(),
            expert_counts=self.expert_counts.data_ptr(),
            overflow=0 if self.overflow is None else self.overflow.data_ptr(),
            origins=0 if self.origins is None else self.origins.data_ptr(),
            tiles=0 if self.tiles is None else self.tiles.data_ptr(),
            capacity=self.x.shape[0],
            alignment=self.alignment,
            column_major=self.column_major,
            zero_padding=self.zero_padding,
        )


def num_scale_tiles(num_rows: int, num_local_experts: int) -> int:
    """The most tiles of 32 rows that so many expanded rows are, each of one expert."""
    return num_rows // 32 + num_local_experts + 1


class Templates(list[torch.Tensor]):
    """Tensors of shapes to be made, which have no memory of their own. num_bytes: of what is made.

    all_at_once: makes it all in one call (tensor_set.py).
    """

    def __init__(self, templates: Iterable[torch.Tensor]) -> None:
        super().__init__(templates)
        self.num_bytes = sum(t.numel() * t.element_size() for t in self)
        self.all_at_once = TensorSet(self[0].device, [Array(tuple(t.shape), t.dtype) for t in self])


class ReceiveSpec:
    """The arrays of one kind of dispatch: what a row has in each, whatever the number of rows.

    scales, topk: columns and dtype; None for what does not travel. with_source: source tokens are wanted;
    with_places: places of entries (csrc/kernels/dispatch/number.hpp).

    order: for each array of `ReceiveArrays`, its position among those there are, or None. kept: templates by
    capacity (`templates`). row_bytes, spare_bytes: a stretch for n rows takes n times the one, and the other.
    """

    def __init__(
        self,
        x: tuple[int, torch.dtype],
        scales: tuple[int, torch.dtype] | None,
        topk: tuple[int, torch.dtype] | None,
        with_source: bool,
        with_places: bool = False,
    ) -> None:
        self._rows: list[Row] = [((x[0],), x[1])]
        if with_source:
            self._rows.append(((), torch.int32))
        if scales is not None:
            self._rows.append(((scales[0],), scales[1]))
        if topk is not None:
            self._rows += [((topk[0],), topk[1]), ((topk[0],), torch.float32)]
            if with_places:
                self._rows.append(((topk[0],), torch.int32))
        self.row_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._rows)
        self.spare_bytes = len(self._rows) * _ALIGNMENT
        self.kept: dict[int, Templates] = {}
        there = (True, with_source, scales is not None, topk is not None, topk is not None, with_places)
        self.order = tuple(sum(there[:i]) if is_there else None for i, is_there in enumerate(there))

    def num_bytes(self, capacity: int) -> int:
        """Bytes that a stretch to carve needs at most."""
        return capacity * self.row_bytes + self.spare_bytes

    def rows_in(self, num_bytes: int) -> int:
        """Rows for which so many bytes are enough."""
        return max(0, num_bytes - self.spare_bytes) // self.row_bytes

    def templates(self, capacity: int, device: torch.device) -> Templates:
        """Tensors of the arrays' shapes, in order, with no memory of their own: for `torch.empty_like`."""
        made = self.kept.get(capacity)
        if made is None or made[0].device != device:
            made = Templates(_element(dtype, device).expand(capacity, *row) for row, dtype in self._rows)
            if len(self.kept) >= _MOST_KEPT:
                self.kept.clear()
            self.kept[capacity] = made
        return made

    def of(self, tensors: Sequence[torch.Tensor]) -> ReceiveArrays:
        """Of tensors in order."""
        return ReceiveArrays(*[None if i is None else tensors[i] for i in self.order])  # type: ignore[arg-type]

    def carve(self, stretch: torch.Tensor, capacity: int) -> ReceiveArrays:
        """All arrays out of one stretch of the heap, uint8."""
        tensors, begin = [], 0
        for row, dtype in self._rows:
            size = capacity * math.prod(row) * dtype.itemsize
            tensors.append(stretch[begin : begin + size].view(dtype).view(capacity, *row))
            begin += -(-size // _ALIGNMENT) * _ALIGNMENT
        return self.of(tensors)


_specs: dict[tuple[object, ...], ReceiveSpec] = {}


@functools.cache
def _element(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty((), dtype=dtype, device=device)


def receive_spec(
    x: torch.Tensor,
    scales: torch.Tensor | None,
    topk_idx: torch.Tensor | None,
    with_source: bool,
    with_places: bool = False,
) -> ReceiveSpec:
    """For rows like x [*, H] and scales [*, P], and entries like topk_idx [*, K]."""
    of_scales = None if scales is None else (scales.shape[1], scales.dtype)
    of_topk = None if topk_idx is None else (topk_idx.shape[1], topk_idx.dtype)
    key = (x.shape[1], x.dtype, of_scales, of_topk, with_source, with_places)
    spec = _specs.get(key)
    if spec is None:
        if len(_specs) >= _MOST_KEPT:
            _specs.clear()
        spec = _specs[key] = ReceiveSpec((x.shape[1], x.dtype), of_scales, of_topk, with_source, with_places)
    return spec
