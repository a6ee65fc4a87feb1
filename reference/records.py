"""Records: all that belongs to a row, side by side in bytes, so that one exchange moves it."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(field: Tensor) -> Tensor:
    """A copy with the strides and the alignment of a fresh tensor.

    contiguous() gives neither where sizes of 1 make any stride count as contiguous; then views in a wider
    dtype are refused.
    """
    return field.clone(memory_format=torch.contiguous_format)


def pack_records(fields: dict[str, Tensor]) -> Tensor:
    """[n, *] tensors of any dtypes and strides, side by side as [n, bytes] uint8."""
    rows = [field if field.stride(-1) == 1 else dense(field) for field in fields.values()]
    return torch.cat([field.view(torch.uint8) for field in rows], dim=1)


def unpack_records(records: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fields that `pack_records` put into `records`, in the dtypes and widths of `like`."""
    fields = {}
    start = 0
    for name, model in like.items():
        width = model.shape[1] * model.element_size()
        fields[name] = dense(records[:, start : start + width]).view(model.dtype)
        start += width
    return fields
