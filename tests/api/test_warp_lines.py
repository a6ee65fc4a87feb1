"""Time lines of warps as a user asks for them: on the emulator, on stubs of CUDA, where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.on_stubs import on_stubs
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep.api.warp_lines import calls_of, trace_of
from deepep.runtime.control.lines import STEPS, CallLines, WarpLine, WarpSpan

pytestmark = pytest.mark.own_backend

RANKS, TOKENS, HIDDEN, MOST = 2, 4, 128, 4


def round_trips(buffer: Any) -> list[torch.Tensor]:
    """Both modes, there and back; what came."""
    x = torch.arange(TOKENS * HIDDEN).view(TOKENS, HIDDEN).bfloat16()
    idx = torch.arange(buffer.group_size).expand(TOKENS, -1).contiguous()
    weights, experts = torch.ones(idx.shape), buffer.group_size
    sent = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=experts)
    (back, *_) = buffer.combine(sent.recv_x, sent.handle)
    few = buffer.low_latency_dispatch(x, idx, MOST, experts, use_fp8=False)
    summed, *_ = buffer.low_latency_combine(few.recv_x, idx, weights, few.handle)
    return [sent.recv_x, back, few.recv_x, summed]


def record(ctx: Any, backend: str, path: str) -> tuple[list[bool], list[CallLines]]:
    """Rank 0 records alone, and saves; whether the bits are the same."""
    from deepep import Buffer, ModeError

    with Buffer(ctx.group, low_latency_mode=True, backend=backend) as buffer:
        if ctx.rank:
            before, after = round_trips(buffer), round_trips(buffer)
            return [torch.equal(a, b) for a, b in zip(before, after, strict=True)], []
        with buffer.record_warps(calls=2) as lines:
            before = round_trips(buffer)
            with pytest.raises(ModeError, match="inside another"), buffer.record_warps():
                pass
        after = round_trips(buffer)
        assert buffer.record_warps().calls == []
        lines.save(path)
        return [torch.equal(a, b) for a, b in zip(before, after, strict=True)], lines.calls


OPERATIONS = ["dispatch", "combine", "low_latency_dispatch", "low_latency_combine"]


def test_one_rank_records_and_the_bits_are_the_same(world_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "rank0.json"
    found = world_of(RANKS).run(record, "emulator", str(path))
    assert all(all(same) for same, _ in found)
    calls = found[0][1]
    assert [call.operation for call in calls] == OPERATIONS
    for call in calls:
        assert call.rank == 0
        assert len(call.warps) >= 2
        assert all(line.spans[-1].step == "finish" for line in call.warps)
    assert calls_of(json.loads(path.read_text())) == calls


def body_without_kernels(ctx: Any) -> None:
    from deepep import ArgumentTypeError, Buffer, ModeError, RangeError

    with Buffer(ctx.group, backend="reference") as buffer:
        with pytest.raises(ModeError, match="cuda or emulator"):
            buffer.record_warps()
        with pytest.raises(RangeError, match="calls"):
            buffer.record_warps(calls=0)
        with pytest.raises(ArgumentTypeError, match="calls"):
            buffer.record_warps(calls="one")  # type: ignore[arg-type]


def test_a_backend_without_warps_says_so(world_of: Any) -> None:
    world_of(1).run(body_without_kernels)


START = """
import torch
from harness.stub_cuda import install, stub_buffer
install(num_rows=4)
"""


def test_on_cuda_each_mode_has_its_launches_and_only_those_of_the_block() -> None:
    on_stubs(
        START,
        """
        from deepep.runtime.control.lines import WarpLine, WarpSpan

        x, weights = torch.ones(4, 128).bfloat16(), torch.ones(4, 1)
        idx = torch.zeros(4, 1, dtype=torch.int64)
        with stub_buffer() as buffer:
            with buffer.record_warps(calls=1) as early:  # before there is any memory
                sent = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=1)
            with buffer.record_warps(calls=1) as lines:
                buffer.dispatch(x, handle=sent.handle)
                buffer.combine(sent.recv_x, sent.handle)
                few = buffer.low_latency_dispatch(x, idx, 4, 1, use_fp8=False)
                buffer.low_latency_combine(few.recv_x, idx, weights, few.handle)
            buffer.dispatch(x, handle=sent.handle)
            line = WarpLine(0, 0, 9, (WarpSpan("start", 100, 250),))
            assert [call.operation for call in early.calls] == ["dispatch"]
            operations = ["dispatch", "combine", "low_latency_dispatch", "low_latency_combine"]
            assert [call.operation for call in lines.calls] == operations
            for call in early.calls + lines.calls:
                assert call.rank == 0 and call.warps[0] == line, call
        """,
    )


SPANS = st.lists(
    st.builds(WarpSpan, st.sampled_from(STEPS[1:]), st.integers(0, 2**56), st.integers(0, 2**56)),
    min_size=1,
    max_size=3,
).map(tuple)
WARPS = st.lists(
    st.builds(
        WarpLine, st.integers(0, 200), st.integers(0, 31), st.integers(0, 131), SPANS, st.integers(0, 9)
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda line: (line.block, line.warp),
).map(tuple)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.builds(CallLines, st.sampled_from(OPERATIONS), st.integers(0, 7), WARPS), max_size=3))
def test_a_trace_has_all_that_was_recorded(calls: list[CallLines]) -> None:
    assert calls_of(json.loads(json.dumps(trace_of(calls)))) == calls


def test_what_is_no_trace_is_refused() -> None:
    for wrong in ({}, [], {"traceEvents": [{"ph": "X", "args": {}}]}, 3):
        with pytest.raises(ValueError, match="no trace"):
            calls_of(wrong)
