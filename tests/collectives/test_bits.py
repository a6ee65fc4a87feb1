"""All-reduces have the oracle's bits on every rank, whatever the schedule; and a defect shows."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_a_defect_shows(edit: Edit) -> None:
    """In bits; or because a rank raises, or gloo ends a process that is sent what it does not expect."""
    with World(edit.num_ranks, timeout=30.0) as world:
        for first in range(100, 500, 25):
            try:
                outcomes = world.run(failing_when_edited, edit, range(first, first + 25))
            except WorldError:
                return
            if any(outcomes):
                return
    raise AssertionError("no case of 400 shows it")
