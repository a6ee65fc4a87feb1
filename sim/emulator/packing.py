"""Objects with tensors in them as bytes, for the way to the leader and back.

torch.save keeps what tensors share, and refuses two that view the same memory as different types: rows in FP8
and their scales in one allocation, say. Here every tensor goes by itself, from its first element to its last,
and has the strides that it had: kernels are given them.
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
        bare = thing.detach()
        steps = [(size - 1) * stride for size, stride in zip(bare.shape, bare.stride(), strict=True)]
        span = bare.as_strided((sum(steps) + 1 if bare.numel() else 0,), (1,))
        return _tensor_of, (
            span.view(torch.uint8).numpy().tobytes(),
            bare.dtype,
            tuple(bare.shape),
            bare.stride(),
        )


def _tensor_of(span: bytes, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    if not span:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(span), dtype=torch.uint8).view(dtype).as_strided(shape, strides)
