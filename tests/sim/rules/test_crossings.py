"""Two levels deliver what one does, and a token crosses to a domain once: counted on the reference's wire."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepep.gate import group_limited_topk
from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.cases.options import Options
from deepep.sim.fuzz import subjects
from deepep.sim.fuzz.fuzzer import Fuzzer
from deepep.sim.rules.checking import Violation
from deepep.sim.rules.crossings import CROSSINGS, crossing_tokens, gateway_of
from deepep.sim.rules.oracle import observe
from deepep.sim.rules.properties import check

BETWEEN_DOMAINS = {"mode": "ht", "reduce": "domain"}


def test_two_hops_give_what_the_global_view_says(world_of):
    limits = Limits(ranks=(3, 4, 5), hidden=(16, 128), masks=0.3, fixed=BETWEEN_DOMAINS)
    running = [subjects.all_to_all(world_of), subjects.buffer(world_of, backend="reference")]
    report = Fuzzer(running, seed=4, limits=limits).run(examples=24, shrink=False)
    assert report.finding is None, report.finding
    assert report.examples == 24


def test_drawn_cases_have_several_domains():
    drawn = [draw_case(RandomChoices(seed), Limits(ranks=(4, 8))) for seed in range(300)]
    apart = [case for case in drawn if case.sums_by_domain]
    assert {len(case.domains) for case in apart} >= {2, 3, 4, 8}
    assert any(case.masked for case in apart)
    assert any(len(case.domains[-1]) < len(case.domains[0]) for case in apart)


def test_the_rules_hold_of_the_oracle():
    limits = Limits(ranks=(3, 4, 8), hidden=(16,), masks=0.3, fixed=BETWEEN_DOMAINS)
    for seed in range(40):
        check(draw_case(RandomChoices(seed), limits), observe)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_group_limited_gate_bounds_the_domains_crossed(world_of, kept):
    num_ranks, per_domain, num_experts, tokens = 4, 1, 16, 24
    logits = torch.randn(num_ranks * tokens, num_experts, generator=torch.Generator().manual_seed(kept))
    routing = group_limited_topk(logits, 4, num_groups=num_ranks // per_domain, num_kept_groups=kept)
    options = Options(mode="ht", reduce="domain", ranks_per_node=per_domain, topk=False)
    case = Case(num_experts, tuple(routing.topk_idx.view(num_ranks, tokens, -1).numpy()), 64, options=options)
    [views] = subjects.all_to_all(world_of).observe([case])
    record = 2 * case.hidden + 4 + per_domain  # row, source token, which ranks
    for rank, view in enumerate(views):
        own = crossing_tokens(case, masked_out=False)[rank, rank // per_domain]
        crossed = view.dispatch_crossing
        assert crossed is not None
        assert 0 < int(crossed.sum()) <= (kept * tokens - own) * record
    for rule in CROSSINGS:
        rule.verify(case, views)


def test_one_more_token_on_the_wire_is_seen(world_of):
    idx = np.array([[0, 3], [1, 2], [3, -1]])
    options = Options(mode="ht", reduce="domain", ranks_per_node=2)
    case = Case(4, (idx, idx, idx, idx), 64, options=options)
    [views] = subjects.all_to_all(world_of).observe([case])
    for rule, field in zip(CROSSINGS, ("dispatch_crossing", "combine_crossing"), strict=True):
        rule.verify(case, views)
        getattr(views[1], field)[1] += 2
        with pytest.raises(Violation, match="rank 1"):
            rule.verify(case, views)


def test_gateways_have_the_sources_local_index():
    idx = np.zeros((1, 1), dtype=np.int64)
    case = Case(8, (idx,) * 8, options=Options(reduce="domain", ranks_per_node=3), masked=(3, 5))
    assert [gateway_of(case, 0, source) for source in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [gateway_of(case, 1, source) for source in (0, 1, 2)] == [4, 4, 4]  # the others are masked
    assert [gateway_of(case, 2, source) for source in (0, 1, 2)] == [6, 7, 6]  # it has two ranks
