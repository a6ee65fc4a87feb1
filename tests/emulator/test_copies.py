"""The copy kernels on the emulated machine: the bytes that were sent, under every schedule tried."""

from __future__ import annotations

import pytest

from deepep.sim.explore.copy_runs import CopyCase, draw_copy, explore_copies, run_copy
from deepep.sim.explore.explorer import draw_schedule


@pytest.mark.slow
def test_drawn_copies_arrive() -> None:
    tally = explore_copies(runs=1200)
    failure = tally.failure
    assert failure is None, f"{failure.case} {failure.schedule}\n{failure.report.text}"


@pytest.mark.parametrize("num_bytes", [0, 16, 64, 80, 64 * 3, 64 * 3 + 16, 64 * 40])
@pytest.mark.parametrize("bulk", [False, True])
def test_sizes_around_the_ring(num_bytes: int, bulk: bool) -> None:
    case = CopyCase(num_bytes, num_blocks=2, num_warps=2, bulk=bulk, num_stages=3, stage_bytes=64)
    for seed in range(9):
        report = run_copy(case, draw_schedule(seed))
        assert report.kind == "ok", report.text


def test_a_failure_is_told() -> None:
    """A copy that does not fit: the judge itself."""
    case = draw_copy(0)
    wrong = CopyCase(**{**vars(case), "num_bytes": 64, "stage_bytes": 24})
    report = run_copy(wrong, draw_schedule(0))
    assert report.kind == "misaligned access"
    assert "a bulk copy has 16-byte addresses and sizes" in report.text
