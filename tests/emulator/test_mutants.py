"""Teeth: every ordering operation of the kernels, weakened or removed, is missed by some schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepep.sim.explore.kernel_mutants import HARMLESS, Mutant, mutants
from deepep.sim.explore.mutant_hunt import Catch, hunt_all, markdown

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.fixture(scope="module")
def all_mutants() -> list[Mutant]:
    return mutants(CSRC)


def test_the_list_of_harmless_ones_is_of_this_source(all_mutants: list[Mutant]) -> None:
    assert set(HARMLESS) <= {mutant.name for mutant in all_mutants}


def test_names_are_unique_and_mutants_differ(all_mutants: list[Mutant]) -> None:
    assert len({mutant.name for mutant in all_mutants}) == len(all_mutants)
    assert len({mutant.text for mutant in all_mutants}) == len(all_mutants)
    assert {m.kind for m in all_mutants} == {
        "order",
        "scope",
        "fence",
        "barrier",
        "wait",
        "proxy fence",
        "bulk group",
        "read-only path",
        "epoch",
        "protocol",
    }


@pytest.mark.slow
def test_all_mutants_are_caught(all_mutants: list[Mutant], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is caught, however busy the machine: most by their first schedules, a few by hundreds."""
    wanted = [mutant for mutant in all_mutants if mutant.name not in HARMLESS]
    catches: list[Catch] = hunt_all(wanted, CSRC, runs=10**6, seconds=240.0, workers=2)
    with capsys.disabled():
        print("\n" + "\n".join(markdown(catches)))
    assert [catch.mutant.name for catch in catches if catch.failure is None] == []
