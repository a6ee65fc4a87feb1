"""Relations between examples notice what no single example shows."""

from __future__ import annotations

import numpy as np
import pytest

from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.cases.values import inputs
from deepep.sim.rules.checking import Violation
from deepep.sim.rules.observed import RankView
from deepep.sim.rules.oracle import observe
from deepep.sim.rules.properties import RELATIONS

LIMITS = Limits(ranks=(2, 3), fixed={"combine_rows": "same", "values": "ids", "payload": "bf16"})


def rank_zero_is_special(case: Case, views: list[RankView]) -> None:
    if views[0].combined_x is not None:
        views[0].combined_x = views[0].combined_x ^ 1


def expert_zero_is_special(case: Case, views: list[RankView]) -> None:
    for view in views:
        counts = view.expert_counts if case.options.mode == "ht" else view.recv_count
        if counts is not None and len(counts):
            counts[0] += 1


def the_last_of_an_odd_number_is_lost(case: Case, views: list[RankView]) -> None:
    for view in views:
        if view.combined_x is not None and len(view.combined_x) % 2:
            view.combined_x[-1] = 0


def lateness_shows(case: Case, views: list[RankView]) -> None:
    if case.options.skew == "all":
        rank_zero_is_special(case, views)


def narrow_indices_wrap(case: Case, views: list[RankView]) -> None:
    if case.options.idx_dtype == "int32":
        expert_zero_is_special(case, views)


DEFECTS = {
    "renaming ranks commutes": rank_zero_is_special,
    "renaming experts commutes": expert_zero_is_special,
    "splitting a batch changes nothing": the_last_of_an_odd_number_is_lost,
    "timing changes nothing": lateness_shows,
    "index type changes nothing": narrow_indices_wrap,
}


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_a_relation_notices(relation):
    defect = DEFECTS[relation.name]

    def defective(case: Case) -> list[RankView]:
        views = observe(case)
        defect(case, views)
        return views

    def fails(case: Case) -> bool:
        if not relation.applies(case):
            return False
        assert relation.derive is not None
        others = relation.derive(case)
        relation.verify(
            case, observe(case), [observe(other) for other in others]
        )  # without the defect: holds
        try:
            relation.verify(case, defective(case), [defective(other) for other in others])
        except Violation:
            return True
        return False

    assert any(fails(draw_case(RandomChoices(seed), LIMITS)) for seed in range(60))


def test_derived_cases_hold_the_values_of_their_parent():
    case = next(c for seed in range(99) if min((c := draw_case(RandomChoices(seed), LIMITS)).num_tokens) > 2)
    by_name = {relation.name: relation for relation in RELATIONS}
    split = by_name["splitting a batch changes nothing"].derive
    rename = by_name["renaming ranks commutes"].derive
    assert split is not None
    assert rename is not None
    for rank in range(case.num_ranks):
        whole = inputs(case, rank)
        halves = [inputs(half, rank) for half in split(case)]
        assert np.array_equal(np.concatenate([h.topk_idx.numpy() for h in halves]), whole.topk_idx.numpy())
        for field in ("x", "tokens", "topk_weights"):
            parts = [getattr(half, field).float() for half in halves]
            assert np.array_equal(np.concatenate(parts), getattr(whole, field).float().numpy())
    [renamed] = rename(case)
    assert renamed.parent is not None
    for new, old in enumerate(renamed.parent.ranks):
        moved, original = inputs(renamed, new).x, inputs(case, old).x
        assert np.array_equal(moved.float().numpy(), original.float().numpy())
