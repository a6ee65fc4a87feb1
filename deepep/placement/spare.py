"""Spare places: where experts go whose ranks die, so that no tensor has to grow then."""

from __future__ import annotations

from collections.abc import Collection

from deepep.errors import ArgumentTypeError, RangeError
from deepep.placement.experts import EMPTY, MOST_EXPERTS, ExpertPlacement
from deepep.runtime.checks import check_int


def with_spare(placement: ExpertPlacement, num_spare: int) -> ExpertPlacement:
    """The placement with `num_spare` empty places more on every rank, behind its others: parameters and what
    an optimizer keeps of them are larger by so many experts. No token goes there until an expert does.

    Raises ArgumentTypeError or RangeError.
    """
    if not isinstance(placement, ExpertPlacement):
        raise ArgumentTypeError("placement", type(placement).__name__, "an ExpertPlacement")
    most = MOST_EXPERTS // placement.num_ranks - placement.num_local
    spare = (EMPTY,) * check_int("num_spare", num_spare, 0, most)
    parts = [placement.of_rank(rank) + spare for rank in range(placement.num_ranks)]
    experts = tuple(expert for part in parts for expert in part)
    return ExpertPlacement(placement.num_experts, placement.num_ranks, experts)


def taken_over(
    placement: ExpertPlacement, gone: Collection[int], experts: Collection[int]
) -> ExpertPlacement:
    """The placement in which other ranks have these experts, which ranks that are `gone` alone had: each
    goes, ascending, to the rank with the fewest experts that has an empty place, or else one of a replica
    that others have as well, and then to the lowest. Where there is none, it stays where it is.
    """
    here = [rank for rank in range(placement.num_ranks) if rank not in gone]
    ranks = [list(placement.of_rank(rank)) for rank in range(placement.num_ranks)]

    def places(rank: int) -> list[int]:
        """A rank's places that can be had, empty ones first."""
        live = [expert for other in here for expert in ranks[other] if expert != EMPTY]
        found = [place for place, expert in enumerate(ranks[rank]) if expert == EMPTY]
        more = [p for p, expert in enumerate(ranks[rank]) if expert != EMPTY and live.count(expert) > 1]
        return found + more

    for expert in sorted(experts):
        free = [(places(rank), rank) for rank in here]
        having = [(len(ranks[r]) - ranks[r].count(EMPTY), r, found[0]) for found, r in free if found]
        # A rank with replicas to give is only asked where nobody has an empty place.
        empty = [one for one in having if ranks[one[1]][one[2]] == EMPTY]
        if not having:
            break
        _, rank, place = min(empty or having)
        for other in gone:
            ranks[other] = [EMPTY if one == expert else one for one in ranks[other]]
        ranks[rank][place] = expert
    whole = tuple(expert for rank in ranks for expert in rank)
    return ExpertPlacement(placement.num_experts, placement.num_ranks, whole)


def given_back(
    placement: ExpertPlacement, home: ExpertPlacement, back: Collection[int], here: Collection[int]
) -> ExpertPlacement:
    """The placement in which ranks that come `back` have what they have in `home`, and those who were `here`
    without them, where they had taken such an expert over, what they have there in `home`: nothing, or a
    replica of what somebody here still has. The other ranks' experts stay where they are; once all ranks are
    back it is `home`, but for places that stay empty because nobody had their expert at one of the returns.

    An expert that nobody here has stands where it does in `home`, as good as new or with a rank that is gone.
    """
    ranks = [list(placement.of_rank(rank)) for rank in range(placement.num_ranks)]
    live = {expert for rank in here for expert in ranks[rank]} - {EMPTY}
    given: set[int] = set()
    for rank in back:
        ranks[rank] = list(home.of_rank(rank))
        given |= set(ranks[rank])

    def unplaced() -> set[int]:
        return set(range(placement.num_experts)) - {expert for rank in ranks for expert in rank}

    for rank in here:
        for place, own in enumerate(home.of_rank(rank)):
            if ranks[rank][place] != own and ranks[rank][place] in given:
                ranks[rank][place] = own if own in live or own in unplaced() else EMPTY
    for rank in set(range(placement.num_ranks)) - {*here, *back}:
        for place, own in enumerate(home.of_rank(rank)):
            if own in unplaced():
                ranks[rank][place] = own
    whole = tuple(expert for rank in ranks for expert in rank)
    return ExpertPlacement(placement.num_experts, placement.num_ranks, whole)


def check_room(placement: ExpertPlacement) -> None:
    """Raises RangeError unless the other ranks have places for what any one rank alone has."""
    for rank in range(placement.num_ranks):
        alone = sorted(set(range(placement.num_experts)) - set(placement.alive_without({rank})))
        left = taken_over(placement, {rank}, alone).alive_without({rank})
        if len(left) < placement.num_experts:
            got = f"places for {len(alone) - (placement.num_experts - len(left))} of rank {rank}'s experts"
            allowed = f"for all {len(alone)}, as deepep.placement.with_spare makes them"
            raise RangeError("placement", got, allowed)
