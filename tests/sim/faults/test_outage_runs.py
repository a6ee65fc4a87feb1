"""Runs that lose ranks: the numbers of a run's times, and a small run of this library's."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepep.sim.faults.outage_runs import SKIPPED, OutageRun, _steps_of, go_on, steps_before


def run_of(gap: float, left: int) -> OutageRun:
    """10 ranks, steps of 0.5 s; ranks die in the middle of the step that begins at 10 s."""
    before = [(number, 0.5 * (number + 1), 10) for number in range(20)]
    after = [(20 + i, 10.5 + gap + 0.5 * i, left) for i in range(300)]
    return OutageRun(10, 10.25, before + after)


def test_numbers_of_a_run() -> None:
    run = run_of(1.0, 9)
    assert run.step_seconds == pytest.approx(0.5)
    assert run.gap == pytest.approx(1.0)
    assert run.share(60.0) == pytest.approx(0.9 * (60.0 - 1.0) / 60)
    assert run.share(60.1) == pytest.approx(0.9 * (60.1 - 1.0) / 60.1)
    assert run.slowdown(60.0) == pytest.approx(1.0)
    assert run_of(70.0, 10).share(60.0) == 0.0
    assert run_of(0.0, 10).share(60.0) == pytest.approx(1.0)
    assert run_of(50.0, 10).share(60.2) == pytest.approx(10.2 / 60.2)


def test_steps_that_are_made_again_count_once(tmp_path: Path) -> None:
    lines = ["0 1.0", "1 2.0", "2 3.0", "1 9.0", "2 10.0", "3 11.0"]
    (tmp_path / "steps").write_text("\n".join(lines) + "\n4 1")  # the last line is being written
    assert _steps_of(tmp_path / "steps", 7) == [(0, 1.0, 7), (1, 2.0, 7), (2, 3.0, 7), (3, 11.0, 7)]
    assert _steps_of(tmp_path / "none", 7) == []


def test_a_run_goes_on_without_one_of_its_ranks(tmp_path: Path) -> None:
    run = go_on(3, 1, 0.05, 0.2, 0.3, tmp_path)
    last = steps_before(0.05, 0.2)
    assert last == SKIPPED + 4
    numbers, times, members = zip(*run.steps, strict=True)
    assert list(numbers) == list(range(len(numbers)))
    assert list(times) == sorted(times)
    whole = members.count(3)  # by a late timer the rank may have been through its step
    assert list(members) == [3] * whole + [2] * (len(numbers) - whole)
    assert last <= whole < len(numbers)
    assert times[last - 1] < run.died < times[whole]
