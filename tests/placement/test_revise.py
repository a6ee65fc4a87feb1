"""Revised placements: what they may cost, what they keep, and that a higher price moves fewer experts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep.errors import ArgumentTypeError, RangeError, ShapeError
from deepep.placement import ExpertPlacement, contiguous, place, revise

COSTS = (0.0, 0.001, 0.01, 0.1, 1.0, 1e6)


@st.composite
def revisions(draw: st.DrawFn) -> tuple[ExpertPlacement, ExpertPlacement, list[int], int]:
    """A placement in force, made of earlier loads; what later loads ask for; these; domains."""
    domains = draw(st.sampled_from([1, 1, 2]))
    ranks = domains * draw(st.integers(1, 3))
    experts = ranks * draw(st.integers(1, 4))
    most = experts * (ranks // domains - 1) // ranks
    redundant = ranks * draw(st.integers(0, min(most, 2)))
    load = st.integers(0, 3) | st.integers(0, 1000)
    before, after = (draw(st.lists(load, min_size=experts, max_size=experts)) for _ in range(2))
    options = {"num_groups": domains, "num_domains": domains}
    made = [place(loads, ranks, redundant, **options) for loads in (before, after)]
    return made[0], made[1], after, domains


def domains_of(placement: ExpertPlacement, domains: int) -> list[set[int]]:
    size = placement.num_ranks // domains
    return [
        {e for rank in range(d * size, (d + 1) * size) for e in placement.of_rank(rank)}
        for d in range(domains)
    ]


def has_twins(placement: ExpertPlacement) -> bool:
    local = placement.num_local
    return any(len(set(placement.of_rank(r))) < local for r in range(placement.num_ranks))


@settings(max_examples=60, deadline=None)
@given(revisions())
def test_what_a_revision_promises(
    drawn: tuple[ExpertPlacement, ExpertPlacement, list[int], int],
) -> None:
    previous, wanted, loads, domains = drawn
    full = wanted.renumbered(previous, domains)
    before: int | None = None
    for cost in COSTS:
        made = revise(previous, wanted, loads, cost, num_domains=domains)
        assert made == revise(previous, wanted, loads, cost, num_domains=domains)
        assert made.num_physical == previous.num_physical
        moved = made.num_moved(previous)
        for other in (previous, full):
            price = other.imbalance(loads) + cost * other.num_moved(previous) / other.num_ranks
            assert made.imbalance(loads) + cost * moved / made.num_ranks <= price
        assert before is None or moved <= before, "a higher price moves no more"
        before = moved
        assert not has_twins(made) or has_twins(previous) or has_twins(wanted)
        if domains > 1 and made != full:
            assert domains_of(made, domains) == domains_of(previous, domains)
    assert before == 0


def test_a_gain_of_little_moves_nobody() -> None:
    """Loads that change by a per mille: a full search deals the experts anew."""
    loads = [100 + (7 * e) % 16 for e in range(64)]
    previous = place(loads, 8)
    later = [load + (e * 5) % 3 / 10 for e, load in enumerate(loads)]
    wanted = place(later, 8)
    assert wanted.renumbered(previous).num_moved(previous) > 20
    assert revise(previous, wanted, later, 0.001) == previous


def test_one_move_is_taken_that_is_worth_it() -> None:
    """An expert becomes popular: it gets the place of another's second replica, and nothing else moves."""
    loads = [10, 10, 10, 10, 40, 10, 10, 10]
    previous = place(loads, 4, 4)
    later = [10, 10, 10, 40, 10, 10, 10, 10]
    made = revise(previous, place(later, 4, 4), later, 0.05)
    assert previous.imbalance(later) > 1.3
    assert made.imbalance(later) < 1.1
    assert 0 < made.num_moved(previous) <= 3


def test_another_number_of_places_is_what_is_wanted() -> None:
    loads = [5, 4, 3, 2, 1, 1, 1, 1]
    wanted = place(loads, 4, 4)
    assert revise(contiguous(8, 4), wanted, loads, 1e6) == wanted.renumbered(contiguous(8, 4))


def test_what_is_refused() -> None:
    plain, loads = contiguous(8, 4), [1] * 8
    for cost, error in (("1", ArgumentTypeError), (True, ArgumentTypeError), (-1, RangeError)):
        with pytest.raises(error, match="moving_cost"):
            revise(plain, plain, loads, cost)
    with pytest.raises(RangeError, match="moving_cost"):
        revise(plain, plain, loads, float("inf"))
    with pytest.raises(RangeError, match="num_domains"):
        revise(plain, plain, loads, 0.0, num_domains=3)
    with pytest.raises(ShapeError, match="loads"):
        revise(plain, plain, loads[1:], 0.0)
    with pytest.raises(RangeError, match="previous"):
        revise(contiguous(8, 2), plain, loads, 0.0)
    for first, second in ((None, plain), (plain, None)):
        with pytest.raises(ArgumentTypeError):
            revise(first, second, loads, 0.0)
