"""LogFMT: 10 bits a value for rows on their way back, logarithmic between a group's smallest and largest.

A group is 128 channels of one token. Its metadata, its largest and smallest magnitude as bfloat16, travels in
front. A value is a sign bit and a 9-bit code c: 0 stands for zero, c >= 1 for 2 ** (low + (c - 1) * step)
with low = max(log2 amin, log2 amax - 32) and step = (log2 amax - low) / 510, so that 511 stands for amax.
Groups are encoded by chunks of 1024 channels (512 where 1024 does not divide the row; a last chunk may be
shorter): only if low < log2 amax < 0 in every group of it. Other chunks travel as they are. The receiver
finds out which from the metadata.

No machine's log2 or exp2 is in this, since no two libraries give the same last bits: logarithms are integers
in units of 2 ** -21, of a polynomial in the mantissa, and a value is a polynomial in the fraction of its
logarithm. All steps are those of integers, or of float32, each rounded once: whoever takes them in this order
gets these bits, and csrc/kernels/low_latency/logfmt.hpp does. They are off by less than 2 ** -20 in log2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import require

GROUP = 128  # channels
LARGEST_CODE = 511
SIGN_BIT = 9
MAX_LOG2_RANGE = 32
PACKED_VALUES, PACKED_WORDS = 16, 5  # 16 values of 10 bits in 5 words of 32

STEPS = 510
UNIT_BITS = 21  # a logarithm is a number of units of 2 ** -21
FRACTION_BITS = 23  # of a value's own: as many as its mantissa has
STEP_BITS = 35  # of a step, which has 32 bits then
LOG2_OF_ZERO = -(1 << 30)  # less than any other, by more than the range
UPSCALE = 65536.0  # with which no bfloat16 is subnormal
# log2(1 + x) in units is x * (a + x * (b + ...)), and 2 ** x is 1 + x * (a + ...); x from 0 to 1.
LOG2_FACTORS = (
    3025495.75,
    -1511221.75,
    993448.9375,
    -684602.4375,
    409381.28125,
    -168416.140625,
    33067.77734375,
)
EXP2_FACTORS = (0.6931517, 0.2401594, 0.055818193, 0.008991657, 0.0018790114)
# Codes change at the middle, in linear terms, of two neighbours a step s apart: s / 2 + s * s * log(2) / 8.
MIDDLE_FACTOR = 8.1009394e-11  # log(2) / 8 of a step, by units of the range


class Encoded(NamedTuple):
    """Rows in LogFMT. Codes of chunks that do not qualify mean nothing."""

    codes: Tensor  # [..., H] int16: sign << 9 | magnitude
    meta: Tensor  # [..., H / 128, 2] bfloat16: largest and smallest magnitude
    qualifies: Tensor  # [..., H / 128] bool: whether the group's chunk is encoded


def logfmt_encode(x: Tensor) -> Encoded:
    """Encode `x` [..., H] bfloat16, H a multiple of 128: to the nearest value that a code stands for."""
    require(x.dtype == torch.bfloat16, f"x: got {x.dtype}; allowed: bfloat16")
    require(x.shape[-1] % GROUP == 0, f"x: got {list(x.shape)}; allowed: [..., multiple of {GROUP}]")
    groups = x.unflatten(-1, (x.shape[-1] // GROUP, GROUP))
    magnitude = groups.abs()
    meta = torch.stack([magnitude.amax(-1), magnitude.amin(-1)], dim=-1)  # a NaN makes both NaN: not encoded
    low, log_range = _scale(meta)
    reach = log_range.float()
    # A tensor, not a number: CUDA divides by numbers by way of a reciprocal, which rounds twice.
    steps_of_unit = torch.div(reach.new_tensor(float(STEPS)), reach)
    first = 1.5 - reach * MIDDLE_FACTOR  # code 1 stands for the low end, and begins half a step below
    distance = (_log2(magnitude) - low.unsqueeze(-1)).float() * steps_of_unit.unsqueeze(-1)
    code = (distance + first.unsqueeze(-1)).floor().clamp(0, LARGEST_CODE)
    sign = groups.signbit().to(torch.int16) << SIGN_BIT
    return Encoded((sign | code.to(torch.int16)).flatten(-2), meta, logfmt_qualifies(meta))


def logfmt_decode(codes: Tensor, meta: Tensor) -> Tensor:
    """The float32 values of `codes` [..., H] under `meta` [..., H / 128, 2]. Code 0 is a zero with a sign."""
    num_groups = codes.shape[-1] // GROUP
    require(
        list(meta.shape) == [*codes.shape[:-1], num_groups, 2] and codes.shape[-1] % GROUP == 0,
        f"codes: got {list(codes.shape)}, meta {list(meta.shape)}; allowed: [..., H] and [..., H / 128, 2]",
    )
    low, log_range = _scale(meta)
    step = (log_range * (1 << (STEP_BITS - UNIT_BITS)) + STEPS // 2) // STEPS
    code = (codes & LARGEST_CODE).to(torch.int64).unflatten(-1, (num_groups, GROUP))
    finer = STEP_BITS - FRACTION_BITS
    above = ((code - 1) * step.unsqueeze(-1) + (1 << (finer - 1))) >> finer
    logarithm = (low << (FRACTION_BITS - UNIT_BITS)).unsqueeze(-1) + above
    magnitude = torch.where(code == 0, 0.0, _exp2(logarithm)).flatten(-2)
    return torch.where((codes >> SIGN_BIT) != 0, -magnitude, magnitude)


def logfmt_qualifies(meta: Tensor) -> Tensor:
    """The groups that travel encoded, [..., G] bool, from the metadata [..., G, 2] alone."""
    high, low = meta.float().unbind(-1)
    good = (low < high) & (high < 1.0)  # a NaN is neither
    num_groups = good.shape[-1]
    per_chunk = 8 if num_groups % 8 == 0 else 4
    spare = -num_groups % per_chunk
    padded = torch.nn.functional.pad(good, (0, spare), value=True)
    chunk_good = padded.unflatten(-1, (padded.shape[-1] // per_chunk, per_chunk)).all(-1)
    return chunk_good.repeat_interleave(per_chunk, dim=-1)[..., :num_groups]


def logfmt_roundtrip(x: Tensor) -> Tensor:
    """Encodes and decodes: `x` [..., H] bfloat16 as it arrives in LogFMT, float32 [..., H]."""
    codes, meta, qualifies = logfmt_encode(x)
    return torch.where(qualifies.repeat_interleave(GROUP, dim=-1), logfmt_decode(codes, meta), x.float())


def logfmt_pack(codes: Tensor) -> Tensor:
    """[..., 16 * n] codes as [..., 5 * n] int32 words: from bit 0 on, 16 magnitudes of 9 bits, 16 signs."""
    require(codes.shape[-1] % PACKED_VALUES == 0, f"codes: got {list(codes.shape)}; allowed: [..., 16 * n]")
    units = codes.to(torch.int64).unflatten(-1, (codes.shape[-1] // PACKED_VALUES, PACKED_VALUES))
    magnitude_bits = (units.unsqueeze(-1) >> torch.arange(SIGN_BIT, device=codes.device)) & 1
    sign_bits = (units >> SIGN_BIT) & 1
    bits = torch.cat([magnitude_bits.flatten(-2), sign_bits], dim=-1)  # [..., n, 160]
    words = bits.unflatten(-1, (PACKED_WORDS, 32)) << torch.arange(32, device=codes.device)
    return words.sum(-1).to(torch.int32).flatten(-2)


def logfmt_unpack(words: Tensor) -> Tensor:
    """The inverse of `logfmt_pack`: [..., 5 * n] int32 -> [..., 16 * n] int16."""
    require(words.shape[-1] % PACKED_WORDS == 0, f"words: got {list(words.shape)}; allowed: [..., 5 * n]")
    units = words.to(torch.int64).unflatten(-1, (words.shape[-1] // PACKED_WORDS, PACKED_WORDS))
    bits = ((units.unsqueeze(-1) >> torch.arange(32, device=words.device)) & 1).flatten(-2)  # [..., n, 160]
    magnitude_bits = bits[..., : PACKED_VALUES * SIGN_BIT].unflatten(-1, (PACKED_VALUES, SIGN_BIT))
    magnitude = (magnitude_bits << torch.arange(SIGN_BIT, device=words.device)).sum(-1)
    sign = bits[..., PACKED_VALUES * SIGN_BIT :] << SIGN_BIT
    return (sign | magnitude).to(torch.int16).flatten(-2)


def _scale(meta: Tensor) -> tuple[Tensor, Tensor]:
    """(low, log2 amax - low) of metadata [..., 2], in units; int64 [...]. The second is 1 at least, also of
    groups that cannot be encoded.
    """
    high, low = _log2(meta).unbind(-1)
    low = torch.maximum(low, high - (MAX_LOG2_RANGE << UNIT_BITS))
    return low, (high - low).clamp(min=1)


def _log2(magnitude: Tensor) -> Tensor:
    """The logarithm of bfloat16 from 0 on, in units, int64; of infinities and NaNs, any number."""
    bits = (magnitude.float() * UPSCALE).view(torch.int32)
    x = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.0
    # What is added last is so large that the sum is rounded to a whole number, which its lowest bits are.
    fraction = _polynomial(x, LOG2_FACTORS, float(1 << 23)).view(torch.int32) - (150 << 23)
    exponent = (bits >> 23).to(torch.int64) - (127 + 16)
    return torch.where(magnitude == 0, LOG2_OF_ZERO, (exponent << UNIT_BITS) + fraction)


def _exp2(logarithm: Tensor) -> Tensor:
    """2 ** (logarithm / 2 ** 23), float32, of int64 from -200 on."""
    exponent = logarithm >> FRACTION_BITS
    fraction = (logarithm & ((1 << FRACTION_BITS) - 1)).to(torch.int32)
    mantissa = _polynomial((fraction | 0x3F800000).view(torch.float32) - 1.0, EXP2_FACTORS, 1.0)
    normal = exponent.clamp(-126, 127)  # the others are subnormal: rounded once, by the product
    value = (mantissa.view(torch.int32) + (normal << 23).to(torch.int32)).view(torch.float32)
    rest = (exponent - normal).clamp(-126, 0) + 127
    return value * (rest << 23).to(torch.int32).view(torch.float32)


def _polynomial(x: Tensor, factors: tuple[float, ...], constant: float) -> Tensor:
    """constant + x * (factors[0] + x * (factors[1] + ...)), float32: a product and a sum at a time."""
    value = torch.full_like(x, factors[-1])
    for factor in factors[-2::-1]:
        value = value * x + factor
    return value * x + constant
