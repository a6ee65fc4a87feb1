"""Failures of an exploration, as files: whatever it takes to run one again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepep.sim.cases.case import Case
from deepep.sim.cases.files import CaseError, Fields, check_fields, make_dataclass, read_json
from deepep.sim.emulator.calls import Gpu
from deepep.sim.emulator.shapes import STRATEGIES
from deepep.sim.explore.emulated import run
from deepep.sim.explore.scenarios import RunReport, Scenario, Stop, ThreadSchedule

FORMAT = "deepep.failing-schedule"
#: Fields of a Scenario besides its cases and its GPU.
_SETTINGS = (
    "use_layout",
    "use_barrier",
    "short_slots",
    "num_combines",
    "refuses",
    "between_domains",
    "expands",
)
#: Most cases, and most stops, of a file.
MAX_CASES = 256
_GPU_BOUNDS = {
    "num_blocks": (1, 256),
    "num_threads": (32, 1024),
    "push_blocks": (0, 256),
    "local_blocks": (0, 256),
    "reduce_blocks": (0, 256),
    "num_sms": (0, 256),
    "window": (16, 1 << 20),
    "timeout": (0, 3600),
}


@dataclass(frozen=True)
class Failure:
    """A failure, and all it takes to run it again."""

    scenario: Scenario
    schedule: ThreadSchedule
    stops: tuple[Stop, ...]
    report: RunReport

    def replay(self, kernels: Any = None) -> RunReport:
        return run(self.scenario, self.schedule, stops=self.stops, kernels=kernels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file (JSON) that runs the same anywhere, also when drawing has changed."""
        scenario = self.scenario
        plain = {
            "format": FORMAT,
            "cases": [case.to_plain() for case in scenario.cases],
            "scenario": {name: getattr(scenario, name) for name in _SETTINGS},
            "gpu": asdict(scenario.gpu),
            "schedule": asdict(self.schedule),
            "stops": [asdict(stop) for stop in self.stops],
            "kind": self.report.kind,
            "text": self.report.text.splitlines(),
        }
        Path(path).write_text(json.dumps(plain, indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Failure:
        """Reads what `save` wrote.

        Raises:
            CaseError: the file is something else. It is a ValueError.
            OSError: it cannot be read.
        """
        plain = read_json(path)
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            raise CaseError(f"{path}: not a {FORMAT} file")
        given = Fields(plain, str(path))
        cases = tuple(Case.from_plain(case) for case in given.items("cases", MAX_CASES))
        if not cases or len({case.num_ranks for case in cases}) != 1:
            raise CaseError(f"{path}: cases: allowed: 1 or more, of equally many ranks")
        gpu = make_dataclass(Gpu, given.get("gpu"), "gpu", bounds=_GPU_BOUNDS)
        settings = check_fields(
            Scenario,
            given.get("scenario"),
            "scenario",
            names=_SETTINGS,
            bounds={"num_combines": (0, 64)},
            words={
                "use_layout": ("yes", "no", "only", "inside"),
                "refuses": ("", "dispatch", "combine"),
                "expands": ("", "rows", "weighted"),
            },
        )
        schedule = make_dataclass(
            ThreadSchedule,
            given.get("schedule"),
            "schedule",
            bounds={"seed": (0, 2**63 - 1), "expected_steps": (1, 10**9)},
            words={"strategy": STRATEGIES},
        )
        stops = tuple(make_dataclass(Stop, stop, "stops") for stop in given.items("stops", MAX_CASES))
        report = RunReport(given.text("kind"), "\n".join(map(str, given.items("text", 1 << 16))))
        return Failure(Scenario(cases=cases, gpu=gpu, **settings), schedule, stops, report)
