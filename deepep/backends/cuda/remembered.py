"""Calls like one that has passed its checks: they pass them as well, and need not be checked again.

All that checks look at of a tensor is compared by torch, in one call of C++: 0.3 us for three tensors where
Python takes 2. The class that does it is the one by which torch.compile decides whether compiled code may run
again (`torch._C._dynamo.guards.TensorGuards`). With a torch where it is missing, or answers otherwise than
expected, every call is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Remembered:
    """The last call of a kind that came twice in a row: its tensors, and all else that its checks look at.

    others: that; with the number of tensors, since only as many can be compared. are_alike(*objects): True if
    they are tensors like its own: exact types, dtypes, devices, sizes, strides, and how torch sees their
    memory (negated, say); addresses are not compared. A call with both is like it. value: the caller's, of
    that call; None before there is one.
    """

    __slots__ = ("_last", "are_alike", "others", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.are_alike: Callable[..., bool] = _never
        self.others: object = None
        self._last: object = None

    def note(self, tensors: tuple[Tensor, ...], others: tuple[object, ...], value: object = True) -> None:
        """A call has passed its checks."""
        seen = others, [(t.shape, t.dtype) for t in tensors]
        if seen != self._last:  # preparing takes some 5 us: for what comes again
            self._last = seen
            return
        self.are_alike, self.others, self.value = alike(tensors), others, value


def alike(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    """A function of as many objects: True if they are tensors like these. It keeps none of them."""
    return _comparison(tensors) if _is_trusted() else _never


def _comparison(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    from torch._C._dynamo import guards

    tensor_guards: Any = guards.TensorGuards
    check: Callable[..., bool] = tensor_guards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check
    return check


def _never(*objects: object) -> bool:
    return False


@functools.cache
def _is_trusted() -> bool:
    """True if this torch's comparison sees what it must."""
    try:
        return sees_differences(_comparison)
    except Exception:  # of a class that is not torch's interface
        return False


def sees_differences(comparison: Callable[[tuple[Tensor, ...]], Callable[..., bool]]) -> bool:
    """True if a comparison knows two tensors again, and each of them from what differs in one way."""
    rows = torch.zeros((4, 6), dtype=torch.bfloat16, device="cpu")
    entries = torch.zeros((4, 2), dtype=torch.int64, device="cpu")
    are_alike = comparison((rows, entries))
    wide = torch.zeros((4, 12), dtype=torch.bfloat16, device="cpu")
    others = (
        *(rows[:3], rows[:, :4], rows[None], rows.view(6, 4), rows.half(), rows.to("meta")),
        *(wide[:, ::2], torch._neg_view(rows), rows.to_sparse(), rows.as_subclass(torch.nn.Buffer)),
        *(rows.clone().requires_grad_(), rows.view(2, 12), rows.tolist(), None, 3),
    )
    return (
        are_alike(rows, entries) is True
        and are_alike(rows.clone(), entries.clone()) is True
        and not any(are_alike(other, entries) for other in others)
        and not any(are_alike(rows, other) for other in (entries.int(), entries[:, :1], entries[:3], None))
    )
