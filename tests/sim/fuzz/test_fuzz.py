"""The fuzz loop: a fixed-seed run over everything, how fast it is, and what it does with a failure."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.cases.files import CaseError
from deepep.sim.cases.options import SPACE, Options
from deepep.sim.cases.values import inputs
from deepep.sim.fuzz import subjects
from deepep.sim.fuzz.drawing import as_text, expected_origins, received_origins, save_picture
from deepep.sim.fuzz.fuzzer import DIFFERS, Finding, Fuzzer
from deepep.sim.fuzz.shrinking import shrink, simpler, weight
from deepep.sim.fuzz.stored import StoredExample
from deepep.sim.rules.checking import Property, Violation, always
from deepep.sim.rules.observed import first_difference
from deepep.sim.rules.oracle import observe
from deepep.sim.rules.properties import PROPERTIES, RELATIONS, check

SEED = 20
EXAMPLES = 160


def everything(world_of):
    return [
        subjects.core(),
        subjects.reference(),
        subjects.all_to_all(world_of),
        subjects.buffer(world_of, backend="reference"),
    ]


@pytest.mark.slow
def test_a_fuzz_run_with_a_fixed_seed_finds_nothing(world_of, capsys):
    report = Fuzzer(everything(world_of), seed=SEED, limits=Limits(ranks=(1, 2, 3, 4, 8))).run(
        examples=EXAMPLES
    )
    assert report.finding is None, as_text(report.finding)
    assert report.examples == EXAMPLES
    assert len(report.coverage.seen) > 0.9 * report.coverage.total
    with capsys.disabled():  # docs/simulator.md has figures
        rate = report.examples_per_second
        print(f"\nfuzz: {EXAMPLES} examples on core, oracle, all_to_all and Buffer, {rate:.1f} a second")


def test_buffers_of_both_reductions_are_fuzzed(world_of):
    subject = subjects.buffer(world_of, backend="reference")
    limits = Limits(ranks=(3,), fixed={"mode": "ll", "combine_rows": "other"})
    cases = [subject.adapt(draw_case(RandomChoices(f"sums/{seed}"), limits)) for seed in range(12)]
    drawn = {(case.options.reduce, case.options.topk) for case in cases}
    assert drawn == {(reduce, early) for reduce in ("rank", "token") for early in (False, True)}
    for case, views in zip(cases, subject.observe(cases), strict=True):
        assert first_difference(views, observe(case)) is None
    both = subject.adapt(cases[0].with_options(mode="ht", reduce="token"))
    assert both.options.reduce == "rank", "throughput calls are all on one buffer"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_every_property_holds_on_the_oracle(num_ranks):
    for seed in range(12):
        case = draw_case(RandomChoices(f"{num_ranks}/{seed}"), Limits(ranks=(num_ranks,)))
        check(case, observe)


def test_every_property_has_something_to_say():
    cases = [draw_case(RandomChoices(seed)) for seed in range(300)]
    for rule in PROPERTIES:
        assert sum(rule.applies(case) for case in cases) > 10, rule.name
    assert len({rule.name for rule in PROPERTIES}) == len(PROPERTIES)


def test_relations_hold_between_processes(world_of):
    """All of them, on the all_to_all implementation, not only one in four."""
    subject = subjects.all_to_all(world_of)
    for seed in range(4):
        case = draw_case(
            RandomChoices(f"relations/{seed}"), Limits(ranks=(3,), fixed={"combine_rows": "same"})
        )
        check(case, lambda other: subject.observe([other])[0])


@pytest.mark.slow
def test_a_world_of_four_ranks_runs_hundreds_of_examples(world_of, capsys):
    subject = subjects.all_to_all(world_of)
    fuzzer = Fuzzer([subject], seed=1, limits=Limits(ranks=(4,)))
    fuzzer.run(examples=32)
    report = fuzzer.run(examples=256)
    assert report.finding is None
    with capsys.disabled():  # docs/simulator.md has figures
        rate = report.examples_per_second
        print(f"\nall_to_all against the oracle, 4 rank processes: {rate:.0f} examples a second")
    assert report.examples == 256


# What happens to a failure.


def rows_arrive_backwards(ctx, case):
    """An implementation with a defect: rows arrive in descending order."""
    from deepep.sim.fuzz.all_to_all_runs import run_all_to_all

    view = run_all_to_all(ctx, case)
    if view.recv_x is not None and len(view.recv_x) > 1:
        view.recv_x = view.recv_x[::-1].copy()
    return view


@pytest.fixture
def backwards(world_of):
    return subjects.InWorld("backwards", rows_arrive_backwards, world_of)


def hunt(subject, **kwargs):
    limits = Limits(ranks=(2, 3), masks=0, fixed={"mode": "ht", "values": "ids", "payload": "bf16"})
    # Shrinking ends by itself; a busy machine is not to end it earlier.
    return Fuzzer([subject], limits=limits, shrink_seconds=600, **kwargs).run(examples=64).finding


def test_a_failure_is_shrunk_saved_drawn_and_replayed(backwards, tmp_path):
    finding = hunt(backwards)
    assert finding is not None
    assert finding.rule == "rows are in source order"
    case = finding.case
    assert len(finding.cases) == 1
    assert case.num_ranks == 1
    assert case.num_tokens == (2,)
    assert [i.tolist() for i in case.topk_idx] == [[[0], [0]]]
    plain = {n: v for n, v in case.options.to_json().items() if v != SPACE[n][0]}
    assert plain == {}

    text = as_text(finding)
    assert "rows are in source order" in text
    assert "expected token 0 of rank 0, got token 1 of rank 0" in text
    assert "row" in text
    save_picture(finding, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    StoredExample.of(finding).save(tmp_path / "failure.json")
    stored = StoredExample.load(tmp_path / "failure.json")
    assert (stored.subject, stored.rule) == ("backwards", finding.rule)
    again = Fuzzer([backwards]).replay(stored.cases, stored.rule)
    assert again is not None
    assert (again.rule, again.message) == (finding.rule, finding.message)
    assert Fuzzer([subjects.reference()]).replay(stored.cases) is None


def test_the_same_seed_finds_the_same_failure(backwards):
    first, second = hunt(backwards, seed=3), hunt(backwards, seed=3)
    assert first is not None
    assert second is not None
    assert first.case.to_json() == second.case.to_json()


def test_an_error_in_a_rank_is_located_and_shrunk():
    def fails_on_duplicates(ctx, case):
        for row in case.topk_idx[ctx.rank]:
            if len(set(row[row >= 0])) < len(row[row >= 0]):
                raise KeyError("duplicate")
        return subjects.RankView()

    finding = hunt(subjects.InWorld("touchy", fails_on_duplicates))
    assert finding is not None
    assert finding.rule == "KeyError"
    assert finding.case.num_tokens == (1,)
    assert finding.case.topk_idx[0].tolist() == [[0, 0]]


def test_a_failure_that_needs_the_examples_before_it_keeps_them():
    def third_call_fails(ctx, case):
        ctx.scratch["calls"] = ctx.scratch.get("calls", 0) + 1
        if ctx.scratch["calls"] == 3:
            raise KeyError("third")
        return subjects.RankView()

    subject = subjects.InWorld("tired", third_call_fails)
    finding = hunt(subject, relations=())
    assert finding is not None
    assert finding.rule == "KeyError"
    assert len(finding.cases) >= 3
    again = Fuzzer([subject]).replay(finding.cases)
    assert again is not None
    assert len(again.cases) == 3
    subject.close()


def fails_on_derived_examples(ctx, case):
    """As a backend that ends in the second of two examples."""
    from deepep.sim.fuzz.all_to_all_runs import run_all_to_all

    if case.parent is not None and ctx.rank == 0:
        raise KeyError("derived")
    return run_all_to_all(ctx, case)


def test_a_failure_of_a_derived_example_is_shrunk_saved_and_replayed(tmp_path):
    subject = subjects.InWorld("touchy", fails_on_derived_examples)
    finding = hunt(subject)
    assert finding is not None
    assert finding.rule == "KeyError"
    assert len(finding.cases) == 1
    assert finding.case.parent is not None
    assert sum(int((indices >= 0).sum()) for indices in finding.case.topk_idx) == 0
    StoredExample.of(finding).save(tmp_path / "failure.json")
    stored = StoredExample.load(tmp_path / "failure.json")
    again = Fuzzer([subject]).replay(stored.cases, stored.rule)
    subject.close()
    assert again is not None
    assert again.rule == finding.rule


def test_a_derived_example_that_fails_by_itself_is_shrunk_like_any_other():
    def has_tokens(case):
        return sum(case.num_tokens) > 0

    case = draw_case(RandomChoices(2), Limits(ranks=(2,), max_tokens=4))
    for relation in RELATIONS:
        if relation.applies(case):
            for derived in relation.derive(case):
                if sum(derived.num_tokens):
                    smallest = shrink(derived, has_tokens, seconds=600)
                    assert (smallest.parent, smallest.num_ranks, sum(smallest.num_tokens)) == (None, 1, 1)


def test_what_is_simpler_than_a_derived_example_has_inputs():
    for seed in range(12):
        case = draw_case(RandomChoices(seed), Limits(max_tokens=4, max_topk=3))
        for relation in RELATIONS:
            for derived in relation.derive(case) if relation.applies(case) else ():
                for candidate in islice(simpler(derived), 40):
                    for rank in range(candidate.num_ranks):
                        given = inputs(candidate, rank)
                        assert given.x.shape == (candidate.num_tokens[rank], candidate.hidden)
                        shape = candidate.topk_idx[rank].shape
                        assert given.topk_idx.shape == given.topk_weights.shape == shape
                        assert len(given.biases) == candidate.options.biases


def test_a_hang_is_a_finding():
    def hangs(ctx, case):
        if ctx.rank == 0 and len(case.topk_idx[0]) > 1:
            time.sleep(60)
        return subjects.RankView()

    subject = subjects.InWorld("sleepy", hangs, timeout=0.5)
    fuzzer = Fuzzer([subject], limits=Limits(ranks=(2,)), shrink_seconds=4, relations=())
    finding = fuzzer.run(examples=32).finding
    subject.close()
    assert finding is not None
    assert finding.rule == "WorldTimeout"
    assert "rank 0 still running" in finding.message
    assert finding.case.num_tokens[0] >= 2


def test_a_property_of_ones_own_is_checked():
    def nobody_gets_five_rows(case, views):
        for rank, view in enumerate(views):
            if view.recv_x is not None and len(view.recv_x) >= 5:
                raise Violation(f"rank {rank}: {len(view.recv_x)} rows", rank)

    rule = Property("nobody gets five rows", always, nobody_gets_five_rows)
    fuzzer = Fuzzer([subjects.reference()], rules=[rule], limits=Limits(ranks=(1, 2)), shrink_seconds=600)
    finding = fuzzer.run().finding
    assert finding is not None
    assert finding.rule == "nobody gets five rows"
    assert sum(finding.case.num_tokens) == 5


# Shrinking and drawing by themselves.


def test_simpler_cases_are_legal_and_simpler():
    for seed in range(40):
        case = draw_case(RandomChoices(seed), Limits(max_tokens=4, max_topk=3))
        for candidate in simpler(case):
            candidate.validate()
            assert candidate.to_json() == replace(candidate.legal(), origin=case.origin).to_json()
            assert weight(candidate) < weight(case)


def test_shrinking_ends_at_the_smallest_case_that_fails():
    cases = (draw_case(RandomChoices(seed), Limits(ranks=(8,), max_tokens=12)) for seed in range(99))
    case = next(c for c in cases if sum(c.num_tokens) > 20)
    smallest = shrink(case, lambda c: sum(c.num_tokens) >= 3, seconds=30)
    assert (smallest.num_ranks, smallest.num_tokens, smallest.num_topk) == (1, (3,), 1)
    assert smallest.options == Options()
    assert shrink(case, lambda c: False).to_json() == case.to_json()


def test_shrinking_keeps_to_its_time():
    case = draw_case(RandomChoices(4), Limits(ranks=(8,)))
    tried = []
    shrink(case, lambda c: bool(time.sleep(0.05) or tried.append(c)), seconds=0.5)
    assert 1 <= len(tried) <= 11


def test_received_rows_are_recognised():
    case = Case(4, (np.array([[0, 3], [1, -1]]), np.array([[2, 0]])), hidden=16)
    views = observe(case)
    assert expected_origins(case, 0) == [(0, 0), (0, 1), (1, 0)]
    assert received_origins(case, 0, views) == [(0, 0), (0, 1), (1, 0)]
    assert views[0].recv_x is not None
    views[0].recv_x = views[0].recv_x[[2, 1]]
    assert received_origins(case, 0, views) == [(1, 0), (0, 1)]
    views[0].recv_x[0] = 0
    assert received_origins(case, 0, views) == [None, (0, 1)]
    text = as_text(Finding("buffer", DIFFERS, "rank 0: recv_x", (case,), views))
    assert "contents of no token" in text
    assert "no row" in text
    low = case.with_options(mode="ll").legal()
    assert received_origins(low, 1, observe(low)) == [(1, 0), (0, 0)]


def test_files_of_other_kinds_are_refused(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"format": "deepep.failing-example", "version": 2}')
    with pytest.raises(ValueError, match="version: got 2"):
        StoredExample.load(file)
    case = Case(1, (np.array([[0]]),))
    file.write_text(case.to_json())
    assert StoredExample.load(file).cases[0].to_json() == case.to_json()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cases": []}, "cases"),
        ({"cases": {}}, "cases"),
        ({"cases": [1]}, "case: got 1"),
        ({"subject": 3}, "subject"),
        ({"version": "1"}, "version"),
    ],
)
def test_mangled_examples_are_refused(tmp_path, change, complaint):
    file = tmp_path / "x.json"
    StoredExample("oracle", "rule", "message", (Case(1, (np.array([[0]]),)),)).save(file)
    assert StoredExample.load(file).subject == "oracle"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CaseError, match=complaint):
        StoredExample.load(file)
