"""On GPUs: time lines of warps, of a rank that records and with another that comes late.

pytest -m gpu tests/backends/cuda/test_warp_lines.py
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from deepep.runtime.control.lines import CallLines
from deepep.sim import World

pytestmark = pytest.mark.gpu

LATE, SECONDS = 1, 0.1
OPERATIONS = ["dispatch", "combine", "low_latency_dispatch", "low_latency_combine"]


def record_a_trip(ctx: Any) -> tuple[list[bool], list[CallLines]]:
    """Round trips of both modes: whether recording keeps the bits, and the lines of one with a late rank."""
    import torch

    from deepep import Buffer

    generator = torch.Generator(device=ctx.device).manual_seed(ctx.rank)
    x = torch.randn(64, 512, device=ctx.device, generator=generator).bfloat16()
    idx = torch.arange(ctx.num_ranks, device=ctx.device).expand(64, -1).contiguous()
    weights = torch.rand(64, ctx.num_ranks, device=ctx.device, generator=generator)

    def trip(buffer: Buffer, late: bool) -> list[torch.Tensor]:
        def come() -> None:
            torch.cuda.synchronize()
            time.sleep(SECONDS if late and ctx.rank == LATE else 0)

        come()
        sent = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=ctx.num_ranks)
        come()
        assert isinstance(sent.recv_x, torch.Tensor)
        assert sent.handle is not None
        back = buffer.combine(sent.recv_x, sent.handle)[0]
        come()
        few = buffer.low_latency_dispatch(x, idx, 64, ctx.num_ranks, use_fp8=False)
        come()
        assert isinstance(few.recv_x, torch.Tensor)
        return [sent.recv_x, back, buffer.low_latency_combine(few.recv_x, idx, weights, few.handle)[0]]

    with Buffer(ctx.group, low_latency_mode=True, backend="cuda", timeout=60.0) as buffer:
        before = trip(buffer, late=False)
        with buffer.record_warps(calls=1) as lines:
            after = trip(buffer, late=True)
        return [torch.equal(a, b) for a, b in zip(before, after, strict=True)], lines.calls


def longest_wait(call: CallLines) -> float:
    """Seconds that some warp waited for the others' metadata or rows."""
    spans = [span for line in call.warps for span in line.spans if span.waits]
    return max(span.end - span.begin for span in spans) / 1e9


def test_a_late_rank_is_in_the_lines_of_its_peer() -> None:
    with World(2, backend="nccl") as world:
        found = world.run(record_a_trip)
    for rank, (same, calls) in enumerate(found):
        assert all(same), "recording changes bits"
        assert sorted(call.operation for call in calls) == sorted(OPERATIONS)
        for call in calls:
            assert call.warps, call.operation
            for line in call.warps:
                assert line.spans[0].step == "start"
                assert line.spans[-1].step == "finish"
                assert all(span.begin <= span.end for span in line.spans)
            if rank != LATE:
                assert longest_wait(call) > SECONDS / 4, call.operation
