"""Receive slots: tensors of the symmetric heap that live, and are freed, as any torch tensor is.

The slots' part of the heap is a private memory pool of torch's caching allocator. So a slot is a tensor:
whoever holds it (or a view of it) keeps it, `record_stream` defers its reuse until that stream has caught up,
and a slot that was freed in stream order is lent again in stream order. Slots belong to the communication
stream: what reads them on another stream is recorded when they are handed out.
"""

from __future__ import annotations

import torch

from deepep import _cuda

#: torch takes large blocks in multiples of this, and slots are large
SEGMENT = 2 << 20

#: heaps whose buffer is gone while tensors in them are still held
_outlived: list[object] = []


class SlotPool:
    """Tensors out of heap[begin:], for one communication stream."""

    def __init__(self, heap: torch.Tensor, begin: int, stream: torch.cuda.Stream) -> None:
        self._heap = heap  # kept: the pool's segments lie in it
        self._stream = stream
        base = heap.data_ptr() + begin
        aligned = -(-base // SEGMENT) * SEGMENT
        self.num_bytes = heap.data_ptr() + heap.numel() - aligned
        self._arena = _cuda.arena_open(aligned, self.num_bytes)
        self._allocator = torch.cuda.memory.CUDAPluggableAllocator(
            _cuda.__file__, "deepep_arena_take", "deepep_arena_give_back"
        )
        self._pool = torch.cuda.MemPool(self._allocator.allocator())

    def take(self, num_bytes: int) -> torch.Tensor | None:
        """A slot, uint8 [num_bytes] of the heap; None if the heap has no stretch free that long."""
        if num_bytes > self.num_bytes:
            return None
        # Only outside of private pools does torch look which freed blocks streams are done with: let it look.
        torch.empty(1, dtype=torch.uint8, device=self._heap.device)
        _cuda.arena_select(self._arena)
        try:
            with torch.cuda.use_mem_pool(self._pool), torch.cuda.stream(self._stream):
                return torch.empty(num_bytes, dtype=torch.uint8, device=self._heap.device)
        except torch.OutOfMemoryError:
            return None
        finally:
            _cuda.arena_select(0)

    def reserve(self, num_bytes: int) -> torch.Tensor | None:
        """A stretch of the heap that is never given back: a captured graph will write it again and again."""
        offset = _cuda.arena_reserve(self._arena, num_bytes)
        if offset == 0:
            return None
        begin = offset - self._heap.data_ptr()
        return self._heap[begin : begin + num_bytes]

    def close(self) -> None:
        """Lends no more slots. Those that are still held stay valid, and then so does the heap, for good."""
        del self._pool  # torch gives back what nobody holds
        if _cuda.arena_used(self._arena) == 0:
            _cuda.arena_close(self._arena)
        else:
            _outlived.append((self._heap, self._allocator))

    def outlive(self) -> None:
        """Lends no more slots and keeps the heap for good: a peer that was given up may still write."""
        del self._pool
        _outlived.append((self._heap, self._allocator))
