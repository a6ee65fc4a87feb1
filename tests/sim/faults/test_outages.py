"""Outages by events against the formulas, where deaths are between steps and times whole numbers of steps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepep.sim.faults.outages import (
    Death,
    OutageCosts,
    load_costs,
    mean_share_going_on,
    mean_share_restarting,
    share_going_on,
    share_restarting,
    spread_deaths,
)

STEP = 0.5  # a power of two: sums of steps are exact
COSTS = OutageCosts(20, STEP, 1.0, 40.0, 20)
sizes = st.integers(2, 200)


@given(ranks=sizes, data=st.data(), gap=st.integers(0, 30), window=st.integers(31, 1000))
def test_some_ranks_at_once(ranks: int, data: st.DataObject, gap: int, window: int) -> None:
    """E = (1 - f) (1 - G / W)."""
    dead = data.draw(st.integers(1, ranks))
    costs, seconds = replace(COSTS, gap_seconds=gap * STEP), window * STEP
    wanted = (1 - dead / ranks) * (1 - gap / window)
    assert share_going_on(costs, ranks, [Death(0.0, dead)], seconds) == pytest.approx(wanted, abs=1e-12)


@given(
    gaps=st.lists(st.integers(10, 50), min_size=1, max_size=5),
    dead=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    gap=st.integers(0, 9),
)
def test_several_events(gaps: list[int], dead: list[int], gap: int) -> None:
    """Between two deaths the ranks that are left have all of the time but a gap."""
    times = list(itertools.accumulate([0, *gaps]))
    deaths = [Death(at * STEP, count) for at, count in zip(times[:-1], dead, strict=False)]
    left = list(itertools.accumulate((-count for count in dead), initial=40))[1:]
    counted = sum(alive * (length - gap) for alive, length in zip(left, gaps, strict=False))
    found = share_going_on(replace(COSTS, gap_seconds=gap * STEP), 40, deaths, times[-1] * STEP)
    assert found == pytest.approx(counted / (40 * times[-1]), abs=1e-12)


@given(
    times=st.lists(st.integers(0, 300), min_size=0, max_size=4, unique=True),
    restart=st.integers(0, 40),
    every=st.integers(1, 30),
    since=st.integers(0, 100),
)
def test_a_restart(times: list[int], restart: int, every: int, since: int) -> None:
    """By a count of half seconds one after the other."""
    costs = replace(COSTS, restart_seconds=restart * STEP, checkpoint_steps=every)
    window, step, most, idle = 400, since, since, 0
    for at in range(window):
        if at in times:
            step, idle = step - step % every, restart
        if idle:
            idle -= 1
            continue
        step += 1
        most = max(most, step)
    found = share_restarting(costs, [Death(at * STEP, 1) for at in times], window * STEP, since=since)
    assert found == pytest.approx((most - since) / window, abs=1e-12)


def test_one_restart_by_the_formula() -> None:
    """1 - (restart + steps made again) / W."""
    found = share_restarting(COSTS, [Death(0.0, 1)], 120.0, since=33)
    assert found == pytest.approx(1 - (40.0 + 13 * STEP) / 120.0, abs=1e-12)
    assert share_restarting(COSTS, [Death(0.0, 1)], 40.0) == 0.0


def test_deaths_inside_a_step_and_inside_a_gap() -> None:
    """A gap is as long wherever it begins; one that is cut short by another death begins anew."""
    for done in (0.0, 0.1, STEP / 2):
        inside = share_going_on(COSTS, 20, [Death(0.0, 1)], 60.0, done)
        assert inside == pytest.approx(0.95 * (1 - 1 / 60))
    twice = share_going_on(COSTS, 20, [Death(0.0, 1), Death(0.5, 1)], 60.0)
    assert twice == pytest.approx(0.9 * (1 - 1.5 / 60))
    late = share_going_on(COSTS, 20, [Death(60.0, 1)], 60.0)
    assert late == 1.0


@given(ranks=st.integers(1, 30), events=st.integers(1, 4))
def test_deaths_are_spread_evenly(ranks: int, events: int) -> None:
    deaths = spread_deaths(ranks, events, 60.0)
    assert sum(death.ranks for death in deaths) == ranks
    assert [death.time for death in deaths] == [60.0 * i / events for i in range(events)]
    assert max(d.ranks for d in deaths) - min(d.ranks for d in deaths) <= 1


def test_means_are_near_the_formulas_of_the_mean() -> None:
    going_on = mean_share_going_on(COSTS, 128, spread_deaths(6, 3, 600.0), 600.0)
    assert going_on == pytest.approx((1 - (6 / 128) * 2 / 3) * (1 - 3 * 1.0 / 600), abs=1e-3)
    again = mean_share_restarting(COSTS, spread_deaths(6, 3, 600.0), 600.0)
    lost = 3 * (40.0 + 9.5 * STEP + STEP / 2)  # steps made again, and the one that was under way
    assert again == pytest.approx(1 - lost / 600, abs=2e-3)


def test_costs_are_kept_in_a_file(tmp_path: Path) -> None:
    COSTS.save(tmp_path / "costs.json")
    assert load_costs(tmp_path / "costs.json") == COSTS
    (tmp_path / "costs.json").write_text("{}")
    with pytest.raises(ValueError, match="step_seconds"):
        load_costs(tmp_path / "costs.json")
