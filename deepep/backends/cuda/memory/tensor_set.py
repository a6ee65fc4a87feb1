"""Sets of uninitialised tensors of known shapes: made in one call, which takes a quarter of the host time of
making them one by one (docs/performance.md, "Host time").

`deepep._core.TensorSet` does it, by the C functions of torch's stable ABI. Where torch lacks one of them, and
where it makes no tensors (out of memory, say), they are made one by one, and torch says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep import _core


class Array(NamedTuple):
    """An array of a set. strides: None if it is contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None


class View(NamedTuple):
    """A contiguous view of an array of a set, the `of`-th, from its `begin`-th element on."""

    of: int
    shape: tuple[int, ...]
    begin: int


Make = Callable[[], tuple[Any, ...]]
"""Returns new tensors each time: the arrays of a set, each in memory of its own, then the views, on the
current stream. Raises torch.OutOfMemoryError."""


def maker(device: torch.device, arrays: Sequence[Array], views: Sequence[View] = ()) -> Make:
    """A function that makes such tensors on a device, with an index if it is no CPU."""
    one_by_one = _one_by_one(device, arrays, views)
    if not _core.TensorSet.is_available():
        return one_by_one
    made = _core.TensorSet(device.type, device.index or 0, one_by_one)
    for array in arrays:
        strides = contiguous_strides(array.shape) if array.strides is None else array.strides
        made.add_array(str(array.dtype).removeprefix("torch."), array.shape, strides)
    for view in views:
        made.add_view(view.of, view.shape, contiguous_strides(view.shape), view.begin)
    return made.make


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one index to the next, dimension by dimension."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _one_by_one(device: torch.device, arrays: Sequence[Array], views: Sequence[View]) -> Make:
    """Like templates without memory: `torch.empty_like` takes half the host time of `torch.empty`. They are
    made when they are first needed: for a moment they have memory.
    """
    templates: list[Tensor] = []
    cuts = [(of, shape, contiguous_strides(shape), begin) for of, shape, begin in views]

    def make() -> tuple[Tensor, ...]:
        if not templates:
            templates.extend(_template(device, array) for array in arrays)
        made = [torch.empty_like(template) for template in templates]
        made += [made[of].as_strided(shape, strides, begin) for of, shape, strides, begin in cuts]
        return tuple(made)

    return make


def _template(device: torch.device, array: Array) -> Tensor:
    strides = array.strides or contiguous_strides(array.shape)
    template = torch.empty_strided(array.shape, strides, dtype=array.dtype, device=device)
    template.untyped_storage().resize_(0)
    return template
