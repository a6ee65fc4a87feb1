"""Ranks that are killed or frozen at any moment: 20 of them, none missed; and a judge with teeth."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from deepep.sim import RandomChoices, Violation, World
from deepep.sim.faults.fault import Effect
from deepep.sim.faults.sudden import STAGES, Ended, SuddenEnd, demand_kept, draw_sudden_end, judge_sudden_end

pytestmark = pytest.mark.alone

RANKS, TIMEOUT = 3, 3.0
AT_ONCE = 2


@pytest.mark.slow
def test_twenty_ends_none_missed() -> None:
    """Several worlds side by side: most of an end is waiting."""
    drawn = [draw_sudden_end(RandomChoices(seed), RANKS) for seed in range(20)]
    ends = [replace(end, stage=STAGES[number % len(STAGES)]) for number, end in enumerate(drawn)]
    assert {end.effect for end in ends} == {Effect.KILL, Effect.STALL}
    worlds = [World(RANKS, store="tcp") for _ in range(AT_ONCE)]

    def series(number: int) -> None:
        for end in ends[number::AT_ONCE]:
            assert len(judge_sudden_end(worlds[number], end, TIMEOUT)) == RANKS - 1

    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            assert list(pool.map(series, range(AT_ONCE))) == [None] * AT_ONCE
    finally:
        for world in worlds:
            world.close()


def test_what_was_not_promised_is_noticed() -> None:
    end = SuddenEnd(Effect.KILL, 1, "dispatch", 0, 0.0)
    good = Ended("dispatch", "PeerTimeoutError", "", (1,), 1.0, True)
    demand_kept(end, 0, good, TIMEOUT)
    demand_kept(end, 0, replace(good, works=None), TIMEOUT)
    masked = Ended("low latency", "", "", (1,), 1.0, True)
    demand_kept(end, 0, masked, TIMEOUT)
    for wrong in (
        replace(masked, stage="dispatch"),
        replace(masked, works=False),
        replace(good, waited_on=(2,)),
        replace(good, waited_on=(1, 2)),
        replace(good, error="MismatchError"),
        replace(good, seconds=60.0),
        replace(good, works=False),
    ):
        with pytest.raises(Violation):
            demand_kept(end, 0, wrong, TIMEOUT)
