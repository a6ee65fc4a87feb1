"""Devices: what several `device_ids` mean where each rank is a process."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepep.errors import ArgumentError, RangeError


def has_ranks() -> bool:
    """True if this process is one of several ranks, or is to be."""
    is_initialised = dist.is_available() and dist.is_initialized()
    return is_initialised or "LOCAL_RANK" in os.environ


def device_of_this_rank(module: nn.Module, device_ids: list[Any]) -> Any:
    """The id for this rank of those of its node; the module is moved there, its parameters kept."""
    if not torch.cuda.is_available():
        raise ArgumentError("device_ids", str(device_ids), "None: torch sees no CUDA device here")
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0))
    if local >= len(device_ids):
        raise RangeError("device_ids", str(device_ids), f"an id for each local rank: this is {local}")
    chosen = device_ids[local]
    index = torch.device(chosen).index if isinstance(chosen, str | torch.device) else int(chosen)
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    module.to(device)
    return device.index
