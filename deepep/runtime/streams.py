"""CUDA streams at the price of a pointer.

`torch.cuda.current_stream()` and `with torch.cuda.stream(...)` take 7 and 13 us of host time (measured on the
GPU host, torch 2.11), a third of what a whole call may take. What they call themselves takes a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_stream_id = Any  # (stream id, device index, device type), as torch hands it out
_known: dict[_stream_id, torch.cuda.Stream] = {}


def _no_cuda(device: int) -> int:
    raise RuntimeError(f"this torch has no CUDA: device {device} has no streams")


#: The current stream of a device (its index), as CUDA names it: torch's own function, without another on top.
current_address: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_cuda)


def current(device: int) -> torch.cuda.Stream:
    """The current stream of a device."""
    names = torch._C._cuda_getCurrentStream(device)
    stream = _known.get(names)
    if stream is None:
        number, index, kind = names
        stream = torch.cuda.Stream(stream_id=number, device_index=index, device_type=kind)
        if len(_known) < 256:  # torch hands out a few dozen streams; others may be without end
            _known[names] = stream
    return stream


class switched:
    """Inside, `stream` is the current stream, and its device the current one."""

    __slots__ = ("_before", "_device", "_stream")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._device = torch._C._cuda_getDevice()
        self._before = torch._C._cuda_getCurrentStream(self._stream.device_index)
        _select(self._stream.stream_id, self._stream.device_index, self._stream.device_type)

    def __exit__(self, *error: object) -> None:
        _select(*self._before)
        if self._device != self._stream.device_index:
            torch._C._cuda_setDevice(self._device)


def _select(number: int, index: int, kind: int) -> None:
    torch._C._cuda_setStream(stream_id=number, device_index=index, device_type=kind)


def is_idle(stream: torch.cuda.Stream) -> bool:
    """True if it has done all it holds; not while it is being captured, which `Stream.query` would spoil."""
    from deepep import _cuda  # this module is imported without it, too

    return _cuda.stream_is_idle(stream.cuda_stream)


class Users:
    """The streams that use some memory, by address."""

    def __init__(self, device: int) -> None:
        self._device = device
        #: None for one that is not torch's own: it may be gone by now, and must not be asked
        self.known: dict[int, torch.cuda.Stream | None] = {}

    def add_current(self) -> None:
        """The current stream is one of them."""
        stream = current(self._device)
        is_torchs = stream.stream_id == 0 or stream.stream_id != stream.cuda_stream
        self.known[stream.cuda_stream] = stream if is_torchs else None

    def are_idle(self, but: int) -> bool:
        """True if all of them, but the one at this address, have done what they hold, and none is being
        captured. Waits for nothing.
        """
        others = (stream for address, stream in self.known.items() if address != but)
        return all(stream is not None and is_idle(stream) for stream in others)
