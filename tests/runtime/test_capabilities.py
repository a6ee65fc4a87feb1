"""Compute capabilities: which code runs on which GPU, by CUDA's rules."""

from __future__ import annotations

import pytest

from deepep.runtime.capabilities import can_run


@pytest.mark.parametrize(
    ("arch", "runs", "does_not"),
    [
        ("9.0a", [(9, 0)], [(8, 0), (8, 9), (10, 0)]),
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("10.0a", [(10, 0)], [(9, 0), (10, 3), (12, 0)]),
        ("8.0+PTX", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
    ],
)
def test_code_runs_on_these_gpus_and_on_no_other(
    arch: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    for archs in ([arch], ["6.0", arch]):
        assert all(can_run(capability, archs) for capability in runs)
        assert not any(can_run(capability, archs) for capability in does_not)


def test_ranks_of_all_three_generations_run_one_installation() -> None:
    archs = ["8.0", "9.0a", "10.0a"]
    assert all(can_run(capability, archs) for capability in [(8, 0), (9, 0), (10, 0)])
    assert not can_run((9, 0), [])
