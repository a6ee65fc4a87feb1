"""Codecs: what a gradient looks like on the wire, as bytes of messages and as sums in fixed point.

On the CPU the work is the extension's (csrc/layout/rules/gradients.cpp), elsewhere torch's own operations do
the same by the same bits (device_codec.py). The oracle is reference/gradient_codec.py.

    "plain"    the tensor's own elements; sums in float32 (float64 for float64)
    "bf16"     2 bytes an element, no scale
    "fp16"     2 bytes an element and a scale per 128: nothing overflows
    "fp8"      e4m3, 1 byte an element and a scale per 128: 1.0078 bytes
    "fixed32"  int32 in units that all ranks agree on: a sum has the same bits in any order
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from deepep.collectives import device_codec

BLOCK = device_codec.BLOCK
PLAIN, FIXED = "plain", "fixed32"
LOSSY = ("bf16", "fp16", "fp8")
NAMES = (PLAIN, FIXED, *LOSSY)


def rounding_key(*numbers: int) -> tuple[int, int]:
    """The two words by which a message's dice fall: of seed, step, tensor, sender and level."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    first, second = struct.unpack("<2I", hashlib.blake2b(packed, digest_size=8).digest())
    return first, second


def num_blocks(count: int) -> int:
    """Blocks of `count` elements."""
    return -(-count // BLOCK)


def headroom_of(num_ranks: int) -> int:
    """Bits that a sum over `num_ranks` needs beyond an addend, in fixed point."""
    return max(num_ranks - 1, 0).bit_length()


@dataclass(frozen=True)
class Messages:
    """Messages of one format. name: one of `LOSSY`, or "plain", whose codes have `dtype`.

    key: rounding is stochastic, by these dice; None: to nearest. Accumulators are float32, of "plain" float64
    where dtype is.
    """

    name: str
    dtype: torch.dtype = torch.float32
    key: tuple[int, int] | None = None

    def size(self, count: int) -> int:
        """Bytes of a message of `count` elements."""
        if self.name == PLAIN:
            return count * self.dtype.itemsize
        return device_codec.message_bytes(self.name, count)

    def encode(self, values: Tensor, first_index: int) -> Tensor:
        """The message of values [N] of the accumulators' dtype, that begin at element `first_index`."""
        if self.name == PLAIN:
            return values.to(self.dtype).view(torch.uint8)
        message = torch.empty(self.size(values.numel()), dtype=torch.uint8, device=values.device)
        if values.is_cpu:
            from deepep import _core

            start = first_index & 0xFFFFFFFF
            is_nearest, key = self.key is None, self.key or (0, 0)
            _core.encode_gradients(self.name, values.numpy(), message.numpy(), is_nearest, key, start)
        else:
            device_codec.encode(self.name, values, message, self.key, first_index)
        return message

    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        """Writes a message's values to `into` [N], or adds them."""
        if self.name == PLAIN:
            values = message.view(self.dtype)
            if add:
                into += values
            else:
                into.copy_(values)
        elif into.is_cpu:
            from deepep import _core

            _core.decode_gradients(self.name, message.numpy(), into.numpy(), add)
        else:
            device_codec.decode(self.name, message, into, add)


@dataclass(frozen=True)
class FixedPoint:
    """Sums in fixed point, whose units all ranks know: `exponents` [blocks] uint8, the ranks' maximum."""

    exponents: Tensor
    headroom: int

    @staticmethod
    def exponents_of(values: Tensor) -> Tensor:
        """This rank's exponents: values [N] float32 -> uint8, one per block."""
        if not values.is_cpu:
            return device_codec.block_exponents(values)
        from deepep import _core

        exponents = torch.empty(num_blocks(values.numel()), dtype=torch.uint8, device="cpu")
        _core.block_exponents(values.numpy(), exponents.numpy())
        return exponents

    def encode(self, values: Tensor) -> Tensor:
        """Values [N] float32 -> int32."""
        if not values.is_cpu:
            return device_codec.encode_fixed(values, self.exponents, self.headroom)
        from deepep import _core

        integers = torch.empty(values.shape, dtype=torch.int32, device="cpu")
        _core.encode_fixed(values.numpy(), self.exponents.numpy(), self.headroom, integers.numpy())
        return integers

    def decode(self, integers: Tensor, divisor: float) -> Tensor:
        """Sums [N] int32 -> float32, divided by `divisor`."""
        if not integers.is_cpu:
            return device_codec.decode_fixed(integers, self.exponents, self.headroom, divisor)
        from deepep import _core

        values = torch.empty(integers.shape, dtype=torch.float32, device="cpu")
        _core.decode_fixed(integers.numpy(), self.exponents.numpy(), self.headroom, divisor, values.numpy())
        return values

    @staticmethod
    def sum(addends: list[Tensor], divisor: float) -> Tensor:
        """The sum of [N] float32 each, divided: for a rank that has all of the addends, and so the units."""
        units = torch.stack([FixedPoint.exponents_of(addend) for addend in addends]).amax(0)
        fixed = FixedPoint(units, headroom_of(len(addends)))
        total = fixed.encode(addends[0])
        for addend in addends[1:]:
            total += fixed.encode(addend)
        return fixed.decode(total, divisor)

    def part(self, first: int, end: int) -> FixedPoint:
        """The units of the elements [first, end); `first` begins a block, or is the end."""
        return FixedPoint(self.exponents[num_blocks(first) : num_blocks(end)], self.headroom)
