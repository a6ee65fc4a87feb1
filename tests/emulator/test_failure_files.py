"""Files of failing schedules: what is no failure is refused by name, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepep.sim.cases.files import CaseError
from deepep.sim.explore.failures import Failure

SAVED = sorted((Path(__file__).parent / "schedules").glob("*.json"))


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_a_failure_round_trips(path: Path, tmp_path: Path) -> None:
    failure = Failure.load(path)
    failure.save(tmp_path / "again.json")
    again = Failure.load(tmp_path / "again.json")
    assert (again.schedule, again.stops, again.scenario.gpu) == (
        failure.schedule,
        failure.stops,
        failure.scenario.gpu,
    )
    assert [c.to_json() for c in again.scenario.cases] == [c.to_json() for c in failure.scenario.cases]


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("format",), "else", "not a deepep.failing-schedule"),
        (("cases",), [], "cases"),
        (("gpu", "num_threads"), 10**9, "gpu: num_threads"),
        (("gpu", "num_blocks"), True, "gpu: num_blocks"),
        (("gpu", "timeout"), float("inf"), "not JSON"),
        (("gpu", "speed"), 1, "gpu: got 'speed'"),
        (("schedule", "strategy"), "luck", "schedule: strategy"),
        (("schedule", "seed"), -1, "schedule: seed"),
        (("schedule",), None, "schedule: got None"),
        (("scenario", "refuses"), "[b]", r"scenario: refuses: got '\[b\]'"),
        (("scenario", "use_barrier"), 1, "scenario: use_barrier"),
        (("scenario", "cases"), [], "scenario: got 'cases'"),
        (("stops",), [{"rank": 0}], "stops: .*at"),
        (("stops",), [{"rank": 0, "at": 1.5}], "stops: at"),
        (("text",), "one line", "text"),
    ],
)
def test_a_mangled_failure_is_refused(
    tmp_path: Path, place: tuple[str, ...], value: Any, complaint: str
) -> None:
    plain = json.loads(SAVED[0].read_text())
    inner = plain
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    file = tmp_path / "x.json"
    file.write_text(json.dumps(plain))
    with pytest.raises(CaseError, match=complaint):
        Failure.load(file)
