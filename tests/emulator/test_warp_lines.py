"""Time lines of warps, in the emulated machine's time: in order, no wait ends before what it waits for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepep import _emulator
from deepep.runtime.control import lines
from deepep.runtime.control.lines import CallLines, LineRecorder, WarpLine
from deepep.sim.emulator.calls import CombineCall, DispatchCall, Gpu
from deepep.sim.emulator.domain import EmulatedDomain
from deepep.sim.emulator.low_latency import (
    BOTH,
    EmulatedLowLatency,
    LowLatencyCall,
    LowLatencyGpu,
    LowLatencySizes,
    RowCast,
)

RANKS, TOKENS, HIDDEN, LATE = 3, 4, 128, 2
LIVE = tuple(range(RANKS))
PAUSE = 200_000_000  # nanoseconds
#: What a warp may be at behind a step: of the throughput mode, then of low latency.
AFTER = {
    "start": {"count", "post", "wait for metadata", "push rows", "wait for credit", "finish"},
    "post": {"count", "wait for metadata", "push rows"},
    "finish": {"end"},
}


def test_both_sides_of_the_language_boundary_have_the_same_steps() -> None:
    assert len(lines.STEPS) == _emulator.NUM_LINE_STEPS
    assert (lines.LINE_WORDS, lines.TIME_BITS) == (_emulator.LINE_WORDS, _emulator.LINE_TIME_BITS)


def machine_of(seed: int, blocks: int, threads: int, late: bool) -> Any:
    faults = [_emulator.MachineFault(rank=LATE, at=1, pause_ns=PAUSE)] if late else []
    return _emulator.Machine(
        num_ranks=RANKS, max_blocks=blocks, max_threads=threads, seed=seed, max_steps=10**9, faults=faults
    )


def read(domain: Any) -> list[CallLines]:
    """The one call that each rank has made."""
    calls = []
    for rank in LIVE:
        recorder = LineRecorder(rank)
        recorder.begin(1)
        recorder.add(*domain.read_lines(rank))
        calls += recorder.end()
    return calls


def first(call: CallLines, step: str) -> int:
    """The time at which a rank's first warp came to a step."""
    return min(span.begin for line in call.warps for span in line.spans if span.step == step)


def last_end(line: WarpLine, step: str) -> int | None:
    ends = [span.end for span in line.spans if span.step == step]
    return max(ends) if ends else None


def check(calls: list[CallLines], operation: str, warps: int, late: bool) -> None:
    """Every warp's steps are in order and without gaps; nobody has all metadata before all have posted."""
    assert [(call.rank, call.operation) for call in calls] == [(rank, operation) for rank in LIVE]
    posts = [first(call, "post") for call in calls]
    for call in calls:
        assert len(call.warps) == warps
        for line in call.warps:
            assert line.dropped == 0
            steps = [span.step for span in line.spans]
            assert steps[0] == "start"
            assert steps[-1] == "finish"
            for span, after in zip(line.spans, line.spans[1:], strict=False):
                assert span.begin <= span.end == after.begin
                assert after.step in AFTER.get(span.step, set(lines.STEPS)), steps
            met = last_end(line, "wait for metadata")
            if met is not None:
                assert met >= max(posts), (call.rank, line)
        waited = max(
            span.end - span.begin
            for line in call.warps
            for span in line.spans
            if span.step == "wait for metadata"
        )
        assert (waited > PAUSE * 0.9) == (late and call.rank != LATE), (call.rank, waited)
    # Rows of peers: no wait for them ends before the first of them was on its way.
    pushes = [first(call, "push rows") for call in calls]
    for call in calls:
        for line in call.warps:
            came = last_end(line, "wait for rows")
            if came is not None:
                assert came >= min(pushed for rank, pushed in enumerate(pushes) if rank != call.rank)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", ["fresh", "topk"])
def test_dispatch_and_combine(mode: str, late: bool) -> None:
    gpu = Gpu(num_blocks=2, push_blocks=1, local_blocks=1, ce_chunks=0)
    machine = machine_of(7, 2, gpu.num_threads, late)
    domain = EmulatedDomain(
        machine,
        _emulator.own_kernels(),
        gpu,
        num_ranks=RANKS,
        max_local_experts=1,
        staging_rows=RANKS * TOKENS,
        row_bytes=2 * HIDDEN + 32,
        slot_bytes=1 << 14,
    )
    idx = torch.arange(RANKS).expand(TOKENS, -1).contiguous()
    x, ones = torch.ones(TOKENS, HIDDEN).bfloat16(), torch.ones(RANKS, dtype=torch.int32)
    plans = []
    for rank in LIVE:
        domain.record_lines(rank)
        call = DispatchCall(
            x=x,
            num_local_experts=1,
            capacity=RANKS * TOKENS,
            live=LIVE,
            topk_idx=idx,
            topk_weights=torch.ones(TOKENS, RANKS),
            num_worst_tokens=RANKS * TOKENS,
            by_topk=mode == "topk",
        )
        layout = domain.layout_inside(rank, TOKENS)
        if mode == "fresh":
            in_rank = torch.ones(TOKENS, RANKS, dtype=torch.bool)
            layout = domain.given_layout(rank, TOKENS * ones, TOKENS * ones, in_rank)
        plans.append(domain.new_plan(rank, TOKENS))
        domain.dispatch(rank, call, layout, plans[rank])
    assert machine.run().status == "done"
    warps = gpu.num_blocks * gpu.num_threads // 32
    check(read(domain), "dispatch", warps, late)
    rows = torch.ones(RANKS * TOKENS, HIDDEN).bfloat16()
    for rank in LIVE:
        domain.record_lines(rank)
        domain.combine(rank, CombineCall(x=rows, hidden=HIDDEN, num_tokens=TOKENS, live=LIVE), plans[rank])
    assert machine.run().status == "done"
    check(read(domain), "combine", warps, False)


@pytest.mark.parametrize("late", [False, True])
def test_low_latency(late: bool) -> None:
    gpu = LowLatencyGpu(num_blocks=2, num_threads=128)
    machine = machine_of(3, 2, 128, late)
    domain = EmulatedLowLatency(
        machine, _emulator.own_kernels(), gpu, RANKS, LowLatencySizes(1, TOKENS, RANKS, HIDDEN)
    )
    idx = torch.arange(RANKS).expand(TOKENS, -1).contiguous()
    call = LowLatencyCall(
        topk_idx=idx,
        topk_weights=torch.ones(TOKENS, RANKS),
        num_max_tokens=TOKENS,
        num_local_experts=1,
        hidden=HIDDEN,
        carries_weights=False,
    )
    x, handles = torch.ones(TOKENS, HIDDEN).bfloat16(), []
    for rank in LIVE:
        domain.record_lines(rank)
        handles.append(domain.new_handle(rank, call))
        args, _ = domain.dispatch(rank, call, RowCast(True, False, False), x, handles[rank])
        domain.launch_dispatch(rank, args, BOTH)
    assert machine.run().status == "done"
    check(read(domain), "low_latency_dispatch", 8, late)
    rows = torch.ones(1, RANKS * TOKENS, HIDDEN).bfloat16()
    for rank in LIVE:
        domain.record_lines(rank)
        args, _ = domain.combine(rank, call, rows, handles[rank])
        domain.launch_combine(rank, args, BOTH)
    assert machine.run().status == "done"
    check(read(domain), "low_latency_combine", 8, False)


def test_a_launch_without_room_or_such_a_form_is_listed_without_warps() -> None:
    recorder = LineRecorder(0)
    recorder.begin(1)
    recorder.add([("dispatch", 2, 2, -1)], torch.zeros(0, dtype=torch.int64))
    assert recorder.end() == [CallLines("dispatch", 0, ())]
    assert not recorder.asks
    assert recorder.end() == []


def test_a_warp_keeps_its_first_steps_and_counts_the_others() -> None:
    words = torch.zeros(1, 1, lines.LINE_WORDS, dtype=torch.int64)
    words[0, 0, 0] = 5 << 32 | 200
    words[0, 0, 1:] = torch.arange(127) + (11 << lines.TIME_BITS)
    (line,) = lines.read_lines(words)
    assert (line.sm, line.dropped, len(line.spans)) == (5, 73, 126)
    assert line.spans[3] == lines.WarpSpan("reduce", 3, 4)
    assert not line.spans[3].waits
