"""The comparison with the oracle has teeth: every defect of mutations.py is caught; prints what caught it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepep.sim.rules.layout import PROPERTIES
from deepep.sim.rules.windows import CROSSING_PROPERTIES


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_every_defect_of_the_core_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    script = Path(__file__).with_name("run_mutants.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    sound, *verdicts = map(json.loads, done.stdout.splitlines())
    with capsys.disabled():
        print(f"\n{len(verdicts)} defects of csrc/layout, applied in {time.perf_counter() - began:.0f} s")
        print(f"{'defect':52} {'caught by':28} {'seconds':>7} {'cases':>5}")
        for verdict in verdicts:
            by = verdict["caught_by"] or "NOTHING"
            print(f"{verdict['name']:52} {by:28} {verdict['seconds']:7.3f} {verdict['cases']:5}")
    assert sound["caught_by"] is None, f"the core as it is: {sound['message']}"
    assert len(verdicts) >= 30
    assert [verdict["name"] for verdict in verdicts if verdict["caught_by"] is None] == []
    # A property that catches no defect has not shown that it can fail.
    properties = (*PROPERTIES, *CROSSING_PROPERTIES)
    idle = {holds.__name__ for holds in properties} - {verdict["caught_by"] for verdict in verdicts}
    assert not idle
