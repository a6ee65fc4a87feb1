"""Rounding of sums: the rules that every combine shares with the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require

# What Hopper's cvt.rn.bf16.f32 makes of every NaN. torch's CPU conversions leave 0x7FC0 or 0xFFFF, depending
# on whether the element fell into a vector or into the tail of a loop.
BF16_NAN = 0x7FFF
# What Hopper's float32 arithmetic makes of every NaN.
FLOAT32_NAN = 0x7FFFFFFF


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype` are summed. ValueError unless bfloat16, float32 or float64."""
    require(
        dtype in (torch.bfloat16, torch.float32, torch.float64),
        f"x: got {dtype}; allowed: bfloat16, float32, float64",
    )
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_to_bf16(value: Tensor) -> Tensor:
    """float32 to bfloat16, to nearest even, with one bit pattern for every NaN."""
    rounded = value.to(torch.bfloat16)
    rounded.view(torch.int16)[value.isnan()] = BF16_NAN
    return rounded


def settle_nans(value: Tensor) -> Tensor:
    """A finished float32 sum with one bit pattern for every NaN, in place. Other dtypes stay as they are."""
    if value.dtype == torch.float32:
        value.view(torch.int32)[value.isnan()] = FLOAT32_NAN
    return value


def round_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A finished sum in the dtype of its rows: bfloat16 is rounded once, wider dtypes stay as they are."""
    return round_to_bf16(value) if dtype == torch.bfloat16 else value.to(dtype)
