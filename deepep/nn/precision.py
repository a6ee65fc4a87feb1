"""Dtypes and devices: of parameters by default, of rows that travel, and under torch.autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from deepep.errors import ArgumentTypeError, DeviceError, RangeError, ShapeError
from deepep.runtime.checks import SUM_DTYPES, dtype_names


def summed_dtypes(buffer: Any) -> tuple[torch.dtype, ...]:
    """Dtypes of rows that combine takes on this buffer's engine: bfloat16 alone on the kernels."""
    info = getattr(getattr(buffer, "runtime", None), "info", None)
    return (torch.bfloat16,) if getattr(info, "backend", None) == "cuda" else SUM_DTYPES


def parameter_options(
    buffer: Any, device: torch.device | str | int | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """`device` and `dtype` of a layer's parameters: as given, else what suits the buffer.

    Without a device: torch's default device where one is set, else the buffer's. Without a dtype: bfloat16
    where the buffer or the device is CUDA, else torch's default dtype. Raises ArgumentTypeError for a dtype
    whose rows combine does not take.
    """
    info = getattr(getattr(buffer, "runtime", None), "info", None)
    on_cuda = getattr(info, "device_type", "cpu") == "cuda"
    if device is None:
        target = torch.get_default_device()
        if target.type == "cpu" and on_cuda:
            target = torch.device("cuda", torch.cuda.current_device())
    else:
        target = known_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if on_cuda or target.type == "cuda" else torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError("dtype", type(dtype).__name__, "a torch.dtype")
    allowed = summed_dtypes(buffer)
    if dtype not in allowed:
        reason = "rows travel in it, and combine sums no others on this backend"
        if on_cuda:
            reason += "; for float32 weights under torch.autocast call .float() on the layer"
        raise ArgumentTypeError("dtype", dtype_names([dtype]), f"{dtype_names(allowed)}: {reason}")
    return {"device": target, "dtype": dtype}


def known_device(device: object) -> torch.device:
    """A device by its name or number. Raises ArgumentTypeError or RangeError."""
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise ArgumentTypeError("device", type(device).__name__, "a torch.device or its name")
    try:
        return torch.device(device)
    except (RuntimeError, ValueError) as error:
        raise RangeError("device", repr(device), "a device that torch knows") from error


def check_input(x: object, weight: Tensor, hidden: int, ndim: int | None = None) -> None:
    """Rows [.., H] for a layer with this weight; ndim: [T, H] alone. Traced ones are torch.compile's affair.

    Raises ArgumentTypeError, ShapeError or DeviceError.
    """
    if torch.compiler.is_compiling():
        return
    if not isinstance(x, Tensor):
        raise ArgumentTypeError("x", type(x).__name__, "a tensor")
    if x.layout != torch.strided or x.is_nested:
        raise ArgumentTypeError("x", "a nested or sparse tensor", "a dense tensor")
    if x.ndim == 0 or x.shape[-1] != hidden or (ndim is not None and x.ndim != ndim):
        raise ShapeError("x", str(list(x.shape)), f"[{'..' if ndim is None else 'T'}, {hidden}]")
    if x.device.type != weight.device.type:
        raise DeviceError("x", str(x.device), f"{weight.device}, where the weights are")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which torch.autocast has `x` multiplied; None where it has no say (off, or float64)."""
    kind = x.device.type
    # Not torch.amp.is_autocast_available: the compilers of torch up to 2.11 cannot trace it.
    if x.dtype == torch.float64 or kind not in ("cpu", "cuda"):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A block that computes on `x` in the dtypes it is written in."""
    if autocast_dtype(x) is None:
        return nullcontext()
    return torch.autocast(device_type=x.device.type, enabled=False)


def operands(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x and weights as they are multiplied: in autocast's dtype, or as they are, all of one dtype.

    Operators of this library are unknown to autocast, so the cast is made here. Raises ArgumentTypeError.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        return tuple(t.to(dtype) for t in (x, *weights))
    for weight in weights:
        check_multiplies(x, weight)
    return (x, *weights)


def check_multiplies(x: Tensor, weight: Tensor) -> None:
    """Raises ArgumentTypeError or DeviceError where rows `x` and `weight` cannot be multiplied."""
    if x.device.type != weight.device.type:
        raise DeviceError("x", str(x.device), f"{weight.device}, where the weights are")
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        allowed = f"{dtype_names([weight.dtype])}, the weights' dtype; any under torch.autocast"
        raise ArgumentTypeError("x", dtype_names([x.dtype]), allowed)


def check_plain(name: str, value: object) -> Tensor:
    """A dense tensor with values, all of it on this rank. Raises ArgumentTypeError or DeviceError."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(name, type(value).__name__, "a tensor")
    if is_distributed(value):
        allowed = "a plain tensor of this rank's tokens, as .to_local() or .full_tensor() gives"
        raise ArgumentTypeError(name, "a DTensor", allowed)
    if value.layout != torch.strided or value.is_nested:
        raise ArgumentTypeError(name, "a nested or sparse tensor", "a dense tensor")
    if value.is_meta:
        raise DeviceError(name, "meta", "a device with values")
    return value


def checked_output(made: object, rows: Tensor) -> Tensor:
    """Rows [P, H] that experts, anybody's code, made of `rows` [P, H]: what follows reads as many.

    Raises ArgumentTypeError, DeviceError or ShapeError. Traced ones are torch.compile's affair.
    """
    if torch.compiler.is_compiling():
        assert isinstance(made, Tensor)
        return made
    found = check_plain("experts", made)
    if found.shape != rows.shape:
        raise ShapeError("experts", str(list(found.shape)), f"{list(rows.shape)}, as the rows given")
    if found.device != rows.device:
        raise DeviceError("experts", str(found.device), f"{rows.device}, where the rows are")
    return found


def is_distributed(value: Tensor) -> bool:
    """True for a DTensor. Found by its attributes: the class takes long to import and is rarely needed."""
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:  # at once: to find no attribute takes a microsecond
        return False
    return hasattr(value, "placements") and hasattr(value, "device_mesh")
