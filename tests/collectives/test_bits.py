"""All-reduces have the oracle's bits on every rank, whatever the schedule; and a defect shows."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from collectives.edits import EDITS, Edit, failing_when_edited

from deepep.sim import World
from deepep.sim.rules.reductions import failing_reductions
from deepep.sim.worlds.outcomes import WorldError


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_drawn_reductions_have_the_oracles_bits(world_of: Callable[[int], Any], num_ranks: int) -> None:
    """`python -m deepep dp bits` draws a thousand, on up to eight ranks."""
    for failed in world_of(num_ranks).run(failing_reductions, range(40)):
        assert failed == []


@pytest.fixture(scope="module")
def edited_worlds() -> Iterator[dict[int, World]]:
    """By ranks: worlds whose processes run nothing but edited modules."""
    sizes = {edit.num_ranks for edit in EDITS}
    with contextlib.ExitStack() as stack:
        yield {size: stack.enter_context(World(size, timeout=30.0)) for size in sizes}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_a_defect_shows(edited_worlds: dict[int, World], edit: Edit) -> None:
    """In bits; or because a rank raises, or gloo ends a process that is sent what it does not expect."""
    world = edited_worlds[edit.num_ranks]
    for first in range(edit.seed, edit.seed + 400, 4):
        world.ensure_started()
        try:
            outcomes = world.run(failing_when_edited, edit, range(first, first + 4))
        except WorldError:
            return
        if any(outcomes):
            return
    raise AssertionError("no case of 400 shows it")


def test_every_defect_is_one_place_in_a_module() -> None:
    for edit in EDITS:
        assert (
            inspect.getsource(importlib.import_module(f"deepep.collectives.{edit.module}")).count(edit.old)
            == 1
        )


def test_nothing_is_left_of_an_edit(edited_worlds: dict[int, World]) -> None:
    world = edited_worlds[3]
    edit = next(edit for edit in EDITS if edit.num_ranks == 3)
    world.ensure_started()
    assert any(world.run(failing_when_edited, edit, range(100, 116)))
    assert not any(world.run(failing_reductions, range(100, 116)))
