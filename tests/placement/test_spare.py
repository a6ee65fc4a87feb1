"""Spare places: what placements with empty ones promise, and who takes over whose experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepep.errors import ArgumentTypeError, RangeError
from deepep.placement import ExpertPlacement, contiguous, place, revise, with_spare
from deepep.placement.spare import check_room, given_back, taken_over

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def deaths(draw: Any) -> tuple[ExpertPlacement, set[int]]:
    """A placement with empty places, some experts perhaps with replicas, and ranks that die."""
    ranks, local = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    redundant = ranks * draw(st.integers(0, 2)) if ranks * local * (ranks - 1) >= 2 * ranks else 0
    placement = place([*range(1, ranks * local + 1)], ranks, redundant)
    placement = with_spare(placement, draw(st.integers(0, 3)))
    gone = draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=ranks - 1))
    return placement, gone


@QUICK
@given(deaths())
def test_who_is_lost_goes_where_there_is_room_and_all_others_stay(drawn: Any) -> None:
    placement, gone = drawn
    lost = sorted(set(range(placement.num_experts)) - set(placement.alive_without(gone)))
    made = taken_over(placement, gone, lost)
    assert taken_over(placement, gone, lost) == made  # on every rank
    here = [rank for rank in range(placement.num_ranks) if rank not in gone]
    before = [e for rank in here for e in placement.of_rank(rank)]
    assert set(placement.alive_without(gone)) <= set(made.alive_without(gone))
    room = before.count(-1) + len(before) - before.count(-1) - len(set(before) - {-1})
    assert len(made.alive_without(gone)) - len(placement.alive_without(gone)) == min(room, len(lost))
    for rank in here:
        for old, new in zip(placement.of_rank(rank), made.of_rank(rank), strict=True):
            assert new == old or new in lost
    taken = [sum(e in lost for e in made.of_rank(rank)) for rank in here]
    if (
        not placement.has_replicas
        and room >= len(lost)
        and placement.of_rank(here[0]).count(-1) >= max(taken)
    ):
        assert max(taken) - min(taken) <= 1  # evenly
    for expert in set(made.alive_without(gone)) & set(lost):  # its ranks have it no more
        assert all(physical // made.num_local in here for physical in made.replicas_of[expert])


def test_room_for_one_rank() -> None:
    check_room(with_spare(contiguous(6, 3), 1))
    check_room(ExpertPlacement(2, 2, (0, 1, 1, 0)))  # replicas of all: nothing is lost
    check_room(ExpertPlacement(3, 3, (0, 1, 1, 2, 2, 0)))
    for placement in (contiguous(6, 3), with_spare(contiguous(9, 3), 1)):
        with pytest.raises(RangeError, match="with_spare"):
            check_room(placement)


def test_empty_places_in_all_that_placements_do() -> None:
    placement = with_spare(contiguous(4, 2), 1)
    assert placement.experts == (0, 1, -1, 2, 3, -1)
    assert placement.replicas_of == ((0,), (1,), (3,), (4,))
    assert placement.rank_loads([1, 2, 4, 8]) == (3.0, 12.0)
    assert placement.logical_loads(torch.tensor([5, 6, 0, 7, 8, 0])).tolist() == [5, 6, 7, 8]
    idx = torch.tensor([[0, 3], [2, -1]])
    assert placement.physical_topk(idx, 0).tolist() == [[0, 4], [3, -1]]
    moved = ExpertPlacement(4, 2, (-1, 2, 3, 0, -1, 1))
    assert moved.num_moved(placement) == 4
    assert moved.renumbered(placement).num_moved(placement) == 0
    assert revise(moved, placement, [1, 2, 4, 8], 0.5) == placement.renumbered(moved)


def test_misuse() -> None:
    with pytest.raises(RangeError):
        ExpertPlacement(4, 2, (0, 1, 2, -2))
    with pytest.raises(RangeError, match="no replica of"):
        ExpertPlacement(4, 2, (0, 1, 2, -1))
    with pytest.raises(ArgumentTypeError):
        with_spare([0, 1], 1)  # type: ignore[arg-type]
    for number in (-1, 1 << 16):
        with pytest.raises(RangeError):
            with_spare(contiguous(4, 2), number)


@QUICK
@given(st.data())
def test_who_comes_back_has_its_own_and_nothing_that_lives_is_lost(data: Any) -> None:
    """Ranks die, are restored as far as there is room, and come back in any order."""
    home, _ = data.draw(deaths())
    placement, here = home, set(range(home.num_ranks))
    lost: set[int] = set()  # experts that nobody had when some rank came back
    for _ in range(data.draw(st.integers(1, 6))):
        away = set(range(home.num_ranks)) - here
        if len(here) > 1 and (not away or data.draw(st.booleans())):
            rank = data.draw(st.sampled_from(sorted(here)))
            kept = set(range(home.num_experts)) - set(placement.alive_without(away | {rank}))
            here, away = here - {rank}, away | {rank}
            placement = taken_over(
                placement, away, data.draw(st.sets(st.sampled_from(sorted(kept) or [0]))) & kept
            )
            continue
        back = data.draw(st.sets(st.sampled_from(sorted(away)), min_size=1))
        live = set(placement.alive_without(away))
        lost |= set(range(home.num_experts)) - live
        placement, old = given_back(placement, home, back, here), placement
        assert given_back(old, home, back, here) == placement  # on every rank
        for rank in back:
            assert placement.of_rank(rank) == home.of_rank(rank)
        for rank in here:
            for was, now, own in zip(
                old.of_rank(rank), placement.of_rank(rank), home.of_rank(rank), strict=True
            ):
                assert now in (was, own, -1)
        here, away = here | back, away - back
        assert live <= set(placement.alive_without(away))
        for expert in live:  # one that a rank has at home is nowhere else by take-over
            homes = [physical for physical in home.replicas_of[expert] if physical // home.num_local in here]
            if homes:
                assert {p for p in placement.replicas_of[expert] if p // home.num_local in here} <= set(homes)
        if not away:
            empty = [place for place, expert in enumerate(placement.experts) if expert == -1]
            left = [place for place in empty if home.experts[place] != -1]
            assert {home.experts[place] for place in left} <= lost
            whole = list(home.experts)
            for place in left:
                whole[place] = -1
            assert list(placement.experts) == whole


def test_a_place_whose_expert_nobody_had_stays_empty() -> None:
    """Its rank has no row to go on with, and that of another rank is as good as new."""
    home = ExpertPlacement(3, 3, (0, 2, 1, 2, 1, 2))
    placement = taken_over(home, {0}, {0})
    assert placement.of_rank(1) == (0, 2)
    placement = given_back(placement, home, {0}, {1})  # rank 2 is away, and with it expert 1
    assert placement.of_rank(1) == (-1, 2)
    placement = given_back(placement, home, {2}, {0, 1})
    assert placement.experts == (0, 2, -1, 2, 1, 2)
