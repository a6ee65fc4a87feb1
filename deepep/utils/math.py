"""Arithmetic of tests and clients, as they import it from `deep_ep.utils.math`."""

from __future__ import annotations

import torch

from deepep.errors import RangeError
from deepep.formats import fp8_cast, fp8_uncast
from deepep.runtime.checks import check_int

__all__ = ["align", "calc_diff", "ceil_div", "per_token_cast_back", "per_token_cast_to_fp8"]


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up."""
    number, by = check_int("x", x, 0), check_int("y", y, 1)
    return -(-number // by)


def align(x: int, y: int) -> int:
    """x, rounded up to a multiple of y."""
    return ceil_div(x, y) * y


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """Distance of x and y, 0 to 1: 1 - 2 <a, b> / (<a, a> + <b, b>), of a = x + 1, b = y + 1.

    Raises RangeError for other shapes.
    """
    if x.shape != y.shape:
        raise RangeError("y", str(list(y.shape)), f"{list(x.shape)}, the shape of x")
    a, b = x.double() + 1, y.double() + 1
    both = (a * a + b * b).sum()
    return float(1 - 2 * (a * b).sum() / both)


def per_token_cast_to_fp8(
    x: torch.Tensor, round_scale: bool = False, use_ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`deepep.formats.fp8_cast`: (values [T, H] e4m3, scales [T, H / 128])."""
    return fp8_cast(x, round_scale=round_scale, use_ue8m0=use_ue8m0)


def per_token_cast_back(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`deepep.formats.fp8_uncast`, in bfloat16."""
    return fp8_uncast(x, scales).bfloat16()
