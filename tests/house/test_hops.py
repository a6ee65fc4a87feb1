"""Hops: a public method comes to its launch by few functions of few modules, none of them long.

Counted on stubs of the extension and of torch.cuda, so on any machine: harness/hops.py says what counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from harness.sources import ROOT

MOST_FUNCTIONS, MOST_MODULES, MOST_LINES = 12, 6, 80
OPERATIONS = (
    *("dispatch", "dispatch by top-k", "cached dispatch", "combine"),
    *("low-latency dispatch", "low-latency combine"),
)

Hops = list[tuple[str, str, int]]


@pytest.fixture(scope="module")
def hops() -> dict[str, Hops]:
    done = subprocess.run(
        [sys.executable, "-m", "harness.hops"],
        cwd=ROOT / "tests",
        env={**os.environ, "DEEPEP_SYMMETRIC_BYTES": str(64 << 20)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    counted: dict[str, Hops] = json.loads(done.stdout)
    return counted


@pytest.mark.parametrize("operation", OPERATIONS)
def test_few_functions_of_few_modules(hops: dict[str, Hops], operation: str) -> None:
    entered = hops[operation]
    listing = "\n".join(f"{module}: {name}, {lines} lines" for module, name, lines in entered)
    print(f"{operation}: {len(entered)} functions\n{listing}")
    assert len(entered) <= MOST_FUNCTIONS, listing
    assert len({module for module, _, _ in entered}) <= MOST_MODULES, listing
    assert all(lines <= MOST_LINES for _, _, lines in entered), listing


def test_every_operation_is_counted_to_its_launch(hops: dict[str, Hops]) -> None:
    """The first hop is the public method, the last stands next to the launch: nothing was missed between."""
    assert set(hops) == set(OPERATIONS)
    ends = {
        "dispatch": ("Buffer.dispatch", "deepep/backends/cuda/launch.py"),
        "dispatch by top-k": ("Buffer.dispatch", "deepep/backends/cuda/launch.py"),
        "cached dispatch": ("Buffer.dispatch", "deepep/backends/cuda/memory/pool.py"),
        "combine": ("Buffer.combine", "deepep/backends/cuda/launch.py"),
        "low-latency dispatch": (
            "LowLatencyCalls.low_latency_dispatch",
            "deepep/backends/cuda/low_latency_launch.py",
        ),
        "low-latency combine": (
            "LowLatencyCalls.low_latency_combine",
            "deepep/backends/cuda/low_latency_launch.py",
        ),
    }
    for operation, (first, last) in ends.items():
        entered = hops[operation]
        assert entered[0][1] == first
        assert entered[-1][0] == last, operation
