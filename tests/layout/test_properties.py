"""The core against the global-view oracle over drawn routings, edge cases included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepep import layout
from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.cases.strategies import cases
from deepep.sim.rules.layout import FIXED_OPTIONS, check_core

LIMITS = Limits(
    masks=False, fixed=FIXED_OPTIONS
)  # a layout is made of routing alone; masked ranks are the exchange's business
WIDE = replace(LIMITS, ranks=(16, 33, 64), max_local_experts=4, max_topk=32, max_tokens=9)
EVERYTHING = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@EVERYTHING
@given(cases(LIMITS))
def test_core_is_the_oracle(case: Case) -> None:
    check_core(case)


@pytest.mark.parametrize("part", range(4))
def test_core_is_the_oracle_on_a_thousand_seeded_cases(part: int) -> None:
    for number in range(part * 250, part * 250 + 250):
        check_core(draw_case(RandomChoices(f"core {number}"), LIMITS))


@pytest.mark.slow
def test_core_is_the_oracle_with_more_ranks_than_a_warp() -> None:
    for number in range(12):
        check_core(draw_case(RandomChoices(f"wide {number}"), WIDE))


def uniform(num_experts: int, num_topk: int, *num_tokens: int) -> Case:
    rng = np.random.default_rng(sum(num_tokens))
    topk = (rng.integers(-1, num_experts, (tokens, num_topk)) for tokens in num_tokens)
    return Case(num_experts=num_experts, topk_idx=tuple(topk), seed=7)


def constant(num_experts: int, row: list[int], *num_tokens: int) -> Case:
    topk = (np.tile(np.array(row, dtype=np.int64), (tokens, 1)) for tokens in num_tokens)
    return Case(num_experts=num_experts, topk_idx=tuple(topk))


EDGES = {
    "no tokens on one rank": uniform(8, 2, 5, 0, 3, 1),
    "no tokens anywhere": uniform(8, 2, 0, 0, 0, 0),
    "one token": uniform(8, 2, 1, 0),
    "all -1": constant(8, [-1, -1, -1], 3, 2),
    "an expert twice in every token": constant(8, [3, 3, 5, 3], 3, 0, 4, 1),
    "one rank receives everything": constant(8, [6, 7], 4, 5, 6, 7),
    "all choices on one rank": constant(12, [3, 4, 5], 2, 2, 2, 2),
    "one choice on each rank": constant(4, [3, 1, 0, 2], 2, 2, 2, 2),
    "more choices than ranks": uniform(16, 9, 4, 4),
    "one choice": uniform(16, 1, 4, 4, 3, 1),
    "32 choices": uniform(64, 32, 5, 3, 0, 2),
    "one expert a rank": uniform(5, 3, 2, 2, 2, 2, 2),
    "one rank": uniform(4, 3, 6),
    "an odd number of tokens in even parts": uniform(8, 2, 7, 13, 1, 3),
    "a last node that is smaller": uniform(11, 4, *range(11)).with_options(ranks_per_node=4),
    "nodes of one rank": uniform(6, 3, 3, 1, 2).with_options(ranks_per_node=1),
    "more ranks than bits of a mask": uniform(128, 8, *[1, 2] * 32).with_options(ranks_per_node=8),
}


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, dtype: str) -> None:
    check_core(EDGES[name].with_options(idx_dtype=dtype, expert_alignment=8))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.data())
def test_the_result_does_not_depend_on_the_parts(
    num_tokens: int, num_ranks: int, data: st.DataObject
) -> None:
    """Blocks that each count and number their own tokens give what one pass gives, however many there are."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    table = torch.rand(num_tokens, num_ranks, generator=generator) < 0.4
    first = torch.arange(num_ranks) * 1000
    whole = layout.send_rows(table, first)
    num_parts = data.draw(st.integers(2, 2 * num_tokens + 2))
    assert torch.equal(layout.send_rows(table, first, num_parts), whole)
