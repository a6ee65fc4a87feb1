"""Statistics of low-latency calls: rows received by expert, and nanoseconds waited for other ranks.

Times are compared with times that must lie inside or around them, never with a number.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

RANKS, LATE, MOST, EXPERTS = 3, 1, 4, 3


def inputs_of(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [4, 128], topk_idx and topk_weights [4, 2], an expert twice among them; rank 2 has no tokens."""
    num_tokens = 0 if rank == 2 else 4
    idx = torch.tensor([[0, 0], [1, 2], [2, -1], [0, 1]])[:num_tokens]
    return torch.ones(num_tokens, 128).bfloat16(), idx, torch.ones(num_tokens, 2)


def counted(ctx: Any, buffer_of: Any, how: dict[str, bool]) -> list[list[int]]:
    """Counts: once sent, if it is hooked; received; received again; with the last rank masked."""
    buffer = buffer_of(ctx, enable_shrink=True)
    x, idx, _ = inputs_of(ctx.rank)
    counts = torch.full((1,), 100, dtype=torch.int32)
    seen = []

    def dispatch() -> None:
        sent = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, counts, use_fp8=False, **how)
        if sent.hook is not None:
            seen.append(counts.tolist())
            sent.hook()
        elif sent.event.event is not None:
            sent.event.current_stream_wait()
        seen.append(counts.tolist())

    dispatch()
    dispatch()
    if ctx.rank != 2:
        buffer.low_latency_update_mask_buffer(2, True)
        dispatch()
    else:
        buffer.low_latency_update_mask_buffer(0, True)
        buffer.low_latency_update_mask_buffer(1, True)
    buffer.low_latency_clean_mask_buffer()
    return seen


@pytest.mark.parametrize("how", [{}, {"async_finish": True}, {"return_recv_hook": True}])
def test_rows_received_are_added_when_they_are_there(
    world_of: Any, buffer_of: Any, how: dict[str, bool]
) -> None:
    seen = world_of(RANKS).run(counted, buffer_of, how)
    for rank, found in enumerate(seen):
        rows = 2 * [2, 2, 2][rank]  # two of each expert's rows from either of the first two ranks
        wanted = [[100 + rows * (1 + number)] for number in range(2 if rank == 2 else 3)]
        if how.get("return_recv_hook"):
            wanted = [[count] for [after] in wanted for count in (after - rows, after)]
        assert found == wanted, rank


def round_trip(buffer: Any, waited: list[torch.Tensor], hooked: bool = False) -> None:
    x, idx, weights = inputs_of(buffer.rank)
    sent = buffer.low_latency_dispatch(
        *(x, idx, MOST, EXPERTS),
        dispatch_wait_recv_cost_stats=waited[0],
        use_fp8=False,
        return_recv_hook=hooked,
    )
    if hooked:
        sent.hook()
    back = buffer.low_latency_combine(
        *(sent.recv_x, idx, weights, sent.handle),
        combine_wait_recv_cost_stats=waited[1],
        return_recv_hook=hooked,
    )
    if hooked:
        back.hook()


def added(ctx: Any, buffer_of: Any, hooked: bool) -> None:
    buffer = buffer_of(ctx)
    waited = [torch.zeros(RANKS, dtype=torch.int64) for _ in range(2)]
    before = [stats.clone() for stats in waited]
    for _ in range(2):
        started = time.perf_counter_ns()
        round_trip(buffer, waited, hooked)
        passed = time.perf_counter_ns() - started
        for stats, old in zip(waited, before, strict=True):
            others = torch.arange(RANKS) != ctx.rank
            assert stats[ctx.rank] == 0
            assert bool((stats > old)[others].all())
            assert int((stats - old).max()) <= passed
        before = [stats.clone() for stats in waited]


@pytest.mark.parametrize("hooked", [False, True])
def test_waits_are_added_up(world_of: Any, buffer_of: Any, hooked: bool) -> None:
    world_of(RANKS).run(added, buffer_of, hooked)


def come_late(ctx: Any, buffer_of: Any, folder: str) -> tuple[int, list[int]]:
    """Time when this rank was in its call, or the late one, which saw the others there, began; and waits."""
    buffer, waited = buffer_of(ctx), torch.zeros(RANKS, dtype=torch.int64)
    x, idx, _ = inputs_of(ctx.rank)
    at = [0]

    def observe(operation: str, phase: str) -> None:
        if phase == "control" and not at[0]:
            at[0] = time.perf_counter_ns()
            Path(folder, f"in-{ctx.rank}").touch()

    if ctx.rank == LATE:
        await_files(Path(folder, f"in-{rank}") for rank in range(RANKS) if rank != LATE)
        at[0] = time.perf_counter_ns()
    else:
        buffer.runtime.observe(observe)
    buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, dispatch_wait_recv_cost_stats=waited, use_fp8=False)
    buffer.runtime.observe(None)
    return at[0], waited.tolist()


def await_files(files: Any) -> None:
    for file in files:
        while not file.exists():
            time.sleep(0.001)


def test_a_late_rank_is_waited_for(world_of: Any, buffer_of: Any, tmp_path: Path) -> None:
    found = world_of(RANKS).run(come_late, buffer_of, str(tmp_path))
    called, _ = found[LATE]
    for rank, (was_in, waited) in enumerate(found):
        if rank != LATE:
            assert waited[LATE] >= called - was_in > 0


def work_meanwhile(ctx: Any, buffer_of: Any, folder: str) -> tuple[int, list[int]]:
    """Nanoseconds in the hook, and waits, where the other ranks have come long before it is called."""
    buffer, waited = buffer_of(ctx), torch.zeros(RANKS, dtype=torch.int64)
    x, idx, _ = inputs_of(ctx.rank)
    if ctx.rank == LATE:
        await_files([Path(folder, "sent")])
    sent = buffer.low_latency_dispatch(
        *(x, idx, MOST, EXPERTS),
        dispatch_wait_recv_cost_stats=waited,
        use_fp8=False,
        return_recv_hook=True,
    )
    if ctx.rank == 0:
        Path(folder, "sent").touch()
        await_files([Path(folder, "late")])
    started = time.perf_counter_ns()
    sent.hook()
    passed = time.perf_counter_ns() - started
    if ctx.rank == LATE:
        Path(folder, "late").touch()
    return passed, waited.tolist()


def test_what_passes_before_the_hook_is_no_wait(world_of: Any, buffer_of: Any, tmp_path: Path) -> None:
    for passed, waited in world_of(RANKS).run(work_meanwhile, buffer_of, str(tmp_path)):
        assert max(waited) <= passed
