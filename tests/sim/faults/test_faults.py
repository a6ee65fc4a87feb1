"""Faults on Buffer: drawn ones, a hundred in a row, each ending as promised within its deadline."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deepep.sim import Status, World
from deepep.sim.cases.case import Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.faults.fault import (
    CHANGES,
    Effect,
    Fault,
    FaultyBuffer,
    LeftOut,
    calls_of,
    draw_fault,
    freeze_process,
)
from deepep.sim.faults.judge import draw_faulty_examples, judge_fault
from deepep.sim.rules.checking import Violation

pytestmark = pytest.mark.alone

RANKS = 3
RUNS = 100
AT_ONCE = 4
#: Seconds a buffer waits here. Stalls take this and more; a busy machine must not reach it by itself.
TIMEOUT = 3.0


class Recorder:
    """Stands for a buffer: notes what was called with what."""

    def __init__(self):
        self.calls = []
        self.observer = None
        self.runtime = self
        self.rank = 1

    def observe(self, observer):
        self.observer = observer

    def dispatch(self, x, handle=None, expert_alignment=1):
        for phase in ("control", "payload"):
            if self.observer:
                self.observer("dispatch", phase)
        self.calls.append(("dispatch", x, handle, expert_alignment))
        return x

    def combine(self, x, handle):
        self.calls.append(("combine", x, handle))
        return x


def test_a_buffer_without_a_fault_is_passed_through():
    recorder = Recorder()
    buffer = FaultyBuffer(recorder, None)
    assert buffer.dispatch(1, handle=2) == 1
    assert buffer.combine(3, 4) == 3
    assert buffer.rank == 1
    assert recorder.calls == [("dispatch", 1, 2, 1), ("combine", 3, 4)]


def test_a_call_is_left_out_repeated_or_changed():
    recorder = Recorder()
    buffer = FaultyBuffer(recorder, Fault(Effect.SKIP, 0, call=1))
    buffer.dispatch(1)
    with pytest.raises(LeftOut):
        buffer.combine(2, 3)
    buffer.combine(4, 5)
    assert [c[:2] for c in recorder.calls] == [("dispatch", 1), ("combine", 4)]

    recorder = Recorder()
    FaultyBuffer(recorder, Fault(Effect.REPEAT, 0, call=0)).combine(6, 7)
    assert recorder.calls == [("combine", 6, 7)] * 2

    recorder = Recorder()
    changed = FaultyBuffer(recorder, Fault(Effect.CHANGE, 0, call=0, change="an alignment of zero"))
    changed.dispatch(8, None, 128)
    changed.dispatch(9, None, 128)
    assert recorder.calls == [("dispatch", 8, None, 0), ("dispatch", 9, None, 128)]


@pytest.mark.parametrize("phase", ["", "payload"])
def test_a_delay_strikes_once_and_where_it_should(phase):
    recorder = Recorder()
    buffer = FaultyBuffer(recorder, Fault(Effect.DELAY, 0, call=1, phase=phase, seconds=0.2))
    for expected in (False, True, False):
        begun = time.monotonic()
        buffer.dispatch(1)
        assert (time.monotonic() - begun >= 0.2) is expected


def test_drawn_faults_fit_their_examples():
    seen = Counter()
    for seed in range(300):
        choices = RandomChoices(seed)
        cases, fault = draw_faulty_examples(choices, RANKS, timeout=TIMEOUT)
        calls = [name for case in cases for name in calls_of(case)]
        assert 0 <= fault.rank < RANKS
        assert 0 <= fault.call < len(calls)
        if fault.effect is Effect.CHANGE:
            assert CHANGES[fault.change].operation == calls[fault.call]
        assert fault.seconds < TIMEOUT / 2
        seen[fault.effect, fault.phase] += 1
    assert {effect for effect, _ in seen} == set(Effect)
    assert {phase for _, phase in seen} == {"", "control", "payload", "send", "receive"}


def example(**options):
    limits = Limits(ranks=(RANKS,), max_tokens=4, hidden=(128,), masks=0, fixed=options)
    return draw_case(RandomChoices(5), limits)


def test_the_judge_is_not_content_with_a_fault_that_does_not_strike():
    cases = [example(mode="ht", skew="none")]
    with World(RANKS) as world, pytest.raises(Violation, match="did not strike"):
        judge_fault(world, cases, Fault(Effect.KILL, 1, call=9), TIMEOUT)


def test_the_judge_notices_an_error_too_many():
    cases = [example(mode="ht", skew="none")]
    with World(RANKS) as world, pytest.raises(Violation, match="PeerTimeoutError"):
        judge_fault(world, cases, Fault(Effect.DELAY, 1, call=0, seconds=1.5), 0.5)


def test_a_frozen_rank_is_not_awaited(world_of):
    def freeze(ctx):
        if ctx.rank == 1:
            Fault(Effect.STALL, 1, 0).strike()
        return ctx.rank

    begun = time.monotonic()
    outcomes = world_of(2).try_run(freeze, timeout=30, not_awaited=(1,))
    assert time.monotonic() - begun < 25  # not the time-out
    assert [o.status for o in outcomes] == [Status.RETURNED, Status.HUNG]


def test_a_fault_repeats_from_its_seed():
    first = draw_faulty_examples(RandomChoices("x"), RANKS, timeout=TIMEOUT)
    second = draw_faulty_examples(RandomChoices("x"), RANKS, timeout=TIMEOUT)
    assert first[1] == second[1] == draw_again("x")
    assert [c.to_json() for c in first[0]] == [c.to_json() for c in second[0]]


def draw_again(seed):
    choices = RandomChoices(seed)
    cases, fault = draw_faulty_examples(choices, RANKS, timeout=TIMEOUT)
    assert draw_fault(choices, cases, timeout=TIMEOUT)  # the source goes on: another fault of the same kind
    return fault


@pytest.mark.slow
def test_a_hundred_faults_in_a_row_end_as_promised(capsys):
    """Several worlds side by side: most of a fault is waiting."""
    worlds = [World(RANKS) for _ in range(AT_ONCE)]

    def series(number):
        longest, effects = 0.0, Counter()
        for run in range(number, RUNS, AT_ONCE):
            cases, fault = draw_faulty_examples(RandomChoices(f"soak/{run}"), RANKS, timeout=TIMEOUT)
            begun = time.monotonic()
            judge_fault(worlds[number], cases, fault, TIMEOUT)
            longest = max(longest, time.monotonic() - begun)
            effects[fault.effect.value] += 1
        return longest, effects

    begun = time.monotonic()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = list(pool.map(series, range(AT_ONCE)))
    finally:
        for world in worlds:
            world.close()
    effects = sum((e for _, e in results), Counter())
    assert effects.total() == RUNS
    with capsys.disabled():
        counts = ", ".join(f"{count} {effect}" for effect, count in sorted(effects.items()))
        longest = max(seconds for seconds, _ in results)
        seconds = time.monotonic() - begun
        print(f"\n{RUNS} faults ({counts}) in {seconds:.1f} s, the longest {longest:.1f} s")


def freeze_beside(shown: Any, freeze: Any) -> None:
    """A thread that is not the first freezes this process, and notes whether it ran on. The first has no turn
    on their one processor before the other waits.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ready = threading.Event()

    def strike() -> None:
        ready.wait()
        time.sleep(0.05)
        shown[0] = 1
        freeze()
        shown[1] = 1

    thread = threading.Thread(target=strike)
    thread.start()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    ready.set()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_who_freezes_does_nothing_more() -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        shown = context.Array("i", 2, lock=False)
        process = context.Process(target=freeze_beside, args=(shown, freeze_process))
        process.start()
        assert process.pid is not None
        try:
            while (state := _state_of(process.pid)) != "T":
                assert state not in "ZX", "it has ended"
                time.sleep(0.001)
            assert list(shown) == [1, 0]
        finally:
            process.kill()
            process.join()


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
