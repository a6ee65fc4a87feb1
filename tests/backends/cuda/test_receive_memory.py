"""Choice of the place where a dispatch receives, as far as it can be asked without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

pytest.importorskip("deepep._cuda", reason="deepep._cuda is not built")


def test_backoff() -> None:
    """The 1st, 2nd, 4th, 8th ... and at the latest every 64th; from the beginning when it helped."""
    from deepep.backends.cuda.memory.pool import Backoff

    backoff = Backoff()

    def tried_at(calls: int) -> list[int]:
        tried = []
        for call in range(1, calls + 1):
            if backoff.is_due():
                backoff.tried()
                tried.append(call)
        return tried

    assert tried_at(300) == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]
    backoff.reset()
    assert tried_at(5) == [1, 2, 4]
    backoff.reset()
    assert all(backoff.is_due() for _ in range(10)), "stays due until it is tried"


@pytest.fixture(autouse=True)
def asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams here answer for themselves."""
    from deepep.runtime import streams

    monkeypatch.setattr(streams, "is_idle", lambda stream: stream.query())


class Stream:
    """As much of a stream as is asked for."""

    def __init__(self, address: int, idle: bool, ours: bool = True) -> None:
        self.cuda_stream = address
        self.stream_id = (3 if address else 0) if ours else address
        self._idle = idle

    def query(self) -> bool:
        return self._idle


@pytest.mark.parametrize(
    ("others", "idle"),
    [
        ([], True),
        ([Stream(0, True), Stream(48, True)], True),
        ([Stream(0, True), Stream(48, False)], False),
        ([Stream(0, False)], False),
        ([Stream(48, True, ours=False)], False),  # it may be gone: nobody asks it
    ],
)
def test_whether_other_streams_are_idle(
    monkeypatch: pytest.MonkeyPatch, others: list[Stream], idle: bool
) -> None:
    from deepep.runtime import streams

    users = streams.Users(0)
    for stream in [*others, Stream(16, False)]:  # the call's own, whose state does not count
        monkeypatch.setattr(streams, "current", lambda index, stream=stream: stream)
        users.add_current()
        assert stream.cuda_stream in users.known
    assert users.are_idle(but=16) is idle
    assert not users.are_idle(but=17)


class Arena:
    """A pool whose arena gives way after as many steps as is said."""

    num_bytes = 100 << 20

    def __init__(self, steps: int) -> None:
        self.steps, self.calls = steps, []

    def reserve_tail(self, num_bytes: int) -> object:
        self.calls.append(num_bytes >> 20)
        return object() if len(self.calls) > 2 * self.steps else None

    def reclaim(self, stream: int) -> None:
        self.calls.append("reclaim")

    def reclaim_by_waiting(self) -> None:
        self.calls.append("wait")


def test_the_overflow_area_waits_for_the_device_only_where_nothing_else_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepep.backends.cuda.memory.overflow import OverflowArea

    monkeypatch.setattr(torch.cuda, "Event", object)

    def grow(steps: int, num_bytes: int, needed: bool = True) -> tuple[bool, list[Any], int]:
        arena = Arena(steps)
        overflow = OverflowArea(arena)  # type: ignore[arg-type]
        grown = overflow.grow(num_bytes, 0, needed)
        return grown, arena.calls, overflow.num_bytes >> 20

    assert grow(0, 3 << 20) == (True, [4], 4)
    assert grow(1, 4 << 20) == (True, [4, "reclaim", 4], 4)
    assert grow(2, 99 << 20) == (True, [100, "reclaim", 100, "wait", 100], 100)
    assert grow(3, 99 << 20) == (False, [100, "reclaim", 100, "wait", 100], 0)
    assert grow(1, 4 << 20, needed=False) == (False, [4], 0)
    assert grow(0, (100 << 20) + 1) == (False, [], 0), "nothing helps: nothing is done"


@pytest.mark.parametrize("capacity", [64, 1, 1001])
@pytest.mark.parametrize("with_scales", [False, True])
@pytest.mark.parametrize("with_topk", [False, True])
@pytest.mark.parametrize("with_source", [False, True])
def test_carved_arrays_fit_and_are_copied(
    capacity: int, with_scales: bool, with_topk: bool, with_source: bool
) -> None:
    from deepep.backends.cuda.memory.arrays import receive_spec

    x = torch.empty((5, 48), dtype=torch.float8_e4m3fn if with_scales else torch.bfloat16)
    scales = torch.empty((5, 3)) if with_scales else None
    idx = torch.empty((5, 7), dtype=torch.int64) if with_topk else None
    spec = receive_spec(x, scales, idx, with_source, with_places=with_topk)
    for spare in (0, 1, 1000):
        rows = spec.rows_in(spec.num_bytes(capacity) + spare)
        assert rows >= capacity
        assert spec.num_bytes(rows) <= spec.num_bytes(capacity) + spare
    assert spec.rows_in(0) == 0
    stretch = torch.randint(0, 255, (spec.num_bytes(capacity),), dtype=torch.uint8)
    received = spec.carve(stretch, capacity)
    wanted = [
        ((capacity, 48), x.dtype),
        ((capacity,), torch.int32) if with_source else None,
        ((capacity, 3), torch.float32) if with_scales else None,
        ((capacity, 7), torch.int64) if with_topk else None,
        ((capacity, 7), torch.float32) if with_topk else None,
        ((capacity, 7), torch.int32) if with_topk else None,
    ]

    def shapes(received: Any) -> list[Any]:
        return [None if t is None else (tuple(t.shape), t.dtype) for t in received.tensors()]

    assert shapes(received) == wanted
    made = spec.of([torch.empty_like(t) for t in spec.templates(capacity, x.device)])
    assert shapes(made) == wanted
    assert all(t.is_contiguous() for t in made.tensors() if t is not None)
    made.cut(capacity // 2)
    assert shapes(made) == [None if w is None else ((capacity // 2, *w[0][1:]), w[1]) for w in wanted]
    arrays = [t for t in received.tensors() if t is not None]
    end = 0
    for t in arrays:
        begin = t.data_ptr() - stretch.data_ptr()
        assert begin >= end
        assert begin % 128 == 0
        end = begin + t.nbytes
    assert end <= stretch.numel()

    rows = capacity // 2
    copy = received.copy(rows)
    assert copy.overflow_stream is None
    for a, b in zip(received.tensors(), copy.tensors(), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert b.is_contiguous()
            assert torch.equal(a[:rows].view(torch.uint8), b.view(torch.uint8))
    stretch.zero_()
    assert copy.x.view(torch.uint8).any() or rows == 0


class Pool:
    """Segments of torch's, each some blocks' states; they go back to the arena when the pool is given up."""

    def __init__(self, *segments: str) -> None:
        self.segments = segments

    def snapshot(self) -> list[dict[str, Any]]:
        names = {"i": "inactive", "a": "active_allocated", "p": "active_pending_free"}
        return [{"total_size": 10 << 20, "blocks": [{"state": names[c]} for c in s]} for s in self.segments]


@pytest.mark.parametrize(
    ("segments", "others_idle", "wanted", "is_reset"),
    [
        (("i", "ii"), True, 20, True),
        (("i", "ii"), False, 20, False),  # its readers may be queued on the other stream
        (("i", "ii"), True, 21, False),  # would not do
        (("i", "ip"), True, 10, False),  # the end of the pool would wait for an event
        (("i", "ia"), True, 10, True),
        (("i", "ia", "a"), True, 10, False),  # more would be lost than won
        (("a",), True, 10, False),
    ],
)
def test_when_a_pool_is_reset(
    monkeypatch: pytest.MonkeyPatch,
    segments: tuple[str, ...],
    others_idle: bool,
    wanted: int,
    is_reset: bool,
) -> None:
    """Only when nothing is waited for, and where it helps; at the 1st, 2nd, 4th ... call that overflows."""
    from deepep import _cuda
    from deepep.backends.cuda.memory import pool as receive_pool
    from deepep.runtime import streams

    megabyte = 1 << 20
    size = 10 * len(segments)
    arena = _cuda.arena_open(1 << 44, size * megabyte)
    assert _cuda.arena_reserve(arena, size * megabyte) == 1 << 44  # the pool has all of it
    pool = receive_pool.ReceivePool.__new__(receive_pool.ReceivePool)
    pool.num_bytes, pool._arena, pool._tail, pool._num_freed = size * megabyte, arena, 0, 0
    pool._backoff, pool._was_full, pool._pool = receive_pool.Backoff(), False, Pool(*segments)  # type: ignore[assignment]
    pool.users = streams.Users(0)
    pool.users.known = {0: Stream(0, False), 48: Stream(48, others_idle)}  # type: ignore[dict-item]
    tries: list[int] = []
    renewed: list[int] = []
    reclaimed = False

    def try_to_take(arrays: Any) -> Any:
        tries.append(len(renewed))
        return ["made"] if reclaimed else None

    def reclaim_returned(stream: int) -> bool:
        nonlocal reclaimed
        reclaimed = bool(renewed)
        return reclaimed

    monkeypatch.setattr(pool, "_try", try_to_take)
    monkeypatch.setattr(pool, "_reclaim_returned", reclaim_returned)
    monkeypatch.setattr(pool, "_poll_freed", lambda: None)
    monkeypatch.setattr(pool, "_reset", lambda: renewed.append(1))
    arrays = [torch.empty((1, 1), dtype=torch.uint8).expand(wanted, megabyte)]
    assert pool.acquire(arrays, 0) == (["made"] if is_reset else None)
    assert tries == ([0, 0, 1] if is_reset else [0, 0])
    assert pool._was_full is not is_reset
    tries.clear()
    pool.acquire(arrays, 0)
    assert len(tries) == 1, "the first look is spared where the last was in vain"
    pool.reclaim(0)
    assert len(renewed) == is_reset + (others_idle and "i" in segments and "ip" not in segments)
    _cuda.arena_close(arena)


@pytest.mark.parametrize("free", [0, 20, 21])
def test_tensors_are_made_at_once_only_where_room_is_certain(
    monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """Twice their bytes, and a segment for each: torch logs what its C functions find no room for."""
    from deepep import _cuda
    from deepep.backends.cuda.memory import pool as receive_pool
    from deepep.backends.cuda.memory.arrays import Templates
    from deepep.runtime import streams

    megabyte = 1 << 20
    pool = receive_pool.ReceivePool.__new__(receive_pool.ReceivePool)
    pool.num_bytes, pool._tail, pool._was_full = (30 + free) * megabyte, 10 * megabyte, False
    pool._arena = _cuda.arena_open(1 << 44, 100 * megabyte)
    assert _cuda.arena_reserve(pool._arena, 20 * megabyte) == 1 << 44
    pool.users = streams.Users(0)
    pool.users.known = {0: Stream(0, True)}  # type: ignore[dict-item]
    ways: list[object] = []
    monkeypatch.setattr(pool, "_try", lambda arrays, all_at_once: ways.append(all_at_once))
    templates = Templates([torch.empty(4 * megabyte, dtype=torch.uint8)] * 2)
    assert templates.num_bytes == 8 * megabyte
    pool.acquire_now(templates, 0)
    assert ways == [templates.all_at_once.make if free >= 20 else None]
    assert pool.acquire_now(templates, 48) is None, "a stream that was not seen before"
    assert len(ways) == 1
    _cuda.arena_close(pool._arena)


def test_what_came_back_is_reclaimed_when_other_streams_are_idle() -> None:
    from deepep import _cuda
    from deepep.backends.cuda.memory import pool as receive_pool
    from deepep.runtime import streams

    functions = ctypes.CDLL(_cuda.__file__)
    functions.deepep_arena_give_back.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    ]
    arena = _cuda.arena_open(1 << 44, 1024)
    pool = receive_pool.ReceivePool.__new__(receive_pool.ReceivePool)
    pool._arena, pool._num_freed, pool.users = arena, 0, streams.Users(0)
    other = Stream(48, False)
    pool.users.known = {0: Stream(0, False), 48: other}  # type: ignore[dict-item]
    block = _cuda.arena_reserve(arena, 1024)
    assert not pool._reclaim_returned(0), "nothing has come back"
    functions.deepep_arena_give_back(block, 1024, 0, None)
    assert not pool._reclaim_returned(0)
    assert not pool._reclaim_returned(48)
    assert _cuda.arena_reserve(arena, 512) == 0
    other._idle = True
    assert pool._reclaim_returned(0)
    assert not pool._reclaim_returned(0)
    assert _cuda.arena_reserve(arena, 1024) == block
    _cuda.arena_close(arena)


def test_specs_are_told_apart() -> None:
    """Specs that differ in any way that an array shows are two objects; others are one."""
    from deepep.backends.cuda.memory.arrays import receive_spec

    x = torch.empty((5, 48), dtype=torch.bfloat16)
    bytes_ = torch.empty((5, 48), dtype=torch.uint8)
    scales, idx = torch.empty((5, 3)), torch.empty((5, 7), dtype=torch.int64)
    specs = [
        receive_spec(x, None, None, True),
        receive_spec(x, None, None, False),
        receive_spec(x[:, :32], None, None, True),
        receive_spec(x.half(), None, None, True),
        receive_spec(bytes_, scales, None, True),
        receive_spec(bytes_, scales[:, :2], None, True),
        receive_spec(bytes_, scales.int(), None, True),
        receive_spec(x, None, idx, True),
        receive_spec(x, None, idx.int(), True),
        receive_spec(x, None, idx[:, :3], True),
    ]
    assert len({id(kind) for kind in specs}) == len(specs)
    assert receive_spec(torch.empty((9, 48), dtype=torch.bfloat16), None, idx, True) is specs[7]
    # Of no columns, as of scales that are none.
    none = receive_spec(bytes_, scales[:, :0], None, False)
    assert [tuple(t.shape) for t in none.templates(64, x.device)] == [(64, 48), (64, 0)]
    # Whatever numbers of rows were seen, templates take no memory.
    templates = [t for rows in range(1, 300) for t in specs[7].templates(rows, x.device)]
    assert len({t.untyped_storage().data_ptr() for t in templates}) == len({t.dtype for t in templates})


def test_templates_are_of_their_device() -> None:
    from deepep.backends.cuda.memory.arrays import receive_spec

    spec = receive_spec(torch.empty((1, 16), dtype=torch.bfloat16), None, None, True)
    for device in (torch.device("cpu"), torch.device("meta"), torch.device("cpu")):
        assert all(t.device == device for t in spec.templates(64, device))


#: Bytes of a overflow area for 100 rows of `test_who_is_asked_for_memory`.
FULL = 9456


class Heap:
    """A pool that has room or not; an overflow area that can grow to `room`, to `free` without waiting."""

    def __init__(self, has_room: bool, num_bytes: int, free: int, room: int) -> None:
        self.has_room, self.num_bytes, self.free, self.room = has_room, num_bytes, free, room
        self.asked: list[Any] = []

    def acquire(self, arrays: Any = None, stream: int = 0) -> Any:
        """Of the pool with `arrays`, of the overflow area without."""
        if arrays is None:
            self.asked.append("overflows")
            return torch.empty(self.num_bytes, dtype=torch.uint8), "stream"
        self.asked.append("pool")
        return [torch.empty_like(a) for a in arrays] if self.has_room else None

    def grow(self, num_bytes: int, stream: int, needed: bool) -> bool:
        self.asked.append("waits" if needed else "grows")
        grown = num_bytes <= (self.room if needed else self.free)
        self.num_bytes = num_bytes if grown else self.num_bytes
        return grown


@pytest.mark.parametrize(
    ("heap", "is_guess", "rows", "asked"),
    [
        # It has the place already, or makes it, before it asks the pool.
        (Heap(True, FULL, 0, 0), False, 100, ["pool"]),
        (Heap(True, 0, FULL, FULL), False, 100, ["grows", "pool"]),
        (Heap(False, FULL, 0, 0), False, 100, ["pool", "overflows"]),
        # It cannot make it, and takes of the pool all the same.
        (Heap(True, 0, 0, 0), False, 100, ["grows", "pool"]),
        (Heap(True, 4000, 0, 0), True, 100, ["grows", "pool"]),
        # Neither: what is needed may wait for the device; of a guess, as much as there is, or a little.
        (Heap(False, 0, 0, FULL), False, 100, ["grows", "pool", "waits", "overflows"]),
        (Heap(False, 0, 0, 0), False, None, ["grows", "pool", "waits"]),
        (Heap(False, 7000, 0, FULL), True, 73, ["grows", "pool", "overflows"]),
        (Heap(False, 0, 0, FULL), True, 64, ["grows", "pool", "waits", "overflows"]),
        (Heap(False, 0, 0, 0), True, None, ["grows", "pool", "waits"]),
    ],
)
def test_who_is_asked_for_memory(heap: Heap, is_guess: bool, rows: int | None, asked: list[Any]) -> None:
    """100 rows of 88 bytes and 4 for their token, 128 more for each of the two arrays."""
    from deepep.backends.cuda.memory import heap as symmetric
    from deepep.backends.cuda.memory.arrays import receive_spec

    memory = symmetric.SymmetricMemory.__new__(symmetric.SymmetricMemory)
    memory.pool = memory.overflow = heap  # type: ignore[assignment]
    memory._device = torch.device("cpu")
    spec = receive_spec(torch.empty((1, 44), dtype=torch.bfloat16), None, None, True)
    assert spec.num_bytes(100) == FULL
    received = memory.acquire(spec, 100, is_guess, 0)
    assert heap.asked == asked
    if rows is None:
        assert received is None
    else:
        assert received is not None
        assert received.x.shape == (rows, 44)
        assert received.overflow_stream == ("stream" if "overflows" in asked else None)


def test_a_heap_with_readers_is_not_let_go() -> None:
    """Until its tensors are freed and its streams idle; those that cannot be asked, until the device was."""
    from deepep import _cuda
    from deepep.backends.cuda.memory import pool as receive_pool
    from deepep.runtime import streams

    arena = _cuda.arena_open(1 << 44, 1 << 20)
    pool = receive_pool.ReceivePool.__new__(receive_pool.ReceivePool)
    pool._arena, pool._pool, pool.users = arena, None, streams.Users(0)
    assert not pool.is_in_use()
    reader = Stream(0, False)
    pool.users.known = {0: reader}  # type: ignore[dict-item]
    assert pool.is_in_use()
    reader._idle = True
    assert not pool.is_in_use()
    reader._idle = False
    pool.mark_read()
    assert not pool.is_in_use(), "nothing is read any more"
    pool.users.known[64] = None
    assert pool.is_in_use()
    pool.mark_read()
    assert not pool.is_in_use()
    _cuda.arena_reserve(arena, 512)  # stands for a tensor that is held
    assert pool.is_held()
    assert pool.is_in_use()
    _cuda.arena_close(arena)
