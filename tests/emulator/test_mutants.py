"""Teeth: every ordering operation of the kernels, weakened or removed, is missed by some schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepep.sim.explore.kernel_mutants import HARMLESS, Mutant, mutants
from deepep.sim.explore.mutant_hunt import FIRST_SEEDS, Catch, hunt_all, markdown
from deepep.sim.explore.mutant_library import can_share, with_choices

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.fixture(scope="module")
def all_mutants() -> list[Mutant]:
    return mutants(CSRC)


def test_the_list_of_harmless_ones_is_of_this_source(all_mutants: list[Mutant]) -> None:
    assert set(HARMLESS) | set(FIRST_SEEDS) <= {mutant.name for mutant in all_mutants}


def test_what_is_not_chosen_is_the_source(all_mutants: list[Mutant]) -> None:
    """In a library of many mutants, each is the file with its own change, whatever else is mutated there."""
    changed = 0
    for file in {mutant.file for mutant in all_mutants if can_share(mutant)}:
        there = [mutant for mutant in all_mutants if mutant.file == file and can_share(mutant)]
        text = (CSRC / file).read_text()
        shared = with_choices(text, there, {m.name: n for n, m in enumerate(there, start=1)}.__getitem__)
        assert _choose(shared, 0) == text
        for number, mutant in enumerate(there, start=1):
            assert _choose(shared, number).replace("static_cast<void>(0);", "") == mutant.text
            changed += 1
    assert changed > 200


def _choose(text: str, number: int) -> str:
    """Makes the choices in a text, as a compiler does."""
    while (start := text.find("(::chosen_mutant == ")) >= 0:
        alternatives, at = [], start + 1
        while text.startswith("::chosen_mutant == ", at):
            question = text.index(" ? ", at)
            colon = _end_of_alternative(text, question + 3)
            alternatives.append((int(text[at:question].split()[-1]), text[question + 3 : colon]))
            at = colon + len(" : ")
        end = _end_of_alternative(text, at)
        chosen = dict(alternatives).get(number, text[at:end])
        text = text[:start] + chosen + text[end + 1 :]
    return text


def _end_of_alternative(text: str, at: int) -> int:
    """Finds the " : " or the closing parenthesis of a choice, behind whatever is nested in between."""
    depth = 0
    while depth or not (text[at] == ")" or text.startswith(" : ", at)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        at += 1
    return at


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
        "signal",
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
