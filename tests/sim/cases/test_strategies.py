"""Hypothesis strategies: what they draw, that they shrink, and that users can take them apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from deepep.sim.cases.case import Limits
from deepep.sim.cases.options import Options
from deepep.sim.cases.routing import RoutingShape
from deepep.sim.cases.strategies import cases, options, routings, shapes, traced_cases
from deepep.sim.rules import oracle
from deepep.sim.rules.properties import SIMPLE
from deepep.trace import TraceWriter

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FIND = settings(
    max_examples=4000,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
)


@QUICK
@given(cases())
def test_the_oracle_keeps_the_properties_on_what_hypothesis_draws(case):
    case.validate()
    views = oracle.observe(case)
    for rule in SIMPLE:
        rule.verify(case, views)


@QUICK
@given(shapes(Limits(ranks=(2, 5), max_topk=3)))
def test_shapes_keep_to_their_limits(shape):
    assert shape.num_ranks in (2, 5)
    assert 1 <= shape.num_topk <= 3
    assert len(shape.num_tokens) == shape.num_ranks


@QUICK
@given(routings(RoutingShape(3, 9, 4, (2, 0, 5)), patterns=["one_rank"]))
def test_routings_of_a_given_shape_and_pattern(topk_idx):
    assert [i.shape for i in topk_idx] == [(2, 4), (0, 4), (5, 4)]
    assert all((i >= -1).all() and (i < 9).all() for i in topk_idx)


@QUICK
@given(options(mode="ll", low_latency="fp8"))
def test_options_can_be_fixed(drawn):
    assert isinstance(drawn, Options)
    assert (drawn.mode, drawn.low_latency) == ("ll", "fp8")


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="colour"):
        find(options(colour="red"), lambda _: True, settings=FIND)


def test_failing_cases_shrink_to_the_point():
    """A defect that needs a duplicate inside a token is shown with little else around it."""

    def has_duplicate(case):
        return any(
            (np.bincount(row[row >= 0]) > 1).any() for i in case.topk_idx for row in i if (row >= 0).any()
        )

    smallest = find(cases(), has_duplicate, settings=FIND)
    # Not always the very smallest: which way hypothesis goes down differs between its versions.
    assert sum(smallest.num_tokens) == 1
    assert smallest.num_topk <= 3
    assert smallest.seed == 0
    assert smallest.options == Options()


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    writer = TraceWriter(num_layers=2, num_ranks=2, num_experts=8, num_topk=2)
    rng = np.random.default_rng(0)
    for step in range(3):
        for layer in range(2):
            # The first choice holds step and layer, so that windows can be recognised.
            chosen = [
                torch.from_numpy(np.stack([np.full(9, 2 * step + layer), rng.integers(0, 8, 9)], axis=1))
                for _ in range(2)
            ]
            writer.add(step, layer, chosen, [torch.ones(9, 2)] * 2)
    writer.finish().save(path)
    return path


def test_windows_of_a_trace(trace_file):
    seen = set()

    @QUICK
    @given(traced_cases(trace_file, Limits(ranks=(1, 2, 3, 4), max_tokens=5)))
    def draw(case):
        case.validate()
        assert (case.num_experts, case.num_topk) == (8, 2)
        assert case.num_ranks in (1, 2, 4)  # 8 experts do not divide among 3
        assert max(case.num_tokens) <= 5
        firsts = {int(i[0]) for indices in case.topk_idx for i in indices}
        assert len(firsts) <= 1  # one layer of one step
        seen.update((case.num_ranks, first) for first in firsts)

    draw()
    assert {ranks for ranks, _ in seen} == {1, 2, 4}
    assert len({first for _, first in seen}) > 1


def test_a_trace_that_fits_no_world_is_refused(trace_file):
    with pytest.raises(ValueError, match="divide among none"):
        find(traced_cases(trace_file, Limits(ranks=(3, 5))), lambda _: True, settings=FIND)


@QUICK
@given(st.data())
def test_strategies_compose_with_others(data):
    shape = data.draw(shapes())
    topk_idx = data.draw(routings(shape))
    assert sum(map(len, topk_idx)) == shape.total_tokens
