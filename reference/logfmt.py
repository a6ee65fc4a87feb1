"""LogFMT: 10 bits a value for rows on their way back, logarithmic between a group's smallest and largest.

A group is 128 channels of one token. Its metadata, its largest and smallest magnitude as bfloat16, travels in
front. A value is a sign bit and a 9-bit code c: 0 stands for zero, c >= 1 for 2 ** (low + (c - 1) * step)
with low = max(log2 amin, log2 amax - 32) and step = (log2 amax - low) / 510, so that 511 stands for amax.
Groups are encoded by chunks of 1024 channels (512 where 1024 does not divide the row; a last chunk may be
shorter): only if low < log2 amax < 0 in every group of it. Other chunks travel as they are. The receiver
finds out which from the metadata.

log2 and exp2 are taken in float64 and rounded to float32, all else is float32: then results do not hang on
the last bit of whatever log2 a machine has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import require

GROUP = 128  # channels
LARGEST_CODE = 511
SIGN_BIT = 9
MAX_LOG2_RANGE = 32.0
PACKED_VALUES, PACKED_WORDS = 16, 5  # 16 values of 10 bits in 5 words of 32


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
    low, step, _ = _scale(meta)
    # Codes change at the middle, in linear terms, of two neighbours: v * (1 + 2 ** step) / 2.
    middle = _log2((1.0 + _exp2(step)) * 0.5) / step
    distance = torch.div(
        _log2(magnitude.float()) - low.unsqueeze(-1), step.unsqueeze(-1)
    )  # in steps from amin
    code = (distance + (2.0 - middle).unsqueeze(-1)).floor().nan_to_num(nan=0.0).clamp(0, LARGEST_CODE)
    sign = groups.signbit().to(torch.int16) << SIGN_BIT
    return Encoded((sign | code.to(torch.int16)).flatten(-2), meta, logfmt_qualifies(meta))


def logfmt_decode(codes: Tensor, meta: Tensor) -> Tensor:
    """The float32 values of `codes` [..., H] under `meta` [..., H / 128, 2]. Code 0 is a zero with a sign."""
    num_groups = codes.shape[-1] // GROUP
    require(
        list(meta.shape) == [*codes.shape[:-1], num_groups, 2] and codes.shape[-1] % GROUP == 0,
        f"codes: got {list(codes.shape)}, meta {list(meta.shape)}; allowed: [..., H] and [..., H / 128, 2]",
    )
    low, step, _ = _scale(meta)
    code = (codes & LARGEST_CODE).unflatten(-1, (num_groups, GROUP))
    exponent = (code - 1).float() * step.unsqueeze(-1) + low.unsqueeze(-1)
    magnitude = torch.where(code == 0, 0.0, _exp2(exponent)).flatten(-2)
    return torch.where((codes >> SIGN_BIT) != 0, -magnitude, magnitude)


def logfmt_qualifies(meta: Tensor) -> Tensor:
    """The groups that travel encoded, [..., G] bool, from the metadata [..., G, 2] alone."""
    good = _scale(meta)[2]
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


def _scale(meta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(low, step, whether the group can be encoded) of metadata [..., 2]; each [...]."""
    high, low = _log2(meta.float()).unbind(-1)
    low = torch.maximum(low, high - MAX_LOG2_RANGE)
    # A tensor, not a number: CUDA divides by numbers by way of a reciprocal, which rounds twice.
    step = torch.div(high - low, low.new_tensor(510.0))
    return low, step, (high < 0) & (low < high)


def _log2(x: Tensor) -> Tensor:
    return x.double().log2().float()


def _exp2(x: Tensor) -> Tensor:
    return x.double().exp2().float()
