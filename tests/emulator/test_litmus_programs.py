"""Rules of bulk copies, mbarriers, the async proxy and puts: kept, nothing fails; broken, it is caught."""

from __future__ import annotations

import pytest

from deepep.sim.explore.litmus import PROGRAMS, Program

KEPT = [(program, variant) for program in PROGRAMS for variant in (0, *program.right)]
BROKEN = [(program, variant) for program in PROGRAMS for variant in program.wrong]


def name(value: object) -> str:
    return value.kernel if isinstance(value, Program) else str(value)


@pytest.mark.parametrize(("program", "variant"), KEPT, ids=name)
def test_nothing_fails_where_the_rule_is_kept(program: Program, variant: int) -> None:
    assert program.litmus(variant).first_failure(150) is None


@pytest.mark.parametrize(("program", "variant"), BROKEN, ids=name)
def test_what_breaks_the_rule_is_caught(program: Program, variant: int) -> None:
    assert program.litmus(variant).first_failure(100) is not None


def test_the_bugs_this_field_has_published_are_among_them() -> None:
    published = {program.wrong[program.published] for program in PROGRAMS if program.published is not None}
    assert published >= {
        "a missing proxy fence before a stage is reloaded",
        "a missing system release between bulk stores and the barrier's signal",
        "a stage reused before its store was read (stages - 1 groups pending)",
        "a parity flag with no generation that accepts a stale signal",
        "a slot cleaned while a late write is in flight",
    }
