"""Receive slots: tensors of the symmetric heap that live, and are freed, as any torch tensor is.

The slots' part of the heap is a private memory pool of torch's caching allocator. So what a dispatch receives
into are plain tensors: whoever holds one (or a view of it) keeps it, `record_stream` defers its reuse until
that stream has caught up, and what was freed in stream order is lent again in stream order. They belong to
the stream that was current when they were taken: the one their dispatch runs on.

Memory goes from stream to stream through the arena alone, when torch gives back a whole segment: what was
freed there was freed in stream order, so readers may still be queued on its stream. Invariant: a segment that
came back is lent again only after every stream that slots were taken on, but the one of the call that looks,
was seen idle later than that. The call's own stream is behind its own readers, and it launches a kernel of
this rank behind them; all later ones, on whatever stream, run behind that one (Turns, bindings_cuda.cpp).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from deepep import _cuda
from deepep.runtime import streams

#: torch takes large blocks in multiples of this, and slots are large
SEGMENT = 2 << 20
_ARENA_UNIT = 512

#: heaps whose buffer is gone while tensors in them are still held
_outlived: list[object] = []


class Backoff:
    """Of calls that found no room, which ones may try something expensive: the 1st, 2nd, 4th, 8th ... and at
    the latest every 64th.
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
        """What was due has been done, and has not helped yet."""
        self._next = self._calls + min(self._calls, 64)


class SlotPool:
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
        #: the streams that slots are taken on, or read on without torch being told
        self.users = streams.Users(self._index)
        self._backoff = Backoff()
        self._was_full = False
        self._aside = 0
        self._settled = 0  # of what has come back to the arena
        self._pool: torch.cuda.MemPool | None = None
        self._begin_anew()

    def take(self, arrays: Sequence[torch.Tensor], stream: int) -> list[torch.Tensor] | None:
        """Tensors like these for the current stream, `stream`, each in memory of its own; None if the heap
        has no room for them. Waits for nothing.
        """
        if stream not in self.users.known:
            self.users.add_current()
        if not self._was_full:  # a try in vain is dear: torch tells at length what it lacks
            made = self._try(arrays)
            if made is not None:
                return made
        made = self._look_for_room(arrays, stream)
        self._was_full = made is None
        return made

    def take_at_once(self, arrays: Sequence[torch.Tensor], stream: int) -> list[torch.Tensor] | None:
        """The same if the pool has them at hand; None: look further with `take`."""
        return None if self._was_full or stream not in self.users.known else self._try(arrays)

    def _look_for_room(self, arrays: Sequence[torch.Tensor], stream: int) -> list[torch.Tensor] | None:
        self._let_torch_look()
        made = self._try(arrays)
        if made is None and self._settle(stream):
            made = self._try(arrays)
        # A pool keeps what was freed in pieces, and by stream.
        if made is None and self._backoff.is_due() and self.users.are_idle(but=stream):
            self._backoff.tried()
            idle, held, may_go = self._survey()
            in_arena = self.num_bytes - self._aside - _cuda.arena_used(self._arena)
            wanted = sum(array.numel() * array.element_size() for array in arrays)
            # Slots held now come back from a pool that is no more only when torch empties all its caches.
            if may_go and held <= idle and idle + in_arena >= wanted:
                self._begin_anew()
                if self._settle(stream):
                    made = self._try(arrays)
            if made is not None:
                self._backoff.reset()
        return made

    def regain(self, stream: int) -> None:
        """Gives back to the arena what can be given back without waiting."""
        self._let_torch_look()
        if self.users.are_idle(but=stream):
            idle, _, may_go = self._survey()
            if idle > 0 and may_go:
                self._begin_anew()
        self._settle(stream)

    def regain_by_waiting(self) -> None:
        """Gives back to the arena all that nobody holds. Waits for all work on the device."""
        self._begin_anew()
        torch.cuda.empty_cache()  # also what tensors of earlier pools left when they were freed
        came_back = _cuda.arena_came_back(self._arena)
        torch.cuda.synchronize(self._device)
        self._settle_first(came_back)

    def _let_torch_look(self) -> None:
        """Only outside of private pools does torch look which freed blocks streams are done with."""
        with contextlib.suppress(torch.OutOfMemoryError):  # it has looked by then
            torch.empty(1, dtype=torch.uint8, device=self._device)

    def _survey(self) -> tuple[int, int, bool]:
        """Bytes of the pool's segments in which no slot is held, and of the others; and whether the pool can
        go without waiting.

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

    def _settle(self, stream: int) -> bool:
        """Makes free what has come back to the arena, if `stream` may have it; whether there was any."""
        came_back = _cuda.arena_came_back(self._arena)
        if came_back == self._settled or not self.users.are_idle(but=stream):
            return False
        self._settle_first(came_back)
        return True

    def _settle_first(self, came_back: int) -> None:
        _cuda.arena_settle(self._arena, came_back)
        self._settled = came_back

    def _begin_anew(self) -> None:
        self._pool = None
        self._pool = torch.cuda.MemPool(self._allocator.allocator())
        self._pool_id = self._pool.id

    def _try(self, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        _cuda.arena_select(self._arena)
        # torch.cuda.use_mem_pool, without the price of a generator
        torch._C._cuda_beginAllocateCurrentThreadToPool(self._index, self._pool_id)
        try:
            return [torch.empty_like(array) for array in arrays]
        except torch.OutOfMemoryError:
            return None
        finally:
            torch._C._cuda_endAllocateToPool(self._index, self._pool_id)
            torch._C._cuda_releasePool(self._index, self._pool_id)
            _cuda.arena_select(0)

    def reserve(self, num_bytes: int) -> torch.Tensor | None:
        """A stretch of the heap that is never given back: a captured graph will write it again and again."""
        return self._view(_cuda.arena_reserve(self._arena, num_bytes), num_bytes)

    def set_aside(self, num_bytes: int) -> torch.Tensor | None:
        """The last bytes of the heap, never to be taken again, or a longer stretch than before of them; None
        if slots lie there.
        """
        stretch = self._view(_cuda.arena_set_aside(self._arena, num_bytes), num_bytes)
        if stretch is not None:
            self._aside = num_bytes
        return stretch

    def _view(self, address: int, num_bytes: int) -> torch.Tensor | None:
        if address == 0:
            return None
        begin = address - self._heap.data_ptr()
        return self._heap[begin : begin + num_bytes]

    def close(self) -> None:
        """Lends no more slots. Those that are still held stay valid, and then so does the heap, for good.
        Idempotent.
        """
        if self._pool is None:
            return
        self._pool = None  # torch gives back what nobody holds
        if _cuda.arena_used(self._arena) == 0 and self.users.hold(self._heap):
            _cuda.arena_close(self._arena)
        else:
            _outlived.append((self._heap, self._allocator))

    def outlive(self) -> None:
        """Lends no more slots and keeps the heap for good: a peer that was given up may still write."""
        self._pool = None
        _outlived.append((self._heap, self._allocator))
