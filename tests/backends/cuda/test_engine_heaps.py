"""The CUDA engine's heaps over masks, time-outs and its end, on stubs: no GPU is needed."""

from __future__ import annotations

import textwrap

import pytest
from harness.on_stubs import on_stubs

START = """
import gc, weakref
import pytest, torch
from harness import stub_cuda
stub_cuda.install(8)
import deepep
from deepep.backends.cuda.launch import Phase
from deepep.backends.cuda.memory import generations
from deepep.backends.cuda.memory.ipc import SymmetricHeap
x, idx = torch.zeros((8, 256), dtype=torch.bfloat16), torch.zeros((8, 2), dtype=torch.int64)
weights = torch.ones((8, 2))

living = []
def map_heaps(own, rank, exported):
    living.append(None)
    weakref.finalize(own, living.pop)
    return SymmetricHeap(own, [own])

def high_throughput(buffer):
    layout = buffer.get_dispatch_layout(idx, 2)
    return buffer.dispatch(
        x, num_tokens_per_rank=layout[0], is_token_in_rank=layout[3], num_tokens_per_expert=layout[2],
        topk_idx=idx, topk_weights=weights,
    )

def low_latency(buffer):
    return buffer.low_latency_dispatch(x, idx, 8, 2, use_fp8=False)

def begin_anew(buffer):
    buffer.runtime.mask(0, False)  # as a change of members does

pending = []
def fault_on(domain):
    domain.has_fault = lambda self: bool(pending)
    domain.take_fault = lambda self, stream: pending.pop() if pending else None

def time_out():
    pending.append(stub_cuda.Fault(operation=1, phase=Phase.COUNTS, missing=1, expected=1, seen=0))

def buffer_of():
    return stub_cuda.stub_buffer(reduction="expert_rank")
"""
MODES = [("high_throughput", "Domain"), ("low_latency", "LowLatencyDomain")]


def play(test: str, operation: str, domain: str) -> None:
    """Runs code for one rank; its assertions are the test's."""
    start = f"{START}\ndispatch, domain = {operation}, stub_cuda.{domain}"
    test = textwrap.dedent(test).replace(
        "with buffer_of() as buffer:", "with buffer_of() as buffer:\n    generations.map_heaps = map_heaps"
    )
    on_stubs(start, test, symmetric_bytes=1 << 20)


@pytest.mark.parametrize(("operation", "domain"), MODES)
def test_an_engine_has_one_heap_however_often_it_begins_anew(operation: str, domain: str) -> None:
    """Changes of members and time-outs, while a handle and results of each generation are held."""
    play(
        """
with buffer_of() as buffer:
    fault_on(domain)
    kept = []
    for number in range(12):
        kept.append(dispatch(buffer))
        assert len(living) == 1, number
        assert buffer.info.memory["kept memory"] == 0
        if number % 2:
            time_out()
            with pytest.raises(deepep.PeerTimeoutError):
                dispatch(buffer)
        begin_anew(buffer)
assert not living, "destroyed"
""",
        operation,
        domain,
    )


@pytest.mark.parametrize(("operation", "domain"), MODES)
def test_an_engine_ends_after_its_own_time_out(operation: str, domain: str) -> None:
    play(
        """
with buffer_of() as buffer:
    fault_on(domain)
    dispatch(buffer)
    time_out()
    with pytest.raises(deepep.PeerTimeoutError):
        dispatch(buffer)
    assert len(living) == 1
    buffer.destroy()
    assert not living
""",
        operation,
        domain,
    )


@pytest.mark.parametrize(("operation", "domain"), MODES)
def test_graphs_keep_the_heap_that_they_were_captured_on(operation: str, domain: str) -> None:
    play(
        """
with buffer_of() as buffer:
    dispatch(buffer)
    engine, is_first = buffer.runtime, domain is stub_cuda.Domain
    memory = engine.symmetric if is_first else engine._low_latency.state.memory
    first = memory.endpoint.domain
    domain.was_captured = lambda self: self is first
    for _ in range(3):
        begin_anew(buffer)
        dispatch(buffer)
        assert len(living) == 2
        assert buffer.info.memory["kept memory"] > 0
assert len(living) == 1
""",
        operation,
        domain,
    )


def test_copies_under_way_and_held_tensors_keep_the_heap() -> None:
    """Until the copy engine, which a kernel had given up, is done; and until the tensors are freed."""
    play(
        """
from deepep import _cuda
from deepep.backends.cuda.memory import heap
heap.LAST_COPIES = 0.01
with buffer_of() as buffer:
    dispatch(buffer)
    first = buffer.runtime.symmetric.endpoint.domain
    domain.has_copies_under_way = lambda self: self is first
    for _ in range(2):
        begin_anew(buffer)
        dispatch(buffer)
        assert len(living) == 2
    domain.has_copies_under_way = lambda self: False
    begin_anew(buffer)
    dispatch(buffer)
    assert len(living) == 1
    _cuda.arena_used = lambda arena: 1
    begin_anew(buffer)
    dispatch(buffer)
    assert len(living) == 2
    _cuda.arena_used = lambda arena: 0
    begin_anew(buffer)
    dispatch(buffer)
    assert len(living) == 1
""",
        *MODES[0],
    )


@pytest.mark.parametrize(("operation", "domain"), MODES)
def test_an_abandoned_engine_gives_its_last_kernels_a_moment(operation: str, domain: str) -> None:
    play(
        """
with buffer_of() as buffer:
    dispatch(buffer)
    asked = []
    stub_cuda.Turns.is_idle = lambda self: len(asked) > 3 or asked.append(None)
    stub_cuda.Domain.is_idle = lambda self: len(asked) > 3
    buffer.runtime.abandon()
    assert not living
""",
        operation,
        domain,
    )


@pytest.mark.parametrize(("operation", "domain"), MODES)
def test_released_memory_is_freed_and_made_again(operation: str, domain: str) -> None:
    """One heap while there are calls, none between, while handles of before are held. What kernels report on
    the way is raised, and memory is given back all the same.
    """
    play(
        """
with buffer_of() as buffer:
    fault_on(domain)
    handles = []
    for number in range(4):
        handles.append(dispatch(buffer).handle)
        assert len(living) == 1, number
        buffer.release_memory()
        memory = buffer.info.memory
        assert memory["symmetric memory"] == memory["low-latency memory"] == 0
        assert not living, number
        buffer.release_memory()
        for handle in handles if dispatch is high_throughput else ():
            assert buffer.dispatch(x, handle=handle).recv_x.shape[1:] == x.shape[1:]
            assert len(living) == 1
    dispatch(buffer)
    time_out()
    with pytest.raises(deepep.PeerTimeoutError):
        buffer.release_memory()
    assert not living
    with pytest.raises(deepep.PeerTimeoutError):  # until ranks are masked, as after any other
        buffer.release_memory()
    begin_anew(buffer)
    dispatch(buffer)
    assert len(living) == 1
""",
        operation,
        domain,
    )
