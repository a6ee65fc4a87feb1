"""Number formats of dispatched rows: FP8 (e4m3) with a scale per 128 channels, packed power-of-two scales.

`Buffer.dispatch` takes such rows as (x, scales), and `low_latency_dispatch` makes the same bits by itself
with use_fp8. For CPU and CUDA tensors. Leading dimensions are arbitrary, H is the hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepep.errors import ArgumentError, ArgumentTypeError, DeviceError, LayoutError, ShapeError
from deepep.runtime.checks import check_flag, dtype_names

GROUP = 128
"""Channels that share a scale."""

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
"""The least magnitude that scales are made for: a group of zeros has a finite scale."""

_E4M3_NAN = 0x7F
_EXPONENT, _MANTISSA = 0x7F800000, 0x007FFFFF  # of float32


class ScaledRows(NamedTuple):
    """FP8 rows and their scales, as `Buffer.dispatch` takes them.

    values: [..., H] float8_e4m3fn.
    scales: [..., H / 128] float32, or packed [..., H / 512] int32.
    """

    values: torch.Tensor
    scales: torch.Tensor


def fp8_cast(x: torch.Tensor, *, round_scale: bool = False, use_ue8m0: bool = False) -> ScaledRows:
    """Cast rows to FP8 with a scale per 128 channels.

    x: [..., H] bfloat16 or float32, H a multiple of 128 (of 512 with use_ue8m0).
    round_scale: scales are powers of two, rounded up.
    use_ue8m0: with round_scale: scales come as exponent bytes, four in an int32.

    A group's scale is amax / 448, amax being its largest magnitude, at least 1e-4; multiply by it to get the
    values back. Values are rounded to nearest even. NaN stays NaN and counts for no amax; a group with an
    infinity has an infinite scale, its finite values become 0 and its infinities NaN. Not differentiated.

    Raises ArgumentTypeError for another dtype, ShapeError for another H, ArgumentError for use_ue8m0 alone.
    """
    _check("x", x, torch.bfloat16, torch.float32)
    round_scale, use_ue8m0 = check_flag("round_scale", round_scale), check_flag("use_ue8m0", use_ue8m0)
    if use_ue8m0 and not round_scale:
        raise ArgumentError(
            "use_ue8m0", "True, without round_scale", "both: only powers of two can be packed"
        )
    groups = _grouped("x", x.detach().float(), 4 * GROUP if use_ue8m0 else GROUP)
    is_nan = groups.isnan()
    amax = groups.abs().masked_fill(is_nan, 0.0).amax(dim=-1).clamp_(min=AMAX_FLOOR)
    # Divided by tensors: torch divides by a Python number through its reciprocal on CUDA, which rounds twice.
    most = torch.full_like(amax, E4M3_MAX)
    scales = amax / most
    if round_scale:
        # A mantissa that is not zero carries into the exponent: the next power of two.
        scales = ((scales.view(torch.int32) + _MANTISSA) & _EXPONENT).view(torch.float32)
        factors = torch.ones_like(scales) / scales
    else:
        factors = most / amax
    scaled = groups * factors.unsqueeze(-1)
    values = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    values = values.masked_fill(scaled.isnan(), _E4M3_NAN)  # of one bit pattern, on every device
    values = values.view(torch.float8_e4m3fn).flatten(-2)
    return ScaledRows(values, ue8m0_pack(scales) if use_ue8m0 else scales)


def fp8_uncast(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Restore rows from FP8: values times their groups' scales, as [..., H] float32.

    values: [..., H] float8_e4m3fn (or anything that converts to float32).
    scales: [..., H / 128] float32, or packed [..., H / 512] int32; any strides.

    Raises ShapeError and ArgumentTypeError.
    """
    _check("values", values)
    _check("scales", scales, torch.float32, torch.int32)
    if values.device != scales.device:
        raise DeviceError("scales", str(scales.device), f"{values.device}, where the values are")
    if scales.dtype == torch.int32:
        scales = ue8m0_unpack(scales)
    groups = _grouped("values", values.float(), GROUP)
    if scales.shape != groups.shape[:-1]:
        raise ShapeError("scales", str(list(scales.shape)), str(list(groups.shape[:-1])))
    return (groups * scales.unsqueeze(-1)).flatten(-2)


def ue8m0_pack(scales: torch.Tensor) -> torch.Tensor:
    """Pack the exponents of four neighbouring scales into one int32, the first in the lowest byte.

    scales: [..., G] float32, G a multiple of 4 -> [..., G / 4] int32. Exact for powers of two; the mantissas
    of others are dropped.

    Raises ArgumentTypeError and ShapeError.
    """
    _check("scales", scales, torch.float32)
    if scales.dim() == 0 or scales.shape[-1] % 4:
        raise ShapeError("scales", str(list(scales.shape)), "[..., a multiple of 4]")
    exponents = (scales.view(torch.int32) & _EXPONENT) >> 23
    packed = exponents.unflatten(-1, (scales.shape[-1] // 4, 4))
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=scales.device)
    return (packed << shifts).sum(dim=-1, dtype=torch.int32)


def ue8m0_unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack what `ue8m0_pack` made: [..., P] int32 -> [..., 4 * P] float32. Raises ArgumentTypeError."""
    _check("packed", packed, torch.int32)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    exponents = (packed.unsqueeze(-1) >> shifts) & 0xFF
    return (exponents << 23).view(torch.float32).flatten(-2)


def column_major_scales(scales: torch.Tensor) -> torch.Tensor:
    """Copy [..., rows, P] scales so that a column's rows lie side by side, as grouped GEMMs load them.

    Raises ArgumentTypeError, LayoutError and ShapeError.
    """
    _check("scales", scales)
    if scales.dim() < 2:
        raise ShapeError("scales", str(list(scales.shape)), "[..., rows, P]")
    return scales.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


def _check(name: str, value: object, *dtypes: torch.dtype) -> None:
    """A dense tensor of one of these dtypes; of any that is not complex, if there are none."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(name, type(value).__name__, "a tensor")
    if value.layout != torch.strided:
        raise LayoutError(name, str(value.layout).removeprefix("torch."), "a dense tensor")
    if value.is_neg():
        raise LayoutError(name, "a view that negates its memory", "a tensor in memory, as of resolve_neg()")
    if value.is_complex() or (dtypes and value.dtype not in dtypes):
        allowed = dtype_names(dtypes) if dtypes else "real numbers"
        raise ArgumentTypeError(name, str(value.dtype).removeprefix("torch."), allowed)


def _grouped(name: str, x: torch.Tensor, multiple: int) -> torch.Tensor:
    """[..., H] as [..., H / 128, 128]."""
    if x.dim() == 0 or x.shape[-1] % multiple:
        raise ShapeError(name, str(list(x.shape)), f"[..., a multiple of {multiple}]")
    return x.unflatten(-1, (x.shape[-1] // GROUP, GROUP))
