"""The number formats of dispatched rows: FP8 with a scale per 128 channels, and packed power-of-two scales.

Every step is one IEEE float32 operation, so that a kernel can give the same bits. LogFMT is in logfmt.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import require
from .records import dense

GROUP = 128  # channels that share a scale
E4M3_MAX = 448.0
E4M3_NAN = 0x7F  # what Hopper's cvt.rn.satfinite.e4m3x2.f32 makes of every NaN
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero group finite


class Fp8(NamedTuple):
    """Values and the scales that restore them: x is about values * scale_inv, group by group."""

    values: Tensor  # [..., H] float8_e4m3fn
    scale_inv: Tensor  # [..., H / 128] float32


def fp8_cast(x: Tensor, round_scale: bool = False) -> Fp8:
    """Cast `x` [..., H] (bfloat16 or float32, H a multiple of 128) to e4m3 with a scale per 128 channels.

    amax is the largest magnitude of the group that is not NaN, at least 1e-4; scale_inv = amax / 448 and
    y = x * (448 / amax), rounded to nearest even. With `round_scale`, scale_inv is rounded up to
    a power of two and y = x * (1 / scale_inv). NaN stays NaN (0x7F). A group with an infinity has scale_inv =
    inf: its infinities become NaN and its finite values zero, as these formulas say. ValueError for other
    shapes and dtypes.
    """
    require(x.dtype in (torch.bfloat16, torch.float32), f"x: got {x.dtype}; allowed: bfloat16, float32")
    groups = _groups(x.float())
    amax = groups.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1).clamp(min=AMAX_FLOOR)
    # Tensors, not Python numbers: torch divides by a number (CUDA) and divides a number (everywhere) by way
    # of a reciprocal, which rounds twice.
    limit, one = amax.new_tensor(E4M3_MAX), amax.new_tensor(1.0)
    scale_inv = torch.div(amax, limit)
    if round_scale:
        scale_inv = _next_power_of_two(scale_inv)
        scale = torch.div(one, scale_inv)
    else:
        scale = torch.div(limit, amax)
    scaled = groups * scale.unsqueeze(-1)
    # At most a rounding above 448, which rounds back to it: whether the cast saturates makes no difference.
    values = scaled.to(torch.float8_e4m3fn)
    values.view(torch.uint8)[scaled.isnan()] = E4M3_NAN
    return Fp8(values.flatten(-2), scale_inv)


def fp8_uncast(values: Tensor, scale_inv: Tensor) -> Tensor:
    """values * scale_inv: float32 [..., H]. Scales: [..., H/128] float32, or packed [..., H/512] int32."""
    if scale_inv.dtype == torch.int32:
        scale_inv = ue8m0_unpack(scale_inv)
    groups = _groups(values.float())
    require(
        scale_inv.dtype == torch.float32 and scale_inv.shape == groups.shape[:-1],
        f"scale_inv: got {scale_inv.dtype} {list(scale_inv.shape)}; "
        f"allowed: float32 {list(groups.shape[:-1])}",
    )
    return (groups * scale_inv.unsqueeze(-1)).flatten(-2)


def ue8m0_pack(scale_inv: Tensor) -> Tensor:
    """The exponent bytes of four neighbouring scales in one int32, the first in the lowest byte.

    `scale_inv` [..., G] float32 -> [..., G / 4] int32. Exact for powers of two; others are rounded down to
    one.
    """
    require(scale_inv.dtype == torch.float32, f"scale_inv: got {scale_inv.dtype}; allowed: float32")
    require(scale_inv.shape[-1] % 4 == 0, f"scale_inv: got {list(scale_inv.shape)}; allowed: [..., 4 * n]")
    exponent = (scale_inv.view(torch.int32) >> 23) & 0xFF
    return dense(exponent.to(torch.uint8)).view(torch.int32)


def ue8m0_unpack(packed: Tensor) -> Tensor:
    """The inverse of `ue8m0_pack`: [..., P] int32 -> [..., 4 * P] float32."""
    require(packed.dtype == torch.int32, f"packed: got {packed.dtype}; allowed: int32")
    return (dense(packed).view(torch.uint8).to(torch.int32) << 23).view(torch.float32)


def column_major_scales(scales: Tensor) -> Tensor:
    """The same [..., rows, P] values, stored [..., P, rows]: the rows of a column lie side by side."""
    stored = empty_column_major(list(scales.shape), scales.dtype, scales.device)
    return stored.copy_(scales)


def empty_column_major(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [..., rows, P] tensor, stored [..., P, rows]."""
    *lead, rows, columns = shape
    return torch.empty(*lead, columns, rows, dtype=dtype, device=device).transpose(-1, -2)


def _groups(x: Tensor) -> Tensor:
    """[..., H] as [..., H / 128, 128]."""
    require(
        x.dim() >= 1 and x.shape[-1] % GROUP == 0,
        f"values: got {list(x.shape)}; allowed: [..., multiple of {GROUP}]",
    )
    return x.unflatten(-1, (x.shape[-1] // GROUP, GROUP))


def _next_power_of_two(positive: Tensor) -> Tensor:
    """2 ** ceil(log2(v)) by the bits of a normal float32: exact, where a floating-point log2 need not be."""
    bits = positive.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent << 23).view(torch.float32)
