"""Kept outputs never block the next call, between two processes: a call that finds no room in the pool
receives in the overflow area and hands out copies. Whether the area was written too early is seen in their
bits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.device_calls import dispatch, draw, draw_on_device, expected, on_device, same_bits

from deepep.sim import World

pytestmark = pytest.mark.gpu

#: Symmetric memory of a rank: some 384 MiB of receive pool. A dispatch of T = 1024 takes some 30 MB.
SYMMETRIC_BYTES = 512 << 20
TOKENS = 1024
WORST = 3 * TOKENS
#: Cycles of a sleep on the device: about 0.1 s.
LONG = 180_000_000


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=120) as world:
        yield world


def new_buffer(ctx: Any) -> Any:
    import deepep

    os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(SYMMETRIC_BYTES)
    buffer = deepep.Buffer(ctx.group, timeout=20.0)
    assert buffer.runtime.info.backend == "cuda"
    return buffer


def buffer_of(ctx: Any) -> Any:
    if "buffer" not in ctx.scratch:
        ctx.scratch["buffer"] = new_buffer(ctx)
    return ctx.scratch["buffer"]


@contextlib.contextmanager
def fresh_buffer(ctx: Any) -> Iterator[Any]:
    """A buffer of which nothing was asked yet."""
    buffer = new_buffer(ctx)
    yield buffer
    torch.cuda.synchronize()
    buffer.destroy()


def in_heap(buffer: Any, rows: torch.Tensor) -> bool:
    heap = buffer.runtime.endpoint().heap
    return bool(heap.data_ptr() <= rows.data_ptr() < heap.data_ptr() + heap.numel())


def rows_for(ctx: Any, seed: int, tokens: int) -> torch.Tensor:
    """Rows of `draw_on_device`'s arguments that arrive here, from what dispatch promises."""
    parts = []
    for source in range(2):
        given = draw_on_device(seed, source, tokens, ctx.device)
        comes_here = (given.idx // (given.num_experts // 2) == ctx.rank).any(1)
        parts.append(given.x[comes_here])
    return torch.cat(parts)


def right(buffer: Any, rank: int, tokens: int, seed: int = 77) -> None:
    """A dispatch, a cached one and a combine against the oracle."""
    givens = [draw(seed, rank, tokens) for rank in range(2)]
    rows, sums = expected(givens)[rank]
    given = on_device(givens[rank], torch.device("cuda", torch.cuda.current_device()))
    got, _, _, _, handle, _ = dispatch(buffer, given)
    assert same_bits(got, rows)
    again, *_ = buffer.dispatch(given.x, handle=handle)
    assert same_bits(again, rows)
    total, *_ = buffer.combine(got * 2, handle)
    assert same_bits(total, sums)


def fill_up(buffer: Any, given: Any) -> list[torch.Tensor]:
    """Keeps outputs until the pool has no room for another dispatch of `given`, fresh or cached, nor for one
    of WORST rows. As many calls on every rank, whatever they find.
    """
    dispatch(buffer, given, num_worst_tokens=WORST)  # so the overflow area is long enough for that as well
    rows, *_, handle, _ = dispatch(buffer, given)
    kept = [rows]
    for _ in range(13):
        kept.append(dispatch(buffer, given)[0])
    for _ in range(3):
        kept.append(buffer.dispatch(given.x, handle=handle)[0])
    assert in_heap(buffer, kept[0])
    assert not in_heap(buffer, kept[-1])
    return kept


@pytest.mark.parametrize("keepers", [(0, 1), (0,)], ids=["both keep", "one keeps"])
def test_nothing_is_refused(pair: World, keepers: tuple[int, ...]) -> None:
    """200 dispatches of many sizes, everything kept: all go through, and all stay what they were."""

    def keep(ctx: Any, keepers: tuple[int, ...]) -> None:
        buffer = buffer_of(ctx)
        sizes = (700, 30, 1500, 1, 256, 999)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        overflowed = 0
        for turn in range(200):
            tokens = sizes[turn % 6]
            given = draw_on_device(turn, ctx.rank, tokens, ctx.device)
            rows, _, _, _, handle, _ = dispatch(buffer, given)
            overflowed += not in_heap(buffer, rows)
            if turn % 10 == 0:
                sums, *_ = buffer.combine(rows, handle)
                assert sums.shape == given.x.shape
            if ctx.rank in keepers:
                kept.append((rows, rows.clone()))
            else:
                assert same_bits(rows, rows_for(ctx, turn, tokens)), turn
            del rows, handle
        torch.cuda.synchronize()
        for turn, (now, then) in enumerate(kept):
            assert same_bits(now, then), turn
            assert same_bits(now, rows_for(ctx, turn, sizes[turn % 6])), turn
        if kept:
            assert 0 < overflowed < 200
        # With everything still held; then with all but one; then with nothing.
        right(buffer, ctx.rank, 1500)
        del kept[1:]
        right(buffer, ctx.rank, 60)
        for now, then in kept:
            assert same_bits(now, then)
        kept.clear()
        torch.cuda.synchronize()
        right(buffer, ctx.rank, 1500)
        right(buffer, ctx.rank, 60)
        # The pool has room again: at the latest when a pool in pieces may be reset.
        given = draw_on_device(0, ctx.rank, 60, ctx.device)
        acquired = [in_heap(buffer, dispatch(buffer, given)[0]) for _ in range(65)]
        assert any(acquired)

    for _ in range(2):
        pair.run(keep, keepers)


def test_all_results_of_an_overflowed_call(pair: World) -> None:
    """Rows, indices, weights, scales, counts, and what the handle holds: as with room in the pool."""

    def compare(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        given = draw_on_device(5, ctx.rank, TOKENS, ctx.device)
        scales = torch.rand((TOKENS, 56), device=ctx.device)

        def everything() -> tuple[list[torch.Tensor], list[int], Any]:
            rows, idx, weights, counts, handle, _ = dispatch(buffer, given)
            again, *_ = buffer.dispatch(given.x, handle=handle)
            bytes_and_scales, *_ = buffer.dispatch((given.x.to(torch.float8_e4m3fn), scales), handle=handle)
            sums, returned, _ = buffer.combine(rows, handle, topk_weights=weights)
            got = [rows, idx, weights, again, *bytes_and_scales, sums, returned, handle[3], handle[0]]
            return got, counts, handle

        want, want_counts, _ = everything()
        want = [t.clone() for t in want]
        kept = fill_up(buffer, given)
        got, counts, handle = everything()
        assert not in_heap(buffer, got[0])
        assert not in_heap(buffer, got[3])
        assert not in_heap(buffer, handle[3])
        for _ in range(3):  # whatever of the handle lay in the overflow area would be written over
            right(buffer, ctx.rank, 1000)
        assert counts == want_counts
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            assert same_bits(a, b), number
        sums, *_ = buffer.combine(got[0], handle)
        assert same_bits(sums, got[6])
        del kept

    pair.run(compare)


@pytest.mark.parametrize("ours", [False, True], ids=["caller's outputs", "communication stream's outputs"])
def test_asynchronous_calls_overflow(pair: World, ours: bool) -> None:
    """Behind a previous event, on the communication stream; the event given back is behind the copies."""

    def asynchronous(ctx: Any, ours: bool) -> None:
        import deepep

        buffer = buffer_of(ctx)
        given = draw_on_device(1, ctx.rank, TOKENS, ctx.device)
        layout = buffer.get_dispatch_layout(given.idx, given.num_experts)
        want = dispatch(buffer, given)[0].clone()
        kept = fill_up(buffer, given)
        held = kept[0].clone()
        outputs = []
        for turn in range(12):
            how = {"async_finish": True, "allocate_on_comm_stream": ours}
            how["previous_event"] = deepep.Buffer.capture() if ours or turn % 3 else None
            rows, *_, handle, event = dispatch(buffer, given, layout, **how)
            again, *_, last = buffer.dispatch(given.x * 3, handle=handle, **how)
            event.current_stream_wait()
            seen = rows.clone()
            last.current_stream_wait()
            outputs.append((rows, seen, again))
            assert not in_heap(buffer, rows)
            assert not in_heap(buffer, again)
            if ours:
                rows.record_stream(torch.cuda.current_stream())
                again.record_stream(torch.cuda.current_stream())
        for rows, seen, again in outputs:
            assert same_bits(rows, want)
            assert same_bits(seen, want)
            assert same_bits(again, want * 3)
        assert same_bits(kept[0], held)

    pair.run(asynchronous, ours)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_worst_case_overflows(pair: World, asynchronous: bool) -> None:
    """All of num_worst_tokens rows are handed out, and the host still does not wait."""

    def worst(ctx: Any, worst: int, asynchronous: bool) -> None:
        buffer = buffer_of(ctx)
        given = draw_on_device(2, ctx.rank, TOKENS, ctx.device)
        want, idx, *_ = dispatch(buffer, given)
        want, idx = want.clone(), idx.clone()
        kept = fill_up(buffer, given)
        outputs = []
        for _ in range(4):
            rows, local, _, counts, handle, event = dispatch(
                buffer, given, num_worst_tokens=worst, async_finish=asynchronous
            )
            if asynchronous:
                event.current_stream_wait()
            assert rows.shape[0] == worst
            assert counts == []
            assert not in_heap(buffer, rows)
            again, *_ = buffer.dispatch(given.x, handle=handle)
            sums, *_ = buffer.combine(rows * 2, handle)
            outputs.append((rows, local, again, sums))
        for rows, local, again, sums in outputs:
            assert same_bits(rows[: len(want)], want)
            assert same_bits(again[: len(want)], want)
            assert torch.equal(local[: len(want)], idx)
            assert bool((local[len(want) :] == -1).all())
            assert same_bits(sums, outputs[0][3])
        del kept

    pair.run(worst, WORST, asynchronous)


@pytest.mark.parametrize("told_by", ["record_stream", "wait_stream"])
def test_an_overflowed_output_is_read_late(pair: World, told_by: str) -> None:
    """On a third stream, after it was freed, while later calls overflow again."""

    def late(ctx: Any, told_by: str) -> None:
        buffer = buffer_of(ctx)
        given = draw_on_device(3, ctx.rank, TOKENS, ctx.device)
        kept = fill_up(buffer, given)
        side = torch.cuda.Stream()
        for seed in range(3):
            rows = dispatch(buffer, draw_on_device(seed, ctx.rank, TOKENS, ctx.device))[0]
            assert not in_heap(buffer, rows)
            want = rows.clone()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(LONG)
                seen = rows.clone()
            if told_by == "record_stream":
                rows.record_stream(side)
            else:
                torch.cuda.current_stream().wait_stream(side)
            del rows
            for other in range(4):
                overflowed = dispatch(buffer, draw_on_device(50 + other, ctx.rank, TOKENS, ctx.device))[0]
                assert not in_heap(buffer, overflowed)
            side.synchronize()
            assert same_bits(seen, want)
        del kept

    pair.run(late, told_by)


def test_two_streams_overflow_in_turn(pair: World) -> None:
    """One call's peers do not write before the copies of the one before, on the other stream, are done. The
    host waits for nothing, so a kernel starts as soon as the kernel before has ended.
    """

    def in_turn(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        given = draw_on_device(4, ctx.rank, TOKENS, ctx.device)
        want, *_, handle, _ = dispatch(buffer, given)
        want = want.clone()
        kept = fill_up(buffer, given)
        inputs = [given.x * (turn + 1) for turn in range(40)]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        outputs = []
        for turn, x in enumerate(inputs):
            with torch.cuda.stream(streams[turn % 2]):
                if turn % 8 == 0:
                    torch.cuda._sleep(LONG // 10)  # the calls queue up
                outputs.append(buffer.dispatch(x, handle=handle, async_finish=turn % 5 == 4)[0])
        torch.cuda.synchronize()
        for turn, rows in enumerate(outputs):
            assert not in_heap(buffer, rows)
            assert same_bits(rows, want * (turn + 1)), turn
        del kept

    pair.run(in_turn)


def test_a_pool_in_pieces_is_reset_without_waiting(pair: World) -> None:
    """Memory freed on another stream is reused once that stream is idle, and not before; nobody waits."""

    def anew(ctx: Any) -> None:
        with fresh_buffer(ctx) as buffer:
            given = draw_on_device(6, ctx.rank, TOKENS, ctx.device)
            spare = torch.empty(256 << 20, dtype=torch.uint8, device=ctx.device)
            del spare  # so that copies need no cudaMalloc, which might wait
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # no memory was ever acquired on another stream
                kept = fill_up(buffer, given)
                want = kept[0].clone()
                torch.cuda._sleep(10 * LONG)
                last = kept[0].clone()
                kept.clear()
            overflowed = [dispatch(buffer, given)[0] for _ in range(4)]
            assert not side.query(), "the host has waited for the other stream"
            side.synchronize()
            assert not any(in_heap(buffer, rows) for rows in overflowed)
            assert all(same_bits(rows, want) for rows in [*overflowed, last])
            # Which call may try depends on how many have overflowed before. As many calls on every rank.
            rows = [dispatch(buffer, given)[0] for _ in range(8)]
            assert any(in_heap(buffer, part) for part in rows)
            assert all(same_bits(part, want) for part in rows)
            del rows, overflowed, last

    for _ in range(2):
        pair.run(anew)


def test_what_an_earlier_pool_left_comes_back(pair: World) -> None:
    """Tensors held while the pool was reset come back when torch empties its caches."""

    def left(ctx: Any) -> None:
        with fresh_buffer(ctx) as buffer:
            given = draw_on_device(7, ctx.rank, TOKENS, ctx.device)
            want = dispatch(buffer, given)[0].clone()
            kept = fill_up(buffer, given)
            torch.cuda.synchronize()
            buffer.runtime.symmetric.pool.reclaim_by_waiting()
            for rows in kept:
                assert same_bits(rows, want)
            assert not in_heap(buffer, dispatch(buffer, given)[0])
            torch.cuda._sleep(LONG)
            last = kept[0].clone()  # still to be read when its memory goes back
            kept.clear()
            torch.cuda.empty_cache()
            again = [dispatch(buffer, given)[0] for _ in range(5)]
            assert all(in_heap(buffer, rows) for rows in again)
            assert all(same_bits(rows, want) for rows in [*again, last])
            del rows, again, last

    pair.run(left)


@pytest.mark.parametrize("worst", [0, 40_000], ids=["rows", "num_worst_tokens"])
def test_a_request_larger_than_the_heap_is_refused(pair: World, worst: int) -> None:
    """On both ranks, with what the heap is short of; and the buffer works on."""

    def too_large(ctx: Any, worst: int) -> tuple[str, str]:
        from deepep.errors import CapacityError, MismatchError

        buffer = buffer_of(ctx)
        given = draw_on_device(8, ctx.rank, TOKENS if worst else 16_384, ctx.device)
        told = ("", "")
        try:
            dispatch(buffer, given, num_worst_tokens=worst)
        except (CapacityError, MismatchError) as error:
            told = type(error).__name__, str(error)
        del given
        right(buffer, ctx.rank, 60)
        right(buffer, ctx.rank, 1500)
        return told

    for _ in range(2):
        for name, text in pair.run(too_large, worst):
            assert name == "CapacityError", (name, text)
            assert f"raise DEEPEP_SYMMETRIC_BYTES ({SYMMETRIC_BYTES}) by" in text
            assert "free outputs" not in text


def test_a_request_larger_than_any_before_needs_free_memory(pair: World) -> None:
    """The one thing that kept outputs can do: they lie where the overflow area would have to grow."""

    def grow(ctx: Any) -> list[str]:
        from deepep.errors import CapacityError

        with fresh_buffer(ctx) as buffer:
            small = draw_on_device(9, ctx.rank, 256, ctx.device)
            want = dispatch(buffer, small)[0].clone()
            kept = [dispatch(buffer, small)[0] for _ in range(90)]
            assert in_heap(buffer, kept[0])
            assert not in_heap(buffer, kept[-1])
            for seed in range(3):  # that a guess asks for more than ever came is no reason
                right(buffer, ctx.rank, 300, seed)
            told = []
            for _ in range(2):
                try:
                    right(buffer, ctx.rank, 1500)
                except CapacityError as error:
                    told.append(str(error))
            assert not in_heap(buffer, dispatch(buffer, small)[0])
            for rows in kept:
                assert same_bits(rows, want)
            del rows
            kept.clear()
            right(buffer, ctx.rank, 1500)
            fill_up(buffer, draw_on_device(10, ctx.rank, TOKENS, ctx.device))
            right(buffer, ctx.rank, 1500)
            return told

    for told in pair.run(grow):
        assert len(told) == 2, told
        assert all("DEEPEP_SYMMETRIC_BYTES" in text and "free outputs" in text for text in told)
