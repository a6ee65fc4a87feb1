"""The gradient codec in torch's operations, by bits, for tensors on GPUs; any device gives the same bits.

The rules are those of csrc/layout/gradient_codec.hpp, which has them in words.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
NOT_FINITE = 255
_WORD, _MAGNITUDE, _INFINITY = 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800000
_NAN = 0x7FC00000


@dataclass(frozen=True)
class WireFormat:
    """The numbers of csrc's struct of the same format; `code` is the integer type of as many bits."""

    mantissa: int
    min_exponent: int
    code: torch.dtype
    top_exponent: int = 0
    top_mantissa: int = 0
    has_scale: bool = True


FORMATS = {
    "fp8": WireFormat(3, -6, torch.uint8, 8, 0x600000),
    "fp16": WireFormat(10, -14, torch.int16, 14, 0x7FFFFF),
    "bf16": WireFormat(7, -126, torch.int16, has_scale=False),
}


def message_bytes(name: str, count: int) -> int:
    """Bytes of a message of `count` elements."""
    form = FORMATS[name]
    return count * form.code.itemsize + (-(-count // BLOCK) if form.has_scale else 0)


def encode(name: str, values: Tensor, message: Tensor, key: tuple[int, int] | None, first_index: int) -> None:
    """Fills `message` with values [N] float32. key None: to nearest."""
    form, count = FORMATS[name], values.numel()
    scaled = values
    if form.has_scale:
        largest = _blocks(values.view(torch.int32) & _MAGNITUDE).amax(-1)
        is_above = ((largest & 0x7FFFFF) > form.top_mantissa).to(torch.int32)
        scales = ((largest >> 23) - form.top_exponent + is_above).clamp(min=1)
        scales[largest >= _INFINITY] = NOT_FINITE
        message[count * form.code.itemsize :] = scales.to(torch.uint8)
        factors = ((254 - scales) << 23).view(torch.float32)
        scaled = values * _each(factors, count)
        scaled = torch.where(_each(scales, count) == NOT_FINITE, torch.zeros_like(scaled), scaled)
    codes = _codes(form, scaled, key, first_index)
    if form.code is torch.int16:
        codes = torch.where(codes > 0x7FFF, codes - 0x10000, codes)  # the same 16 bits
    message[: count * form.code.itemsize] = codes.to(form.code).view(torch.uint8)


def decode(name: str, message: Tensor, into: Tensor, add: bool) -> None:
    """Writes a message's values to `into` [N] float32, or adds them."""
    form, count = FORMATS[name], into.numel()
    width = form.code.itemsize
    stored = message[: count * width]
    if width > 1:  # a message may begin anywhere
        stored = stored.clone().view(form.code)
    codes = stored.to(torch.int32) & ((1 << 8 * width) - 1)
    magnitude, sign = codes & ((1 << 8 * width - 1) - 1), codes >> (8 * width - 1) << 31
    normal = magnitude << (23 - form.mantissa)
    if form.has_scale:
        small = magnitude.to(torch.float32) * 2.0 ** (form.min_exponent - form.mantissa)
        normal = normal + ((126 + form.min_exponent) << 23)
        normal = torch.where(magnitude < 1 << form.mantissa, small.view(torch.int32), normal)
    values = (normal | sign).view(torch.float32)
    if form.has_scale:
        scales = message[count * width :].to(torch.int32)
        bits = torch.where(scales == NOT_FINITE, torch.full_like(scales, _NAN), scales << 23)
        values = values * _each(bits.view(torch.float32), count)
    if add:
        into += values
    else:
        into.copy_(values)


def block_exponents(values: Tensor) -> Tensor:
    """The largest exponent byte of each block: values [N] float32 -> uint8."""
    return ((_blocks(values.view(torch.int32) & _MAGNITUDE)).amax(-1) >> 23).to(torch.uint8)


def encode_fixed(values: Tensor, exponents: Tensor, headroom: int) -> Tensor:
    """values [N] float32 -> int32 [N], 0 where a block's exponent is 255."""
    shift = 156 - headroom - exponents.to(torch.int32)
    half = shift >> 1
    scaled = values * _each(_power_of_two(half), values.numel())
    scaled = scaled * _each(_power_of_two(shift - half), values.numel())
    is_finite = _each(exponents, values.numel()) != NOT_FINITE
    return torch.where(is_finite, scaled, torch.zeros_like(scaled)).round().to(torch.int32)


def decode_fixed(integers: Tensor, exponents: Tensor, headroom: int, divisor: float) -> Tensor:
    """int32 [N] -> float32 [N], divided by `divisor`."""
    shift, count = 156 - headroom - exponents.to(torch.int32), integers.numel()
    half = shift >> 1
    once = torch.where(exponents == NOT_FINITE, _power_of_two(-half) * torch.nan, _power_of_two(-half))
    values = integers.to(torch.float32) * _each(once, count) * _each(_power_of_two(half - shift), count)
    return torch.div(values, values.new_full((), divisor))  # a number would go by way of its reciprocal


def _codes(form: WireFormat, values: Tensor, key: tuple[int, int] | None, first_index: int) -> Tensor:
    """The codes of scaled values, as non-negative integers."""
    bits = values.view(torch.int32).to(torch.int64) & _WORD
    magnitude = bits & _MAGNITUDE
    cut, rebias = 23 - form.mantissa, (126 + form.min_exponent) << form.mantissa
    min_normal = (127 + form.min_exponent) << 23
    random = None if key is None else _draw(values, key, first_index) >> (32 - cut)
    if random is None:
        normal = ((magnitude + ((1 << cut - 1) - 1) + (magnitude >> cut & 1)) >> cut) - rebias
    else:
        normal = ((magnitude + random) >> cut) - rebias
    if form.has_scale:
        unit = 2.0 ** (form.min_exponent + (23 - form.mantissa if random is None else 0))
        above = (values.abs() + unit).view(torch.int32).to(torch.int64)
        if random is None:
            small = above - struct.unpack("<i", struct.pack("<f", unit))[0]
        else:
            small = ((above + random) >> cut) - (min_normal >> cut)
        normal = torch.where(magnitude < min_normal, small, normal)
    codes = normal | (bits >> 31 << (8 * form.code.itemsize - 1))
    if form.has_scale:
        return codes
    return torch.where(magnitude > _INFINITY, torch.full_like(bits, _NAN >> 16), codes)


def _draw(values: Tensor, key: tuple[int, int], first_index: int) -> Tensor:
    """The dice of elements from `first_index` on: int64 [N] of 32 random bits."""
    index = torch.arange(first_index, first_index + values.numel(), device=values.device)
    h = ((index & _WORD) * 0x9E3779B1 + key[0]) & _WORD
    h = ((h ^ (h >> 16)) * 0x85EBCA6B & _WORD) ^ key[1]
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _WORD
    return h ^ (h >> 16)


def _blocks(values: Tensor) -> Tensor:
    """[N] as [blocks, 128], zeros behind it."""
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)


def _each(of_blocks: Tensor, count: int) -> Tensor:
    """One value per block as one per element."""
    return of_blocks.repeat_interleave(BLOCK)[:count]


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)
