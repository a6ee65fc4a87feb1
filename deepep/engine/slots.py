"""Receive slots: tensors of the symmetric heap that live, and are freed, as any torch tensor is.

The slots' part of the heap is a private memory pool of torch's caching allocator. So what a dispatch receives
into are plain tensors: whoever holds one (or a view of it) keeps it, `record_stream` defers its reuse until
that stream has caught up, and what was freed in stream order is lent again in stream order. They belong to
the stream that was current when they were taken: the one their dispatch runs on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepep import _cuda

Array = tuple[tuple[int, ...], torch.dtype]

#: torch takes large blocks in multiples of this, and slots are large
SEGMENT = 2 << 20

#: heaps whose buffer is gone while tensors in them are still held
_outlived: list[object] = []


class SlotPool:
    """Tensors out of heap[begin:]; begin > 0, for torch knows memory by its address, and the heap has one."""

    def __init__(self, heap: torch.Tensor, begin: int) -> None:
        self._heap = heap  # kept: the pool's segments lie in it
        self._device = heap.device
        self._index = heap.get_device()
        base = heap.data_ptr() + begin
        aligned = -(-base // SEGMENT) * SEGMENT
        self.num_bytes = heap.data_ptr() + heap.numel() - aligned
        self._arena = _cuda.arena_open(aligned, self.num_bytes)
        self._allocator = torch.cuda.memory.CUDAPluggableAllocator(
            _cuda.__file__, "deepep_arena_take", "deepep_arena_give_back"
        )
        self._pool: torch.cuda.MemPool | None = None
        self._begin_anew()

    def take(self, arrays: Sequence[Array]) -> list[torch.Tensor] | None:
        """Tensors for the current stream, each in memory of its own; None if the heap has no room for them.
        May wait for the device where memory is short.
        """
        made = self._try(arrays)
        if made is not None:
            return made
        # Only outside of private pools does torch look which freed blocks streams are done with: let it look.
        torch.empty(1, dtype=torch.uint8, device=self._device)
        made = self._try(arrays)
        if made is not None:
            return made
        # A pool keeps what was freed in pieces, and by stream: give all of it back and begin anew. Whatever
        # still reads those pieces has to be done first, for nothing orders it before their next writer.
        torch.cuda.synchronize(self._device)
        self._begin_anew()
        made = self._try(arrays)
        if made is not None:
            return made
        torch.cuda.empty_cache()  # also what tensors of earlier pools left when they were freed
        return self._try(arrays)

    def _begin_anew(self) -> None:
        self._pool = None
        self._pool = torch.cuda.MemPool(self._allocator.allocator())
        self._pool_id = self._pool.id

    def _try(self, arrays: Sequence[Array]) -> list[torch.Tensor] | None:
        _cuda.arena_select(self._arena)
        # torch.cuda.use_mem_pool, without the price of a generator
        torch._C._cuda_beginAllocateCurrentThreadToPool(self._index, self._pool_id)
        try:
            return [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in arrays]
        except torch.OutOfMemoryError:
            return None
        finally:
            torch._C._cuda_endAllocateToPool(self._index, self._pool_id)
            torch._C._cuda_releasePool(self._index, self._pool_id)
            _cuda.arena_select(0)

    def reserve(self, num_bytes: int) -> torch.Tensor | None:
        """A stretch of the heap that is never given back: a captured graph will write it again and again."""
        offset = _cuda.arena_reserve(self._arena, num_bytes)
        if offset == 0:
            return None
        begin = offset - self._heap.data_ptr()
        return self._heap[begin : begin + num_bytes]

    def close(self) -> None:
        """Lends no more slots. Those that are still held stay valid, and then so does the heap, for good.
        Idempotent.
        """
        if self._pool is None:
            return
        self._pool = None  # torch gives back what nobody holds
        if _cuda.arena_used(self._arena) == 0:
            _cuda.arena_close(self._arena)
        else:
            _outlived.append((self._heap, self._allocator))

    def outlive(self) -> None:
        """Lends no more slots and keeps the heap for good: a peer that was given up may still write."""
        self._pool = None
        _outlived.append((self._heap, self._allocator))
