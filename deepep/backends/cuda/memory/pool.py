"""The receive pool: tensors of the symmetric heap that live, and are freed, as any torch tensor is.

The pool's part of the heap is a private memory pool of torch's caching allocator. So what a dispatch receives
into are plain tensors: whoever holds one (or a view of it) keeps it, `record_stream` defers its reuse until
that stream has caught up, and what was freed in stream order is reused in stream order. They belong to the
stream that was current when they were acquired: the one their dispatch runs on.

Memory goes from stream to stream through the arena alone, when torch gives back a whole segment: what was
freed there was freed in stream order, so readers may still be queued on its stream. Invariant: a segment that
came back is reused only after every stream that acquired memory, but the one of the call that looks, was seen
idle later than that. The call's own stream is behind its own readers, and it launches a kernel of this rank
behind them; all later ones, on whatever stream, run behind that one (csrc/host/turns.hpp).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepep import _cuda
from deepep.backends.cuda.memory.arrays import Templates
from deepep.runtime import streams

#: torch takes large blocks in multiples of this, and what dispatches receive is large
SEGMENT = 2 << 20
_ARENA_UNIT = 512
_NO_STREAM = -1


class Backoff:
    """Of calls that found no room, which ones may try something expensive: the 1st, 2nd, 4th,
    8th ... and at the latest every 64th.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """It helped."""
        self._calls, self._next = 0, 1

    def is_due(self) -> bool:
        """Counts a call."""
        self._calls += 1
        return self._calls >= self._next

    def tried(self) -> None:
        """Notes that what was due has been done, and has not helped yet."""
        self._next = self._calls + min(self._calls, 64)


class ReceivePool:
    """Tensors out of heap[begin:]; begin > 0, for torch knows memory by its address, and the heap has one."""

    def __init__(self, heap: torch.Tensor, begin: int) -> None:
        self._heap = heap  # kept: the pool's segments lie in it
        self._device = heap.device
        self._index = heap.get_device()
        base = heap.data_ptr() + begin
        aligned = -(-base // SEGMENT) * SEGMENT
        self.num_bytes = (heap.data_ptr() + heap.numel() - aligned) // _ARENA_UNIT * _ARENA_UNIT
        self._arena = _cuda.arena_open(aligned, self.num_bytes)
        self._allocator = torch.cuda.memory.CUDAPluggableAllocator(
            _cuda.__file__, "deepep_arena_take", "deepep_arena_give_back"
        )
        #: the streams that memory is acquired on, or read on without torch knowing
        self.users = streams.Users(self._index)
        self._backoff = Backoff()
        self._was_full = False
        self._tail = 0
        self._num_freed = 0  # of what has come back to the arena
        self._pool: torch.cuda.MemPool | None = None
        self._reset()

    def acquire(self, arrays: Sequence[torch.Tensor], stream: int) -> Sequence[torch.Tensor] | None:
        """Tensors like these for the current stream, `stream`, each in memory of its own; None if the heap
        has no room for them. Waits for nothing.
        """
        if stream not in self.users.known:
            self.users.add_current()
        if not self._was_full:  # a try in vain is expensive: torch reports at length what it lacks
            made = self._try(arrays)
            if made is not None:
                return made
        made = self._look_for_room(arrays, stream)
        self._was_full = made is None
        return made

    def acquire_now(self, arrays: Templates, stream: int) -> Sequence[torch.Tensor] | None:
        """The same if the pool has them at hand; None: look further with `acquire`."""
        if self._was_full or stream not in self.users.known:
            return None
        free = self.num_bytes - self._tail - _cuda.arena_used(self._arena)
        # All at once only where they as good as certainly have room: torch logs it if they have not.
        is_certain = free >= 2 * arrays.num_bytes + len(arrays) * SEGMENT
        return self._try(arrays, arrays.all_at_once.make if is_certain else None)

    def _look_for_room(self, arrays: Sequence[torch.Tensor], stream: int) -> Sequence[torch.Tensor] | None:
        self._poll_freed()
        made = self._try(arrays)
        if made is None and self._reclaim_returned(stream):
            made = self._try(arrays)
        # A pool keeps what was freed in pieces, and by stream.
        if made is None and self._backoff.is_due() and self.users.are_idle(but=stream):
            self._backoff.tried()
            idle, held, may_go = self._survey()
            in_arena = self.num_bytes - self._tail - _cuda.arena_used(self._arena)
            wanted = sum(array.numel() * array.element_size() for array in arrays)
            # Tensors held now come back from a pool that is no more only when torch empties all its caches.
            if may_go and held <= idle and idle + in_arena >= wanted:
                self._reset()
                if self._reclaim_returned(stream):
                    made = self._try(arrays)
            if made is not None:
                self._backoff.reset()
        return made

    def reclaim(self, stream: int) -> None:
        """Gives back to the arena what can be given back without waiting."""
        self._poll_freed()
        if self.users.are_idle(but=stream):
            idle, _, may_go = self._survey()
            if idle > 0 and may_go:
                self._reset()
        self._reclaim_returned(stream)

    def reclaim_by_waiting(self) -> None:
        """Gives back to the arena all that nobody holds. Waits for all work on the device."""
        self._reset()
        torch.cuda.empty_cache()  # also what tensors of earlier pools left when they were freed
        returned = _cuda.arena_returned(self._arena)
        torch.cuda.synchronize(self._device)
        self._free_returned(returned)

    def _poll_freed(self) -> None:
        """Has torch look which freed blocks streams are done with: only outside private pools it does."""
        with contextlib.suppress(torch.OutOfMemoryError):  # it has looked by then
            torch.empty(1, dtype=torch.uint8, device=self._device)

    def _survey(self) -> tuple[int, int, bool]:
        """Bytes of the pool's segments in which no tensor is held, and of the others; and whether the pool
        can go without waiting.

        The end of a pool waits for the events of its blocks, and of no others: those that were freed while
        another stream was recorded that has not caught up. All else that nobody holds is given back at once.
        Between this look and the end another thread may free such a block; then its stream is waited for.
        """
        assert self._pool is not None
        idle = held = 0
        may_go = True
        for segment in self._pool.snapshot():
            states = {block["state"] for block in segment["blocks"]}
            may_go = may_go and states <= {"active_allocated", "inactive"}
            if states == {"inactive"}:
                idle += segment["total_size"]
            else:
                held += segment["total_size"]
        return idle, held, may_go

    def _reclaim_returned(self, stream: int) -> bool:
        """Makes free what has come back to the arena, if `stream` may have it; whether there was any."""
        returned = _cuda.arena_returned(self._arena)
        if returned == self._num_freed or not self.users.are_idle(but=stream):
            return False
        self._free_returned(returned)
        return True

    def _free_returned(self, returned: int) -> None:
        _cuda.arena_free_returned(self._arena, returned)
        self._num_freed = returned

    def _reset(self) -> None:
        self._pool = None
        self._pool = torch.cuda.MemPool(self._allocator.allocator())
        self._pool_id = self._pool.id

    def _try(
        self, arrays: Sequence[torch.Tensor], all_at_once: Callable[[], tuple[Any, ...]] | None = None
    ) -> Sequence[torch.Tensor] | None:
        _cuda.arena_select(self._arena)
        # torch.cuda.use_mem_pool, without the price of a generator
        torch._C._cuda_beginAllocateCurrentThreadToPool(self._index, self._pool_id)
        try:
            return [torch.empty_like(array) for array in arrays] if all_at_once is None else all_at_once()
        except torch.OutOfMemoryError:
            return None
        finally:
            torch._C._cuda_endAllocateToPool(self._index, self._pool_id)
            torch._C._cuda_releasePool(self._index, self._pool_id)
            _cuda.arena_select(0)

    def reserve(self, num_bytes: int) -> torch.Tensor | None:
        """A stretch of the heap that is never given back: a captured graph will write it again and again."""
        return self._view(_cuda.arena_reserve(self._arena, num_bytes), num_bytes)

    def reserve_tail(self, num_bytes: int) -> torch.Tensor | None:
        """The last bytes of the heap, never to be taken again,
        or a longer stretch than before of them; None if tensors lie there.
        """
        stretch = self._view(_cuda.arena_reserve_tail(self._arena, num_bytes), num_bytes)
        if stretch is not None:
            self._tail = num_bytes
        return stretch

    def _view(self, address: int, num_bytes: int) -> torch.Tensor | None:
        if address == 0:
            return None
        begin = address - self._heap.data_ptr()
        return self._heap[begin : begin + num_bytes]

    # the end

    def is_held(self) -> bool:
        """True if a tensor of the pool is held. The pool is not used any more, and ends once none is."""
        if self._pool is not None:
            self._poll_freed()
            _, held, may_go = self._survey()
            if held or not may_go:
                return True
            self._pool = None  # torch gives back what nobody holds
        return _cuda.arena_used(self._arena) != 0

    def is_in_use(self) -> bool:
        """True if one is, or a stream that used the pool has not done all it holds. Waits for nothing."""
        return self.is_held() or not self.users.are_idle(but=_NO_STREAM)

    def mark_read(self) -> None:
        """Notes that the whole device was idle after nothing was held any more: nobody reads here."""
        self.users.known.clear()

    def close(self) -> None:
        """Lets go of the heap, which is not in use."""
        self._pool = None
        _cuda.arena_close(self._arena)
        self._heap = self._heap[:0].clone()
