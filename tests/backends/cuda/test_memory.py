"""Memory the user owns, between two processes: what `Buffer` hands out may be kept, freed and read on other
streams as any tensor may. Whether memory was reused too early is seen in the bits of whoever still reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.device_calls import dispatch, draw_on_device, expected, same_bits

from deepep.sim import World

pytestmark = pytest.mark.gpu

#: Symmetric memory of a rank: some 384 MiB of receive pool. A dispatch of T = 1024 takes some 37 MB.
SYMMETRIC_BYTES = 512 << 20
TOKENS = 1024
#: Cycles of a sleep on the device: about 0.1 s.
LONG = 180_000_000


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=120) as world:
        yield world


def buffer_of(ctx: Any) -> Any:
    import deepep

    if "buffer" not in ctx.scratch:
        os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(SYMMETRIC_BYTES)
        ctx.scratch["buffer"] = deepep.Buffer(ctx.group, timeout=20.0)
    assert ctx.scratch["buffer"].runtime.info.backend == "cuda"
    return ctx.scratch["buffer"]


def received(ctx: Any, seed: int, tokens: int = TOKENS, **how: Any) -> torch.Tensor:
    """The rows of a dispatch whose other results are freed."""
    return dispatch(buffer_of(ctx), draw_on_device(seed, ctx.rank, tokens, ctx.device), **how)[0]


def churn(ctx: Any, times: int = 8, tokens: int = TOKENS) -> None:
    """Dispatches whose results are freed at once: they go where the pool is free, or wrongly thought so."""
    for seed in range(times):
        received(ctx, 500 + seed, tokens)


def test_rows_are_right_whatever_is_kept(pair: World) -> None:
    """Kept tensors stay what they were, and never keep a later call from its own right results."""

    def keep(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for seed in range(4):
            givens = [draw_on_device(seed, rank, 300 + 50 * seed, ctx.device) for rank in range(2)]
            want = [tuple(t.cuda() for t in pair) for pair in expected_on_cpu(givens)][ctx.rank]
            rows, _, _, _, handle, _ = dispatch(buffer, givens[ctx.rank])
            again, *_ = buffer.dispatch(givens[ctx.rank].x, handle=handle)
            sums, *_ = buffer.combine(rows * 2, handle)
            kept += [(rows, want[0]), (again, want[0]), (sums, want[1])]
            for now, then in kept:
                assert same_bits(now, then), seed
        churn(ctx, times=3)
        for now, then in kept:
            assert same_bits(now, then)

    def expected_on_cpu(givens: Any) -> Any:
        from harness.device_calls import on_device

        return expected([on_device(given, torch.device("cpu")) for given in givens])

    pair.run(keep)


def test_freed_memory_is_there_again(pair: World) -> None:
    """Many more dispatches than the pool would hold, all freed; nothing accumulates."""

    def free(ctx: Any) -> None:
        churn(ctx, times=20)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        churn(ctx, times=100)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before

    pair.run(free)


@pytest.mark.parametrize("part", ["a slice", "the indices", "the weights", "the scales"])
def test_a_part_keeps_the_whole(pair: World, part: str) -> None:
    """Whatever view is left of a dispatch's results, its memory is not handed out again."""

    def keep(ctx: Any, part: str) -> None:
        buffer = buffer_of(ctx)
        given = draw_on_device(3, ctx.rank, TOKENS, ctx.device)
        if part == "the scales":
            scales = torch.rand((TOKENS, 56), device=ctx.device)
            layout = buffer.get_dispatch_layout(given.idx, given.num_experts)
            results = buffer.dispatch(
                (given.x.to(torch.float8_e4m3fn), scales),
                num_tokens_per_rank=layout[0],
                is_token_in_rank=layout[3],
                num_tokens_per_expert=layout[2],
            )
            kept = results[0][1]
        else:
            results = dispatch(buffer, given)
            kept = {"a slice": results[0][5:7, 100:], "the indices": results[1], "the weights": results[2]}[
                part
            ]
        want = kept.clone()
        del results  # the rows, and the handle
        churn(ctx)
        assert same_bits(kept, want)

    pair.run(keep, part)


@pytest.mark.parametrize("told_by", ["record_stream", "wait_stream"])
def test_a_third_stream_reads_late(pair: World, told_by: str) -> None:
    """Rows are read on a third stream after they were freed; torch is told in either of its two ways."""

    def late(ctx: Any, told_by: str) -> None:
        side = torch.cuda.Stream()
        for seed in range(3):
            rows = received(ctx, seed)
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
            churn(ctx)
            side.synchronize()
            assert same_bits(seen, want)

    pair.run(late, told_by)


def test_the_current_stream_reads_late(pair: World) -> None:
    """The reader is queued on the caller's own stream behind a sleep, and the rows are freed at once."""

    def late(ctx: Any) -> None:
        for seed in range(3):
            rows = received(ctx, seed)
            want = rows.clone()
            torch.cuda._sleep(LONG)
            seen = rows.clone()
            del rows
            churn(ctx)
            torch.cuda.synchronize()
            assert same_bits(seen, want)

    pair.run(late)


@pytest.mark.parametrize("ours", [False, True], ids=["caller's outputs", "communication stream's outputs"])
def test_an_old_previous_event(pair: World, ours: bool) -> None:
    """Calls are told to wait for an early event alone, while a reader of freed rows is queued behind it."""

    def early(ctx: Any, ours: bool) -> None:
        import deepep

        buffer = buffer_of(ctx)
        given = draw_on_device(1, ctx.rank, TOKENS, ctx.device)
        layout = buffer.get_dispatch_layout(given.idx, given.num_experts)
        torch.cuda.synchronize()
        before = deepep.Buffer.capture()
        rows = received(ctx, 2)
        want = rows.clone()
        torch.cuda._sleep(LONG)
        seen = rows.clone()
        del rows
        alike = []
        for _ in range(8):
            recv, *_, handle, event = dispatch(
                buffer,
                given,
                layout,
                previous_event=before,
                async_finish=True,
                allocate_on_comm_stream=ours,
            )
            # The same for a cached dispatch, which does not wait for its counts.
            again, *_, last = buffer.dispatch(
                given.x,
                handle=handle,
                previous_event=before,
                async_finish=True,
                allocate_on_comm_stream=ours,
            )
            event.current_stream_wait()
            last.current_stream_wait()
            alike.append((recv == again).all())  # told later: the host must not wait for the reader
            if ours:
                recv.record_stream(torch.cuda.current_stream())
                again.record_stream(torch.cuda.current_stream())
            del recv, again
        torch.cuda.synchronize()
        assert same_bits(seen, want)
        assert all(alike)

    pair.run(early, ours)


def test_outputs_of_several_streams(pair: World) -> None:
    """Each caller's stream gets outputs of its own, reads them late, and frees them in any order."""

    def several(ctx: Any) -> None:
        streams = [torch.cuda.Stream() for _ in range(3)]
        seen: list[torch.Tensor] = []
        want: list[torch.Tensor] = []
        for turn in range(6):
            stream = streams[turn % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                rows = received(ctx, turn)
                want.append(rows.clone())
                torch.cuda._sleep(LONG // 2)
                seen.append(rows.clone())
                if turn % 2:
                    del rows  # freed under its own stream; else the default one is current by then
            rows = torch.empty(0)
        churn(ctx)
        torch.cuda.synchronize()
        for turn, (a, b) in enumerate(zip(seen, want, strict=True)):
            assert same_bits(a, b), turn

    pair.run(several)


def test_inputs_may_be_freed_at_once(pair: World) -> None:
    """Inputs that an asynchronous call still reads are not reused when the caller lets go of them."""

    def free(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        for seed in range(4):
            given = draw_on_device(seed, ctx.rank, TOKENS, ctx.device)
            rows, _, _, _, handle, _ = dispatch(buffer, given)
            want, *_ = buffer.combine(rows * 2, handle)
            again_want, *_ = buffer.dispatch(given.x * 3, handle=handle)
            torch.cuda.synchronize()
            with torch.cuda.stream(buffer.get_comm_stream()):
                torch.cuda._sleep(LONG)
            got, _, event = buffer.combine(rows * 2, handle, async_finish=True)
            again, *_, last = buffer.dispatch(given.x * 3, handle=handle, async_finish=True)
            # The same sizes again: torch hands out what was freed, if it thinks that it may.
            noise = [torch.full_like(rows, 7.0) for _ in range(3)]
            noise += [torch.full_like(given.x, 7.0) for _ in range(3)]
            event.current_stream_wait()
            last.current_stream_wait()
            assert same_bits(got, want)
            assert same_bits(again, again_want)
            del noise

    pair.run(free)


def test_outputs_outlive_their_buffer() -> None:
    """The buffer is destroyed and forgotten, its memory would be free for others: held rows stay."""

    def forget(ctx: Any) -> None:
        import gc

        import deepep

        os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(SYMMETRIC_BYTES)
        for explicit in (True, False):
            buffer = deepep.Buffer(ctx.group, timeout=20.0)
            given = draw_on_device(1, ctx.rank, TOKENS, ctx.device)
            rows, _, _, _, handle, _ = dispatch(buffer, given)
            sums, *_ = buffer.combine(rows, handle)
            want = [rows.clone(), sums.clone()]
            torch.cuda.synchronize()
            torch.distributed.barrier()
            if explicit:
                buffer.destroy()
            del buffer, handle
            gc.collect()
            torch.distributed.barrier()
            noise = [torch.full((SYMMETRIC_BYTES // 4,), 7.0, device=ctx.device) for _ in range(4)]
            torch.cuda.synchronize()
            assert same_bits(rows, want[0])
            assert same_bits(sums, want[1])
            del noise

    with World(2, backend="nccl", timeout=120) as world:
        world.run(forget)
