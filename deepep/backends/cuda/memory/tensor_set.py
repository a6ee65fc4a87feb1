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

#: calls after which a set is prepared: that takes some 20 us
SELDOM = 2


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


class TensorSet:
    """Arrays and views on one device, which has an index if it is no CPU.

    make: returns new tensors each time: the arrays, each in memory of its own, then the views, on the current
    stream. Raises torch.OutOfMemoryError.
    """

    __slots__ = ("_arrays", "_calls", "_device", "_views", "make")
    make: Callable[[], tuple[Any, ...]]

    def __init__(self, device: torch.device, arrays: Sequence[Array], views: Sequence[View] = ()) -> None:
        self._device, self._arrays, self._views = device, arrays, views
        self._calls = 0
        self.make = self._seldom

    def _seldom(self) -> tuple[Tensor, ...]:
        """The first calls: shapes that do not come again are not worth preparing for."""
        self._calls += 1
        if self._calls > SELDOM:
            self.make = at_once(self._device, self._arrays, self._views)
        made = [_empty(self._device, array) for array in self._arrays]
        made += [_view(made[view.of], view) for view in self._views]
        return tuple(made)


def at_once(
    device: torch.device, arrays: Sequence[Array], views: Sequence[View] = ()
) -> Callable[[], tuple[Any, ...]]:
    """A function that makes such tensors in one call where torch can."""
    one_by_one = _one_by_one(device, arrays, views)
    if not _core.TensorSet.is_available():
        return one_by_one
    try:
        made = _core.TensorSet(device.type, device.index or 0, one_by_one)
        for array in arrays:
            strides = contiguous_strides(array.shape) if array.strides is None else array.strides
            made.add_array(str(array.dtype).removeprefix("torch."), array.shape, strides)
    except ValueError:  # a kind of device or a dtype that the C functions have no number of
        return one_by_one
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


def _one_by_one(
    device: torch.device, arrays: Sequence[Array], views: Sequence[View]
) -> Callable[[], tuple[Any, ...]]:
    """Like templates without memory: `torch.empty_like` takes half the host time of `torch.empty`. They are
    made when they are first needed: for a moment they have memory.
    """
    templates: list[Tensor] = []

    def make() -> tuple[Tensor, ...]:
        if not templates:
            templates.extend(_empty(device, array) for array in arrays)
            for template in templates:
                template.untyped_storage().resize_(0)
        made = [torch.empty_like(template) for template in templates]
        made += [_view(made[view.of], view) for view in views]
        return tuple(made)

    return make


def _empty(device: torch.device, array: Array) -> Tensor:
    strides = contiguous_strides(array.shape) if array.strides is None else array.strides
    return torch.empty_strided(array.shape, strides, dtype=array.dtype, device=device)


def _view(of: Tensor, view: View) -> Tensor:
    return of.as_strided(view.shape, contiguous_strides(view.shape), view.begin)
