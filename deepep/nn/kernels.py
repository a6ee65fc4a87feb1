"""Launches of the kernels around the local experts (csrc/kernels/rows), and what they take.

They serve contiguous CUDA tensors on a device that the kernels are built for; the operators that use them
have a body in plain torch for all others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from deepep.runtime import streams
from deepep.runtime.capabilities import can_run, compiled

#: Rows are moved 16 bytes at a time.
UNIT = 16


@cache
def _module() -> Any:
    """deepep._cuda, or None where it was not built."""
    try:
        from deepep import _cuda
    except ImportError:
        return None
    return _cuda


@cache
def _is_built_for(index: int) -> bool:
    return can_run(torch.cuda.get_device_capability(index), compiled())


def serve(*tensors: Tensor) -> bool:
    """True if kernels take all: of one CUDA device, contiguous, aligned, with their values in place."""
    first = tensors[0]
    return (
        first.is_cuda
        and _is_built_for(first.get_device())
        and all(
            t.is_contiguous()
            and not t.is_neg()
            and t.get_device() == first.get_device()
            and t.data_ptr() % UNIT == 0
            for t in tensors
        )
    )


def serve_rows(num_topk: int, *rows: Tensor) -> bool:
    """The same of rows [.., H] with K top-k entries each."""
    return (
        serve(*rows)
        and 1 <= num_topk <= _module().MAX_ROW_ENTRIES
        and all(t.shape[-1] > 0 and t.shape[-1] * t.element_size() % UNIT == 0 for t in rows)
    )


def count(topk_idx: Tensor, load: Tensor) -> bool:
    """Adds each expert's entries to `load` [E] int64; False if no kernel does that for these."""
    if not serve(topk_idx, load) or load.shape[0] > _module().MAX_COUNTED_EXPERTS:
        return False
    if topk_idx.numel():
        launch(
            "count_entries",
            load,
            topk_idx=topk_idx,
            index_bytes=topk_idx.element_size(),
            num_experts=load.shape[0],
            num_entries=topk_idx.numel(),
            load=load,
        )
    return True


def launch(kernel: str, on: Tensor, **arguments: int | Tensor | None) -> None:
    """Launches a kernel by its name in deepep._cuda on the current stream of `on`'s device.

    Tensors go as addresses, None as 0.
    """
    index = on.get_device()
    addresses = {
        name: given if isinstance(given, int) else 0 if given is None else given.data_ptr()
        for name, given in arguments.items()
    }
    function = getattr(_module(), kernel)
    if torch.cuda.current_device() == index:
        function(**addresses, stream=streams.current_address(index))
        return
    with torch.cuda.device(index):
        function(**addresses, stream=streams.current_address(index))
