"""Memory of calls with an event: held until the caller's stream waits, without recording streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.on_stubs import on_stubs

START = """
import torch
from harness import stub_cuda
stub_cuda.install(8)
recorded = []
torch.Tensor.record_stream = lambda tensor, stream: recorded.append(tensor.data_ptr())
x, idx = torch.zeros((8, 256), dtype=torch.bfloat16), torch.zeros((8, 2), dtype=torch.int64)
weights, counts = torch.ones((8, 2)), torch.zeros(4, dtype=torch.int32)

def finish(event):
    made = list(recorded)
    event.current_stream_wait()
    assert recorded == made
    recorded.clear()
    return made
"""


def test_what_only_a_kernel_touches_is_not_recorded() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer() as buffer:
            for how in ({}, {"cumulative_local_expert_recv_stats": counts}, {"topk_weights": weights}):
                (rows, scales), _, handle, event, _ = buffer.low_latency_dispatch(
                    x, idx, 8, 4, async_finish=True, **how)
                assert not finish(event)
                slots = torch.zeros(rows.shape, dtype=torch.bfloat16)
                for out in (None, torch.zeros_like(x)):
                    event = buffer.low_latency_combine(
                        slots, idx, weights, handle, async_finish=True, out=out)[1]
                    assert not finish(event)
            rows, _, got, _, handle, event = buffer.dispatch(
                x, topk_idx=idx, topk_weights=weights, num_experts=4, async_finish=True)
            # The pool's memory is the communication stream's. What was given belongs to the caller.
            assert not {t.data_ptr() for t in (x, idx, weights)} & set(finish(event))
            for how in ({}, {"topk_weights": got}):
                event = buffer.combine(rows, handle, **how, async_finish=True)[2]
                assert not finish(event)
            event = buffer.combine(rows, handle, async_finish=True, previous_event=buffer.capture())[2]
            assert len(finish(event)) == 1  # made behind that event alone: not the caller's
        """,
    )


def test_an_event_that_nobody_waits_for_records() -> None:
    on_stubs(
        START,
        """
        with stub_cuda.stub_buffer() as buffer:
            result = buffer.low_latency_dispatch(x, idx, 8, 4, async_finish=True)
            rows = result[0][0].data_ptr()
            handle = result[2]
            assert not recorded
            del result
            assert {x.data_ptr(), idx.data_ptr(), rows} <= set(recorded)
        """,
    )


# On a GPU: the communication stream is late, what the caller frees is taken and written at once.

LATE = 100_000_000
"""Cycles, some 50 ms."""


def spoil(like: torch.Tensor) -> list[torch.Tensor]:
    """Takes and overwrites memory of this size, as freed last by the current stream."""
    return [torch.full_like(like, 3.0) for _ in range(4)]


def freed_early(ctx: Any, waits: bool) -> None:
    """Inputs freed behind the calls, and outputs that nobody wants, with and without a wait for the event."""
    import deepep

    buffer = deepep.Buffer(ctx.group, backend="cuda", low_latency_mode=True, timeout=20.0)
    tokens, hidden, experts = 64, 7168, 8
    base = torch.randn((tokens, hidden), device="cuda").bfloat16()
    idx = torch.arange(tokens * 2, device="cuda").view(tokens, 2) % experts
    weights = torch.ones((tokens, 2), device="cuda")
    comm = buffer.get_comm_stream()
    assert comm is not None

    def round_trip(drops: bool) -> torch.Tensor:
        x = base.clone()
        with torch.cuda.stream(comm):
            torch.cuda._sleep(LATE)
        rows, _, handle, event, _ = buffer.low_latency_dispatch(
            x, idx, tokens, experts, use_fp8=False, async_finish=True
        )
        del x
        spoil(base)
        if drops:  # the kernel still has to write them
            shape = rows.shape
            del rows, handle
            if waits:
                event.current_stream_wait()
            del event
            return torch.full(shape, 3.0, dtype=torch.bfloat16, device="cuda")
        event.current_stream_wait()
        with torch.cuda.stream(comm):
            torch.cuda._sleep(LATE)
        sums, event, _ = buffer.low_latency_combine(rows, idx, weights, handle, async_finish=True)
        like = torch.empty_like(rows)
        del rows, handle
        spoil(like)
        event.current_stream_wait()
        return sums

    wanted = None
    for _ in range(3):
        sums = round_trip(drops=False)
        wanted = sums.clone() if wanted is None else wanted
        assert torch.equal(sums.view(torch.int16), wanted.view(torch.int16))
        assert torch.equal(sums, base * 2)
        ours = round_trip(drops=True)
        torch.cuda.synchronize()
        assert bool((ours == 3.0).all())  # nobody wrote there late
    buffer.destroy()


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [True, False])
def test_what_is_freed_early_is_neither_read_nor_written_late(waits: bool) -> None:
    from deepep.sim import World

    with World(1, backend="nccl", timeout=120) as world:
        world.run(freed_early, waits)
