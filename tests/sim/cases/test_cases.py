"""Cases: drawn from a seed, written and read, made legal; routing patterns; telling values."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from deepep.sim.cases.case import Case, Limits, Window, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.cases.files import CaseError
from deepep.sim.cases.options import SPACE, Coverage, Options
from deepep.sim.cases.routing import PATTERNS, TWISTS, RoutingShape
from deepep.sim.cases.values import decode_id, inputs, other_rows
from deepep.sim.rules.observed import bits

SHAPE = RoutingShape(num_ranks=4, num_experts=12, num_topk=5, num_tokens=(40, 0, 60, 17))


def drawn(count, limits=None):
    return [draw_case(RandomChoices(seed), limits) for seed in range(count)]


def test_the_same_seed_draws_the_same_case_whatever_else_is_drawn():
    first, second = drawn(50), drawn(50)
    assert [c.to_json() for c in first] == [c.to_json() for c in second]
    assert len({c.to_json() for c in first}) == 50


def test_drawn_cases_are_legal_and_within_limits():
    limits = Limits(ranks=(3, 5), max_local_experts=2, max_topk=4, max_tokens=6, hidden=(16, 136))
    for case in drawn(400, limits):
        case.validate()
        assert case.num_ranks in (3, 5)
        assert case.num_local_experts <= 2
        assert case.num_topk <= 4
        assert max(case.num_tokens) <= 6
        assert len(case.members) >= 1
        row_bytes = case.hidden * (2 if case.options.payload == "bf16" or case.options.mode == "ll" else 1)
        assert row_bytes % 16 == 0
        assert case.options.mode == "ht" or case.hidden % 128 == 0
        assert case.options.mode == "ht" or not (case.options.logfmt and case.options.zero_copy)


def test_a_thousand_cases_cover_every_alternative_and_nearly_every_pair():
    coverage = Coverage(SPACE)
    shapes = Counter()
    for case in drawn(1000):
        features = case.features()
        coverage.add(features)
        shapes[features["empty_ranks"], features["tokens"]] += 1
        shapes[features["topk_to_ranks"]] += 1
        shapes["masked", features["masked"]] += 1
    assert not list(coverage.missing())
    assert len(coverage.seen_pairs) > 0.97 * coverage.total_pairs
    for trait in (
        ("none", "equal"),
        ("none", "uneven"),
        ("some", "uneven"),
        ("all", "equal"),
        "K<R",
        "K=R",
        "K>R",
        ("masked", True),
    ):
        assert shapes[trait] > 5, trait


def test_coverage_counts_alternatives_and_pairs_of_its_space():
    coverage = Coverage({"a": (1, 2), "b": (True, False, None)})
    coverage.add({"a": 1, "b": True, "c": 5})
    coverage.add({"a": 2, "b": "outside"})
    assert (len(coverage.seen), coverage.total) == (3, 5)
    assert (len(coverage.seen_pairs), coverage.total_pairs) == (1, 6)
    assert set(coverage.missing()) == {("b", False), ("b", None)}


def test_json_round_trip_to_the_same_bits():
    for case in drawn(100):
        again = Case.from_json(case.to_json())
        assert again.to_json() == case.to_json()
        assert repr(again) == repr(case)
        for rank in range(case.num_ranks):
            a, b = inputs(case, rank), inputs(again, rank)
            assert np.array_equal(bits(a.x), bits(b.x))
            assert a.topk_idx.shape == b.topk_idx.shape


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "else"}, "not a deepep.case"),
        ({"version": 99}, "version"),
        ({"num_experts": 7}, "num_experts"),
        ({"topk_idx": [[[99]], [[0]]]}, "rank 0: topk_idx: entries outside"),
        ({"options": {"topk": "yes"}}, "options: topk"),
        ({"options": {"topk": 1}}, "options: topk"),
        ({"options": {"mode": "[x]"}}, r"options: mode: got '\[x\]'; allowed: ht, ll"),
        ({"options": {"speed": 1}}, "options: got 'speed'"),
        ({"options": {"biases": True}}, "options: biases"),
        ({"options": {"spare_slots": -1}}, "options: spare_slots"),
        ({"options": [1]}, "options: got"),
        ({"topk_idx": [[[0.5]], [[0]]]}, "rank 0: topk_idx"),
        ({"topk_idx": [[[True]], [[0]]]}, "rank 0: topk_idx"),
        ({"topk_idx": [[[0, 1]], [[0]]]}, "rank 0: topk_idx"),
        ({"topk_idx": [[[2**63]], [[0]]]}, "rank 0: topk_idx"),
        ({"topk_idx": [7, [[0]]]}, "rank 0: topk_idx"),
        ({"topk_idx": {}}, "topk_idx: got"),
        ({"num_topk": 0}, "num_topk"),
        ({"num_experts": 4.0}, "num_experts"),
        ({"hidden": 2**40}, "hidden"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"masked": [5]}, "masked"),
        ({"masked": [0, 1]}, "masked"),
        ({"origin": None}, "origin"),
        ({"origin": "x" * 10_000}, "origin"),
        ({"parent": {"case": {}}}, "not a deepep.case"),
    ],
)
def test_files_that_are_no_cases_are_refused(change, complaint):
    case = Case(4, (np.array([[1]]), np.array([[0]])))
    plain = {**json.loads(case.to_json()), **change}
    with pytest.raises(CaseError, match=complaint):
        Case.from_json(json.dumps(plain))


@pytest.mark.parametrize("name", json.loads(Case(1, (np.array([[0]]),)).to_json()))
def test_a_file_that_lacks_a_field_is_refused(name):
    plain = json.loads(Case(1, (np.array([[0]]),)).to_json())
    del plain[name]
    with pytest.raises(CaseError, match=name if name != "format" else "not a deepep.case"):
        Case.from_json(json.dumps(plain))


def test_a_window_of_another_case_round_trips():
    """Relations derive such cases; a finding of one can be saved."""
    whole = Case(4, (np.array([[1], [2], [3]]), np.array([[0], [1]])), seed=5)
    window = Window(whole, (1, 0), (slice(0, 1), slice(1, None)))
    case = Case(4, (np.array([[0]]), np.array([[2], [3]])), parent=window)
    again = Case.from_json(case.to_json())
    assert again.to_json() == case.to_json()
    for rank in range(2):
        assert np.array_equal(bits(inputs(case, rank).x), bits(inputs(again, rank).x))
    plain = json.loads(case.to_json())
    plain["parent"]["tokens"][0] = [0, 2]
    with pytest.raises(CaseError, match="parent: tokens 0 to 2 of rank 1 are not 1"):
        Case.from_json(json.dumps(plain))


def test_token_in_rank_does_not_count_minus_one():
    case = Case(4, (np.array([[-1, -1], [0, 3], [2, 2]]), np.empty((0, 2), dtype=np.int64)))
    assert case.is_token_in_rank(0).tolist() == [[False, False], [True, True], [False, True]]
    assert case.is_token_in_rank(1).shape == (0, 2)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_fill_the_matrix_with_experts(name):
    for seed in range(20):
        matrix = PATTERNS[name](SHAPE, np.random.default_rng(seed))
        assert matrix.shape == (117, 5)
        assert matrix.dtype == np.int64
        assert matrix.min() >= -1
        assert matrix.max() < 12
        for twist in TWISTS.values():
            twisted = twist(matrix, SHAPE, np.random.default_rng(seed))
            assert twisted.shape == matrix.shape
            assert (twisted >= -1).all()


def pattern(name, seed=0, shape=SHAPE):
    return PATTERNS[name](shape, np.random.default_rng(seed))


def test_what_the_patterns_are_named_for():
    owners = {name: pattern(name) // SHAPE.num_local_experts for name in PATTERNS}
    assert all(len(set(row)) == 5 for row in pattern("uniform").tolist())
    assert any(len(set(row)) < 5 for row in pattern("repeated").tolist())
    popularity = np.sort(np.bincount(pattern("zipf").ravel(), minlength=12))
    assert popularity[-1] > 2 * popularity[0]
    assert len(set(pattern("one_expert").ravel()) - {-1}) == 1
    assert len(set(owners["one_rank"].ravel())) == 1
    assert len(set(owners["starved"].ravel()) - {-1}) == 3
    assert (pattern("nothing") == -1).all()
    assert all(len(set(row)) == 1 for row in owners["neighbour"].tolist())
    assert all(len(set(row)) == 4 for row in owners["spread"].tolist())


def test_group_limited_tokens_stay_in_few_groups():
    sizes = set()
    for seed in range(40):
        matrix = pattern("group_limited", seed)
        # Whatever the number of groups was, some split of the experts shows few groups per token.
        for groups in (2, 3, 4, 6, 12):
            used = [len({e // (12 // groups) for e in row if e >= 0}) for row in matrix.tolist()]
            if max(used) < min(groups, 5):
                sizes.add(groups)
    assert {2, 3, 4} <= sizes


def test_more_choices_than_experts():
    shape = RoutingShape(2, 2, 6, (3, 3))
    matrix = pattern("uniform", shape=shape)
    assert all(sorted(row) == [-1, -1, -1, -1, 0, 1] for row in matrix.tolist())


def case_with(**options):
    limits = Limits(ranks=(3,), hidden=(128,), max_tokens=9, fixed={"mode": "ht", **options})
    return next(c for c in drawn(99, limits) if min(c.num_tokens) > 2)


def test_ids_tell_rank_and_token():
    case = case_with(values="ids", payload="bf16")
    rows = [inputs(case, rank).x for rank in range(3)]
    assert sum(map(len, rows)) > 5
    for rank, x in enumerate(rows):
        assert torch.isfinite(x).all()
        for token, row in enumerate(x.view(torch.uint16).numpy()):
            assert decode_id(row) == (rank, token)
    flat = torch.cat([x.view(torch.int16) for x in rows])
    assert len(set(map(tuple, flat[:, 3:].tolist()))) == len(flat)  # not by the first channels alone


def test_weights_tell_rank_token_and_choice():
    case = case_with(values="ids")
    weights = [inputs(case, rank).topk_weights.flatten().tolist() for rank in range(3)]
    everything = [w for rank in weights for w in rank]
    assert len(set(everything)) == len(everything)
    assert 0.0 not in everything


def test_a_second_call_has_other_values_and_the_same_routing():
    for payload in SPACE["payload"]:
        case = case_with(payload=payload, values="ids")
        a, b = inputs(case, 0), inputs(case, 0, again=True)
        assert torch.equal(a.topk_idx, b.topk_idx)
        assert not np.array_equal(bits(a.x), bits(b.x))
        if a.scales is not None:
            assert b.scales is not None
            assert not torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("layout", SPACE["scale_layout"])
@pytest.mark.parametrize("columns", SPACE["scale_columns"])
def test_scales_have_the_strides_they_are_named_for(layout, columns):
    case = case_with(payload="e4m3+float32", scale_layout=layout, scale_columns=columns)
    scales = inputs(case, 0).scales
    tokens = case.num_tokens[0]
    assert scales is not None
    assert scales.shape == (tokens, columns)
    assert torch.isfinite(scales).all()
    assert len(set(scales.flatten().tolist())) == scales.numel()
    strides = {
        "row": (columns, 1),
        "column": (1, tokens),
        "padded": (columns + 3, 1),
        "every_other": (2 * columns, 2),
    }
    assert scales.stride() == strides[layout] or (layout, columns) == ("column", 1)


def test_nonfinite_values_are_among_ordinary_ones():
    limits = Limits(ranks=(2,), hidden=(640,), max_tokens=12, fixed={"mode": "ht", "values": "nonfinite"})
    x = torch.cat([inputs(c, 0).tokens for c in drawn(60, limits)])
    assert x.isnan().any()
    assert x.isinf().any()
    assert ((x == 0) & x.signbit()).any()
    assert 0.9 < x.isfinite().float().mean() < 0.99
    finite = x[x.isfinite() & (x != 0)].abs().float().log2()
    assert finite.max() - finite.min() > 30


def test_expert_rows_differ_by_rank_and_name():
    case = case_with(values="ids")
    rows = {other_rows(case, rank, 4, name).view(torch.int16).numpy().tobytes()
            for rank in range(3) for name in ("a", "b")}  # fmt: skip
    assert len(rows) == 6


def test_options_and_their_space_name_the_same_things():
    assert Options().to_json() == {name: alternatives[0] for name, alternatives in SPACE.items()}
