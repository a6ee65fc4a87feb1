"""Cached dispatches that are like one before: with no more on the way to the kernel than has to be there.

A cached dispatch is made again and again with rows of one kind, and little of it is new: three or four
addresses. So what it was like is kept along with its handle, and the next one is compared with that alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepep import _cuda
from deepep.backends.cuda.memory.heap import SymmetricMemory


@dataclass(frozen=True, slots=True)
class Repeat:
    """A cached dispatch that received in slots.

    x [T, H] of `dtype`; scales: (dtype, shape, strides) of theirs, or None. templates: of what it received,
    for as many rows as any rank received. call: what the kernel is told. memory: where it received.
    """

    device: int
    shape: torch.Size
    dtype: torch.dtype
    scales: tuple[torch.dtype, torch.Size, tuple[int, ...]] | None
    num_sms: int
    templates: list[torch.Tensor]
    call: _cuda.CachedDispatch
    memory: SymmetricMemory

    def addresses(self, x: object, scales: object, num_sms: int) -> tuple[int, int] | None:
        """Of x and of scales (0: none), if a call with these passes all checks and tells the kernel the same
        but for them.
        """
        if not (
            type(x) is torch.Tensor
            and x.dtype is self.dtype
            and x.shape == self.shape
            and x.get_device() == self.device
            and x.is_contiguous()
            and num_sms == self.num_sms
        ):
            return None
        address = x.data_ptr()
        if address % 16 != 0:
            return None
        if self.scales is None:
            return (address, 0) if scales is None else None
        if (
            type(scales) is torch.Tensor
            and scales.get_device() == self.device
            and (scales.dtype, scales.shape, scales.stride()) == self.scales
        ):
            return address, scales.data_ptr()
        return None
