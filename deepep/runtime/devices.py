"""Devices: where the tensors of a Buffer lie.

The machine and the constructor's argument decide, not the process group. A group exchanges words (addresses,
sizes, which ranks there are); vLLM hands over its gloo group and then sends CUDA tensors, and a group made
without a backend's name serves both. So, the first that says something:

1. `Buffer(..., device=...)`: "cpu", "cuda", or a torch.device.
2. DEEPEP_DEVICE: the same words.
3. CUDA, if torch sees a GPU here and has NCCL, and the backend has CUDA tensors; else the CPU.

All ranks must come to the same: it is part of what they compare when they construct.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from deepep.errors import ArgumentTypeError, RangeError

_ALLOWED = "'cpu', 'cuda', or a torch.device of these"


def asked_device(given: object) -> torch.device | None:
    """The device that the constructor's argument or DEEPEP_DEVICE asks for; None leaves it to the machine.

    Raises ArgumentTypeError or RangeError.
    """
    name, value = ("device", given) if given is not None else ("DEEPEP_DEVICE", _environment())
    if value is None:
        return None
    if not isinstance(value, (str, torch.device)):
        raise ArgumentTypeError(name, type(value).__name__, _ALLOWED)
    try:
        device = torch.device(value)
    except RuntimeError:
        raise RangeError(name, repr(value)[:200], _ALLOWED) from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise RangeError(name, repr(str(value)), _ALLOWED)
    if not has_cuda():
        raise RangeError(name, repr(str(value)), "'cpu': torch sees no CUDA device here, or has no NCCL")
    current = torch.cuda.current_device()
    if device.index not in (None, current):
        allowed = f"'cuda:{current}', this rank's current device (torch.cuda.set_device)"
        raise RangeError(name, repr(str(value)), allowed)
    return torch.device("cuda", current)


def default_device(device_types: Sequence[str]) -> torch.device:
    """The first of a backend's device types that this machine has; its last, if it has none."""
    if "cuda" in device_types and ("cpu" not in device_types or has_cuda()):
        return torch.device("cuda", torch.cuda.current_device() if has_cuda() else 0)
    return torch.device("cpu")


def has_cuda() -> bool:
    """True if tensors on a GPU can be sent from here."""
    return torch.cuda.is_available() and dist.is_nccl_available() and not torch.cuda._is_in_bad_fork()


def _environment() -> str | None:
    return os.environ.get("DEEPEP_DEVICE") or None
