"""Schedules that failed once, as `python -m deepep explore` saved them. With the bug they failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepep.sim.explore.failures import Failure

SAVED = sorted((Path(__file__).parent / "schedules").glob("*.json"))


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_a_schedule_that_failed_does_not_any_more(path: Path) -> None:
    failure = Failure.load(path)
    assert failure.report.failed
    report = failure.replay()
    assert report.kind == "fault", report.text
