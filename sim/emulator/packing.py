"""Objects with tensors in them as bytes, for the way to the leader and back.

torch.save keeps what tensors share, and refuses two that view the same memory as different types: rows in FP8
and their scales in one allocation, say. Here every tensor goes as its own elements, however it views them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def pack(thing: Any) -> bytes:
    """The object as bytes; tensors on the CPU, of any dtypes and strides."""
    out = io.BytesIO()
    _Packer(out).dump(thing)
    return out.getvalue()


def unpack(received: bytes, sizes: list[int]) -> Iterator[tuple[int, Any]]:
    """The objects of `pack` that lie there behind each other, and their numbers; sizes: 0 for none."""
    begin = 0
    for source, size in enumerate(sizes):
        if size:
            yield source, pickle.loads(received[begin : begin + size])
        begin += size


class _Packer(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        """Tensors as their bytes; all else as it is pickled anyway."""
        if not isinstance(thing, Tensor):
            return NotImplemented
        elements = thing.detach().contiguous().flatten().view(torch.uint8)
        return _tensor_of, (elements.numpy().tobytes(), thing.dtype, tuple(thing.shape))


def _tensor_of(elements: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not elements:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(elements), dtype=torch.uint8).view(dtype).view(shape)
