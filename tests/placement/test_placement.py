"""Placements from loads: what holds for all of them, and the rule that picks a replica."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepep.errors import ArgumentTypeError, RangeError, ShapeError
from deepep.placement import ExpertPlacement, contiguous, least_share, place
from deepep.placement.experts import OF_EXPERT, OF_RANK, OF_TOKEN, physical_topk

ROUNDING = Fraction(1, 2**50)
"""Relative. A share is rounded once and a rank's sum of shares once, each by at most 2^-53; the search
compares two such sums."""


@st.composite
def problems(draw, with_groups=False):
    """(loads, ranks, redundant, groups, domains): whole experts on each rank, with replicas or without."""
    domains = draw(st.sampled_from([1, 2, 3])) if with_groups else 1
    size, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    ranks, groups = domains * size, domains * draw(st.integers(1, 3)) if with_groups else 1
    experts = groups * per_group
    if not with_groups:
        experts = ranks * draw(st.integers(1, 4))
    redundant = draw(
        st.sampled_from([n for n in range(experts * (size - 1) + 1) if not (experts + n) % ranks] or [-1])
    )
    load = st.one_of(st.integers(0, 5), st.integers(0, 1000), st.integers(10**6, 10**9))
    loads = draw(st.lists(load, min_size=experts, max_size=experts))
    return loads, ranks, redundant, groups, domains


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def exact_loads(placement, loads):
    counts = [len(replicas) for replicas in placement.replicas_of]
    shares = [Fraction(load, count) for load, count in zip(loads, counts, strict=True)]
    return [sum((shares[e] for e in placement.of_rank(r)), Fraction(0)) for r in range(placement.num_ranks)]


def largest_share(loads, counts):
    return max(Fraction(load, count) for load, count in zip(loads, counts, strict=True))


@QUICK
@given(problems())
def test_what_holds_for_every_placement(problem):
    loads, ranks, redundant, _, _ = problem
    placement = place(loads, ranks, redundant)
    assert placement.num_physical == len(loads) + redundant
    assert set(placement.experts) == set(range(len(loads)))
    assert all(len(placement.of_rank(r)) == placement.num_local for r in range(ranks))
    assert place(torch.tensor(loads), ranks, redundant) == placement  # a function of the loads alone

    busiest, without = max(exact_loads(placement, loads)), max(exact_loads(place(loads, ranks), loads))
    blocks = max(exact_loads(contiguous(len(loads), ranks), loads))
    assert busiest <= min(without, blocks) * (1 + ROUNDING)
    apart = all(len({p // placement.num_local for p in r}) == len(r) for r in placement.replicas_of)
    assert apart or busiest >= min(without, blocks) * (1 - ROUNDING)  # replicas share a rank as a last resort
    assert busiest >= least_share(loads, ranks, redundant) * (1 - ROUNDING)
    assert max(map(Fraction, placement.rank_loads(loads))) <= busiest * (1 + ROUNDING)


@QUICK
@given(problems(with_groups=True))
def test_groups_stay_inside_their_domain(problem):
    loads, ranks, redundant, groups, domains = problem
    if redundant < 0:  # these experts do not divide among these ranks
        return
    placement = place(loads, ranks, redundant, num_groups=groups, num_domains=domains)
    assert placement.num_physical == len(loads) + redundant
    size, per_group = ranks // domains, len(loads) // groups
    homes = [{p // placement.num_local // size for p in replicas} for replicas in placement.replicas_of]
    assert all(len(home) == 1 for home in homes)
    of_groups = [set.union(*homes[g * per_group : (g + 1) * per_group]) for g in range(groups)]
    assert all(len(home) == 1 for home in of_groups)
    if len(loads) % ranks == 0:
        plain = max(exact_loads(place(loads, ranks, num_groups=groups, num_domains=domains), loads))
        blocks = max(exact_loads(contiguous(len(loads), ranks), loads))
        assert max(exact_loads(placement, loads)) <= min(plain, blocks) * (1 + ROUNDING)


@QUICK
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 4), st.data())
def test_no_other_numbers_of_replicas_have_a_smaller_largest_share(loads, ranks, data):
    redundant = data.draw(st.integers(0, len(loads) * (ranks - 1)))

    def ways(experts, left):
        if experts == 1:
            return [(left + 1,)] if left < ranks else []
        return [
            (n, *rest) for n in range(1, min(ranks, left + 1) + 1) for rest in ways(experts - 1, left - n + 1)
        ]

    best = min(largest_share(loads, counts) for counts in ways(len(loads), redundant))
    bound = max(best, Fraction(sum(loads), ranks))
    assert abs(Fraction(least_share(loads, ranks, redundant)) - bound) <= bound * ROUNDING


@pytest.mark.parametrize(("redundant", "most"), [(0, 5.37), (32, 1.0001), (64, 1.0003)])
def test_a_skewed_load_is_brought_near_the_bound(redundant, most):
    """Zipf's law over 256 experts, 32 ranks: the figures found, rounded up in the last digit."""
    loads = [10**6 // rank for rank in range(1, 257)]
    placement = place(loads, 32, redundant)
    mean = sum(loads) / 32
    bound = least_share(loads, 32, redundant) / mean
    assert bound <= placement.imbalance(loads) <= most
    assert contiguous(256, 32).imbalance(loads) > 14
    apart = [len({p // placement.num_local for p in r}) == len(r) for r in placement.replicas_of]
    assert all(apart)


def test_replicas_share_a_rank_where_apart_would_be_worse():
    """1 + 4 = 2 + 3. Two experts on both ranks and one of the others on each: the ranks then differ as these
    two do, and no two of the loads are equal.
    """
    loads = [1, 2, 3, 4]
    placement = place(loads, 2, 2)
    assert placement.rank_loads(loads) == (5, 5)
    assert sorted(map(len, placement.replicas_of)) == [1, 1, 2, 2]


@QUICK
@given(problems(), st.integers(0, 2**32 - 1))
def test_renumbering_moves_less_and_keeps_the_sets(problem, seed):
    loads, ranks, redundant, _, _ = problem
    generator = torch.Generator().manual_seed(seed)
    other = torch.tensor(loads)[torch.randperm(len(loads), generator=generator)]
    previous, placement = place(loads, ranks, redundant), place(other, ranks, redundant)
    found = placement.renumbered(previous)

    def sets(p):
        return sorted(tuple(sorted(p.of_rank(r))) for r in range(ranks))

    assert sets(found) == sets(placement)
    assert found.num_moved(previous) <= placement.num_moved(previous)
    assert previous.renumbered(previous) == previous
    for rank in range(ranks):
        for local, expert in enumerate(previous.of_rank(rank)):
            kept = found.of_rank(rank)
            if kept.count(expert) == 1 and previous.of_rank(rank).count(expert) == 1:
                assert kept[local] == expert or found == placement


def test_renumbering_keeps_domains_whole():
    before = place([9, 8, 7, 6, 5, 4, 3, 2], 4, num_groups=4, num_domains=2)
    after = place([2, 3, 4, 5, 6, 7, 8, 9], 4, num_groups=4, num_domains=2)
    found = after.renumbered(before, 2)
    assert found.num_moved(before) <= after.num_moved(before)
    halves = [{*found.of_rank(2 * d), *found.of_rank(2 * d + 1)} for d in range(2)]
    assert sorted(map(sorted, halves)) == sorted(
        sorted({*after.of_rank(2 * d), *after.of_rank(2 * d + 1)}) for d in range(2)
    )


# a router's entries


def chosen(placement, expert, token, rank):
    """The rule, in Python's integers."""
    replicas = placement.replicas_of[expert]
    word = (token * OF_TOKEN + rank * OF_RANK + expert * OF_EXPERT) % 2**32
    return replicas[word * len(replicas) // 2**32]


@QUICK
@given(problems(), st.sampled_from([torch.int32, torch.int64]), st.integers(0, 2**32 - 1))
def test_entries_are_mapped_by_the_rule(problem, dtype, seed):
    loads, ranks, redundant, _, _ = problem
    placement = place(loads, ranks, redundant)
    generator = torch.Generator().manual_seed(seed)
    topk_idx = torch.randint(-1, len(loads), (7, 3), generator=generator).to(dtype)
    for rank in range(ranks):
        found = placement.physical_topk(topk_idx, rank)
        assert found.dtype == dtype
        assert found.tolist() == [
            [chosen(placement, e, t, rank) if e >= 0 else -1 for e in row]
            for t, row in enumerate(topk_idx.tolist())
        ]


def test_what_names_no_expert_stays_so():
    placement = place([5, 1, 1, 1], 2, 2)
    found = placement.physical_topk(torch.tensor([[-1, -7, 4, 2**62]]), 1)
    assert found.tolist() == [[-1, -7, 6, 6]]
    assert placement.physical_topk(torch.empty(0, 3, dtype=torch.int32), 0).shape == (0, 3)


def test_the_steps_of_the_rule_are_those_of_an_even_sequence():
    g = 1.2207440846057596
    assert math.isclose(g**4, g + 1)
    assert [round(2**32 / g**n) for n in (1, 2, 3)] == [OF_TOKEN, OF_RANK, OF_EXPERT]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("replicas", [2, 3, 4, 8])
def test_replicas_have_equal_shares_whichever_tokens_choose_the_expert(stride, replicas):
    """512 tokens, every `stride`-th: t mod n would give all of them to one replica where n divides the
    stride. No replica is further from 512 / n than the worst that was found.
    """
    placement = ExpertPlacement(1, replicas, (0,) * replicas)
    tokens = torch.full((512 * stride, 1), -1)
    tokens[::stride] = 0
    for rank in range(replicas):
        found = placement.physical_topk(tokens, rank)
        counts = torch.bincount(found[found >= 0], minlength=replicas)
        assert (counts - 512 / replicas).abs().max() <= 4


def test_few_tokens_of_many_ranks_spread_too():
    """Decode: one token on each of 64 ranks, all for one expert of 8 replicas."""
    placement = ExpertPlacement(57, 64, (*range(57), *[0] * 7))
    token = torch.zeros(1, 1, dtype=torch.int64)
    found = torch.cat([placement.physical_topk(token, rank) for rank in range(64)]).flatten()
    counts = [int((found == physical).sum()) for physical in placement.replicas_of[0]]
    assert sum(counts) == 64
    assert max(counts) <= 10


# refusals


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (([1, 2, 3], 2, 0), {}, RangeError),
        (([1, 2, 3, 4], 2, 1), {}, RangeError),
        (([1, 2, 3, 4], 2, 6), {}, RangeError),  # more than one on each rank
        (([1, -2], 2, 0), {}, RangeError),
        (([1, math.nan], 2, 0), {}, RangeError),
        (([1, math.inf], 2, 0), {}, RangeError),
        (([], 2, 0), {}, RangeError),
        (([1, 2, 3, 4], 4, 0), {"num_groups": 3}, RangeError),
        (([1, 2, 3, 4], 4, 0), {"num_domains": 3}, RangeError),
        (([1, 2, 3, 4], 4, 0), {"num_groups": 2, "num_domains": 4}, RangeError),
        (([1, 2, 3, 4], 4, 4), {"num_groups": 4, "num_domains": 4}, RangeError),  # a domain of one rank
        (("12", 2, 0), {}, ArgumentTypeError),
        ((torch.ones(2, 2), 2, 0), {}, ShapeError),
        ((torch.ones(2, dtype=torch.bool), 2, 0), {}, ArgumentTypeError),
        (([1, 2], 2.0, 0), {}, ArgumentTypeError),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, error):
    with pytest.raises(error):
        place(*arguments, **options)


def test_a_placement_made_by_hand_is_checked():
    for experts, error in [((0, 0, 0, 0), RangeError), ((0, 1, 2), RangeError), ([0, 1], ArgumentTypeError)]:
        with pytest.raises(error):
            ExpertPlacement(2, 2, experts)
    placement = ExpertPlacement(2, 2, (0, 1))
    for topk_idx, error in [
        ([[0]], ArgumentTypeError),
        (torch.zeros(2, 2), ArgumentTypeError),
        (torch.zeros(2, dtype=torch.int64), ShapeError),
    ]:
        with pytest.raises(error):
            placement.physical_topk(topk_idx, 0)
    with pytest.raises(RangeError):
        placement.physical_topk(torch.zeros(1, 1, dtype=torch.int64), 2)
    with pytest.raises(RangeError):
        placement.num_moved(contiguous(2, 1))


def test_tables_without_ranks_name_the_replicas_that_are_left() -> None:
    placed = ExpertPlacement(5, 3, (0, 1, 2, 3, 0, 4, 1, 0, 2))
    assert placed.alive_without([1]) == [0, 1, 2]
    assert placed.alive_without([]) == [0, 1, 2, 3, 4]
    assert placed.replicas_without([0])[:3] == ((4, 7), (6,), (8,))
    replicas, counts = placed.tables(without=[0])
    assert torch.equal(placed.tables()[1], torch.tensor([3, 2, 2, 1, 1]))  # kept apart
    topk = torch.tensor([[0, 1], [2, 0], [3, 4]] * 40)
    found = physical_topk(topk, replicas, counts, 1, placed.num_physical)
    logical = torch.tensor(placed.experts)[found]
    assert torch.equal(logical, topk)
    assert int(found.min()) >= placed.num_local
    shares = torch.bincount(found[topk == 0], minlength=9)[[4, 7]]
    assert abs(int(shares[0] - shares[1])) <= 8  # of 80
