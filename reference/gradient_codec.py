"""The number formats of gradients on the wire: FP8, FP16 and BF16 messages, and sums in fixed point.

A block is 128 elements, the last one perhaps fewer. FP8 (e4m3) and FP16 messages are the elements' codes,
then a byte s per block for the scale 2^(s - 127); s = 255 says that the block holds an infinity or a NaN, and
all of it is read as NaN. BF16 messages are the codes alone. Everything here goes by real numbers and torch's
casts; csrc/layout/gradient_codec.hpp goes by bits.
"""

from __future__ import annotations

import hashlib
import math
import struct

import torch
from torch import Tensor

from .checks import require

BLOCK = 128
NOT_FINITE = 255
FORMATS = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16}
_MANTISSA = {"fp8": 3, "fp16": 10, "bf16": 7}
_MIN_EXPONENT = {"fp8": -6, "fp16": -14, "bf16": -126}
_LARGEST = {"fp8": 448.0, "fp16": 32767.998046875}  # a block is scaled so that it does not pass these


def rounding_key(*numbers: int) -> tuple[int, int]:
    """The two words by which a message's dice fall: of seed, step, tensor, sender and level."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    first, second = struct.unpack("<2I", hashlib.blake2b(packed, digest_size=8).digest())
    return first, second


def dice(count: int, key: tuple[int, int], first_index: int) -> Tensor:
    """[count] int64, 32 random bits for each element from `first_index` on."""
    word = 0xFFFFFFFF
    h = (torch.arange(first_index, first_index + count, device="cpu") & word) * 0x9E3779B1
    h = (h + key[0]) & word
    h = ((h ^ (h >> 16)) * 0x85EBCA6B & word) ^ key[1]
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & word
    return h ^ (h >> 16)


def message_bytes(form: str, count: int) -> int:
    """Bytes of a message of `count` elements."""
    return count * FORMATS[form].itemsize + (0 if form == "bf16" else -(-count // BLOCK))


def encode(form: str, values: Tensor, key: tuple[int, int] | None = None, first_index: int = 0) -> Tensor:
    """values [N] float32 -> message uint8. `key` None: to nearest, ties to even.

    Else stochastically: away from zero with the probability that the part cut off is of a step, in units of
    what 32 - (mantissa bits cut) random bits tell apart.
    """
    _check(form, values)
    if form == "bf16":
        rounded = values if key is None else _throw(form, values, key, first_index)
        codes = rounded.to(torch.bfloat16).view(torch.int16)
        return torch.where(values.isnan(), 0x7FC0, codes).to(torch.int16).view(torch.uint8)
    blocks = _blocks(values)
    largest = blocks.abs().amax(-1)
    is_finite = blocks.isfinite().all(-1)
    scales = _smallest_scale(largest.nan_to_num(0.0, 0.0), _LARGEST[form])
    factor = torch.exp2(127.0 - scales.double()).float()
    scaled = torch.where(is_finite.unsqueeze(-1), blocks, 0.0) * factor.unsqueeze(-1)
    flat = scaled.flatten()[: values.numel()]
    if key is not None:
        flat = torch.where(_blocks_of(is_finite, flat), _throw(form, flat, key, first_index), flat)
    codes = flat.to(FORMATS[form]).view(torch.uint8)
    scales[~is_finite] = NOT_FINITE
    return torch.cat([codes, scales.to(torch.uint8)])


def decode(form: str, message: Tensor, count: int) -> Tensor:
    """message uint8 -> values [count] float32."""
    wanted = message_bytes(form, count)
    require(message.numel() == wanted, f"message: got {message.numel()} bytes; allowed: {wanted}")
    width = FORMATS[form].itemsize
    values = message[: count * width].clone().view(FORMATS[form]).float()
    if form == "bf16":
        return values
    scales = message[count * width :]
    factor = torch.exp2(scales.double() - 127.0).float()
    factor[scales == NOT_FINITE] = math.nan
    return values * _blocks_of(factor, values)


def block_exponents(values: Tensor) -> Tensor:
    """The largest exponent byte of each block: values [N] float32 -> uint8 [N / 128, rounded up]."""
    exponents = (values.view(torch.int32) >> 23) & 0xFF
    return _blocks(exponents).amax(-1).to(torch.uint8)


def headroom_of(num_ranks: int) -> int:
    """Bits that a sum over `num_ranks` needs beyond an addend."""
    return max(num_ranks - 1, 0).bit_length()


def encode_fixed(values: Tensor, exponents: Tensor, headroom: int) -> Tensor:
    """values [N] float32 -> int32: values in units of 2^(exponent + headroom - 156), ties to even.

    exponents: of each block, at least this rank's own. 0 where one is 255.
    """
    each = _blocks_of(exponents, values)
    finite = torch.where(each == NOT_FINITE, 0.0, values.double())
    return (finite * torch.exp2(156.0 - headroom - each.double())).round().to(torch.int32)


def decode_fixed(integers: Tensor, exponents: Tensor, headroom: int, divisor: float = 1.0) -> Tensor:
    """The inverse, of sums: int32 [N] -> float32, rounded to float32 before it is scaled, then divided."""
    each = _blocks_of(exponents, integers)
    values = (integers.float().double() * torch.exp2(each.double() + headroom - 156.0)).float()
    values[each == NOT_FINITE] = math.nan
    return torch.div(values, torch.tensor(divisor, dtype=torch.float32, device=values.device))


def _check(form: str, values: Tensor) -> None:
    require(form in FORMATS, f"form: got {form!r}; allowed: {', '.join(FORMATS)}")
    right = values.dtype == torch.float32 and values.dim() == 1
    require(right, f"values: got {values.dtype} {list(values.shape)}; allowed: float32 [N]")


def _blocks(values: Tensor) -> Tensor:
    """[N] as [N / 128, 128], zeros behind it."""
    padded = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK))
    return padded.view(-1, BLOCK)


def _blocks_of(of_blocks: Tensor, elements: Tensor) -> Tensor:
    """One value per block as one per element."""
    return of_blocks.repeat_interleave(BLOCK)[: elements.numel()]


def _smallest_scale(largest: Tensor, limit: float) -> Tensor:
    """The bytes of the smallest powers of two by which `largest` is at most `limit`."""
    exponent = torch.frexp(largest.double() / limit)
    is_power = exponent.mantissa == 0.5
    power = exponent.exponent - is_power.to(torch.int32)  # ceil(log2(largest / limit))
    return (torch.where(largest == 0, -126, power) + 127).clamp(min=1)


def _throw(form: str, values: Tensor, key: tuple[int, int], first_index: int) -> Tensor:
    """Finite values rounded to the format by dice; the others as they are."""
    cut = 23 - _MANTISSA[form]
    smallest = 2.0 ** _MIN_EXPONENT[form]
    magnitude = values.abs()
    if form != "bf16":  # in a float32 as large as the smallest normal number, which keeps 23 bits
        kept = (magnitude + smallest).double() - smallest
        magnitude = torch.where(magnitude < smallest, kept, magnitude.double())
    magnitude = magnitude.double()
    exponent = torch.frexp(magnitude).exponent - 1
    exponent = torch.where(magnitude == 0, _MIN_EXPONENT[form], exponent).clamp(min=_MIN_EXPONENT[form])
    steps = magnitude / torch.exp2(exponent.double() - _MANTISSA[form])
    random = dice(values.numel(), key, first_index) >> (32 - cut)
    is_up = ((steps - steps.floor()) * 2.0**cut).floor() + random >= 2.0**cut
    rounded = (steps.floor() + is_up) * torch.exp2(exponent.double() - _MANTISSA[form])
    rounded = torch.copysign(rounded, values.double()).float()
    return torch.where(values.isfinite(), rounded, values)
