"""Waits by peer: who is charged with what, as a function of posted times, and on ranks that are late."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep.runtime.control import waits
from deepep.runtime.control.waits import ARRIVE, KERNEL_WAITS, NOT_MEASURED, WaitRecorder, charges

RANKS, EXPERTS, MOST, LATE = 3, 6, 4, 1
BUSY = st.dictionaries(st.integers(0, 7), st.integers(NOT_MEASURED, 10**12), min_size=1)


@settings(deadline=None)
@given(busy=BUSY, rank=st.integers(0, 7), waited=st.integers(0, 10**12))
def test_nobody_is_charged_with_more_than_it_came_later_or_was_waited_for(
    busy: dict[int, int], rank: int, waited: int
) -> None:
    charged = charges(busy, rank, waited)
    assert rank not in charged
    for peer, nanoseconds in charged.items():
        assert 0 <= nanoseconds <= min(waited, busy[peer] - busy[rank])
    if busy.get(rank, NOT_MEASURED) != NOT_MEASURED:
        assert charged.keys() == {peer for peer, their in busy.items() if their > busy[rank]}


@settings(deadline=None)
@given(busy=st.dictionaries(st.integers(0, 7), st.integers(0, 10**9), min_size=2))
def test_the_last_to_come_is_charged_by_all_and_charges_nobody(busy: dict[int, int]) -> None:
    last = max(busy, key=lambda rank: busy[rank])
    assert charges(busy, last, 10**12) == {}
    for rank, own in busy.items():
        assert charges(busy, rank, 10**12).get(last, 0) == busy[last] - own


def test_time_that_was_waited_is_not_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100]
    monkeypatch.setattr(waits, "time", SimpleNamespace(perf_counter_ns=lambda: now[0]))
    recorder = WaitRecorder(0, 3, rows=True)
    assert recorder.busy() == NOT_MEASURED
    recorder.asks = True
    assert recorder.busy() == NOT_MEASURED  # of the time before there was nothing to measure from
    recorder.arrived("dispatch", {0: NOT_MEASURED, 1: NOT_MEASURED, 2: 7}, True, 5)
    now[0] += 1000
    recorder.waited_for("dispatch", "rows", 1, 300)
    recorder.waited_to_send(200)
    assert recorder.busy() == 500
    recorder.arrived("combine", {0: 500, 1: 400, 2: 560}, True, 50)
    assert recorder.busy() == 0
    assert recorder.read(clear=True) == {
        ("dispatch", ARRIVE): ([0, 0, 0], 1),
        ("dispatch", "rows"): ([0, 300, 0], 0),
        ("combine", ARRIVE): ([0, 0, 50], 1),
    }
    assert recorder.read(clear=False) == {}


def test_rows_go_peer_by_peer_where_any_rank_asks() -> None:
    recorder = WaitRecorder(0, 2, rows=True)
    for asked in (True, False):
        recorder.arrived("dispatch", {0: NOT_MEASURED, 1: 3}, asked, 1)
        assert recorder.by_peer is asked
    assert recorder.read(clear=False) == {}  # nobody asked here
    recorder.rows = False
    recorder.arrived("dispatch", {0: NOT_MEASURED, 1: 3}, True, 1)
    assert not recorder.by_peer


def inputs_of(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(MOST, 128, generator=generator).bfloat16()
    idx = torch.stack([torch.randperm(EXPERTS, generator=generator)[:RANKS] for _ in range(MOST)])
    return x, idx, torch.rand(MOST, RANKS, generator=generator)


def round_trips(buffer: Any, rank: int) -> list[torch.Tensor]:
    x, idx, weights = inputs_of(rank)
    sent = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=EXPERTS)
    back = buffer.combine(sent.recv_x, sent.handle).combined_x
    quick = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False)
    home = buffer.low_latency_combine(quick.recv_x, idx, weights, quick.handle).combined_x
    return [sent.recv_x, back, home]


OPERATIONS = {"dispatch", "combine", "low_latency_dispatch", "low_latency_combine"}


def come_late(ctx: Any, backend: str) -> tuple[list[bool], Any, Any]:
    """Same bits measured or not; sums of calls to which one rank says that it came late, own and gathered."""
    from unittest import mock

    from deepep import Buffer
    from deepep.runtime.control.waits import WaitRecorder

    with Buffer(ctx.group, low_latency_mode=True, backend=backend) as buffer:
        before = round_trips(buffer, ctx.rank)
        buffer.measure_waits()
        after = round_trips(buffer, ctx.rank)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        buffer.wait_statistics(clear=True)
        with mock.patch.object(WaitRecorder, "busy", lambda self: 10**18 if self.rank == LATE else 7):
            round_trips(buffer, ctx.rank)
        mine, matrix = buffer.wait_statistics(), buffer.gather_wait_statistics(clear=True)
        buffer.measure_waits(False)
        round_trips(buffer, ctx.rank)
        assert buffer.wait_statistics().nanoseconds == {}
    return same, mine, matrix


@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_a_late_rank_is_waited_for_by_the_others(world_of: Any, backend: str) -> None:
    phases = {(operation, "arrive") for operation in OPERATIONS}
    if backend == "reference":
        phases |= {(operation, "rows") for operation in OPERATIONS}
    else:
        phases |= {(operation, "kernels") for operation in OPERATIONS if "latency" in operation}
        phases |= set(KERNEL_WAITS)
    found = world_of(RANKS).run(come_late, backend)
    for rank, (same, mine, matrix) in enumerate(found):
        assert all(same), "measuring changes bits"
        assert {key for key in mine.nanoseconds if key[0] in OPERATIONS} == phases
        for (operation, phase), waited in mine.nanoseconds.items():
            assert torch.equal(matrix.nanoseconds[operation, phase][rank], waited)
            assert waited[rank] == 0
            if phase in ("kernels", "metadata", "digest"):  # of an emulated machine, whose ranks take turns
                assert sum(int(n) for n in waited) > 0
            if phase == ARRIVE:
                assert mine.calls[operation, phase] == 1
                assert [int(n) > 0 for n in waited] == [r == LATE != rank for r in range(RANKS)]
        assert matrix.of("arrive").shape == (RANKS, RANKS)


def test_a_backend_that_measures_nothing_says_so(world_of: Any) -> None:
    def body(ctx: Any) -> None:
        from unittest import mock

        from deepep import Buffer, ModeError
        from deepep.backends.reference.engine import ReferenceEngine

        with (
            Buffer(ctx.group, backend="reference") as buffer,
            mock.patch.object(ReferenceEngine, "waits", return_value=None),
        ):
            for call in (buffer.measure_waits, buffer.wait_statistics, buffer.gather_wait_statistics):
                with pytest.raises(ModeError, match="one that measures waits"):
                    call()

    world_of(1).run(body)


def test_a_rank_may_measure_alone(world_of: Any) -> None:
    def alone(ctx: Any) -> dict[Any, int]:
        from deepep import Buffer

        with Buffer(ctx.group, low_latency_mode=True, backend="reference") as buffer:
            if ctx.rank == 0:
                buffer.measure_waits()
            for _ in range(2):
                round_trips(buffer, ctx.rank)
            return {key: int(waited.sum()) for key, waited in buffer.wait_statistics().nanoseconds.items()}

    found = world_of(RANKS).run(alone)
    assert found[1] == found[2] == {}
    assert any(phase == "rows" for _, phase in found[0])


def fail_while_rows_travel(ctx: Any) -> tuple[str, tuple[int, ...]]:
    """One rank raises where its rows should leave; what each rank raises, and whom it names."""
    from unittest import mock

    from deepep import Buffer, PeerTimeoutError
    from deepep.backends.reference.wire import MeasuredWire

    buffer = Buffer(ctx.group, low_latency_mode=True, backend="reference", timeout=60)
    buffer.measure_waits()
    round_trips(buffer, ctx.rank)
    patch = mock.patch.object(MeasuredWire, "start_all_to_all_rows", side_effect=ZeroDivisionError)
    try:
        if ctx.rank == LATE:
            with patch:
                round_trips(buffer, ctx.rank)
        else:
            round_trips(buffer, ctx.rank)
    except (ZeroDivisionError, PeerTimeoutError) as error:
        record = getattr(error, "record", None)
        return type(error).__name__, () if record is None else record.waited_on
    finally:
        buffer.runtime.abandon()
    return "nothing", ()


def test_a_rank_that_fails_while_rows_travel_is_named(world_of: Any) -> None:
    found = world_of(RANKS).run(fail_while_rows_travel)
    assert found[LATE] == ("ZeroDivisionError", ())
    assert [found[rank] for rank in range(RANKS) if rank != LATE] == 2 * [("PeerTimeoutError", (LATE,))]
