"""Roles of a dispatch's blocks, by the model of docs/kernels.md: no GPU is needed."""

from __future__ import annotations

import pytest

from deepep.backends.cuda.sm_split import BlockSplit, dispatch_split, expanded_split

#: What an SM writes to its own memory, to a peer's, and reads; what a link takes: GB/s.
HERE, AWAY, READ, LINK = 59, 49, 236, 354
RANKS, SMS = range(2, 9), range(1, 133)


def time_of(split: BlockSplit, ranks: int) -> float:
    """Seconds of a dispatch in which every rank has a GB for every rank, itself included."""
    push, local = (ranks - 1) / AWAY + 1 / READ, 1 / HERE + 1 / READ
    link = (ranks - 1) / LINK
    if split.remote == split.total:
        return max((push + local) / split.total, link)
    return max(push / split.remote, local / split.local, link)


def splits(sms: int) -> list[BlockSplit]:
    """All there are of so many SMs."""
    return [BlockSplit(sms, sms, sms), *(BlockSplit(sms, n, sms - n) for n in range(1, sms))]


@pytest.mark.parametrize("ranks", RANKS)
def test_no_split_is_much_better_and_more_sms_are_no_slower(ranks: int) -> None:
    before = float("inf")
    for sms in SMS:
        split = dispatch_split(sms, ranks)
        assert split.total <= sms
        assert split.remote + split.local == split.total or split.remote == split.local == split.total
        time = time_of(split, ranks)
        assert time <= 1.1 * min(time_of(other, ranks) for other in splits(sms)), sms
        assert time <= 1.01 * before, sms
        before = min(before, time)


@pytest.mark.parametrize("ranks", RANKS)
def test_with_many_sms_the_link_binds_and_no_more_push_than_is_of_use(ranks: int) -> None:
    """With four ranks 8 that push and 5 beside them took 1.06 x the floor, 12 and 5 took 1.14."""
    made = {dispatch_split(sms, ranks) for sms in SMS if sms >= 27}
    assert len(made) == 1
    (split,) = made
    assert time_of(split, ranks) == (ranks - 1) / LINK
    assert split.remote == (12 if ranks == 2 else 8)
    if ranks == 4:
        assert dispatch_split(16, 4) == split


@pytest.mark.parametrize("ranks", RANKS)
def test_own_rows_are_spread_before_all_others_are(ranks: int) -> None:
    """Local blocks spread a rank's own rows, and all spread the others': nobody is left to wait for."""
    for sms in range(2, 133):
        split = expanded_split(sms, ranks)
        assert split.total == split.remote + split.local == sms
        spread = 4 / HERE + 1 / READ  # of a row that four of a token's experts want
        push = (ranks - 1) / AWAY + 1 / READ
        evenly = (push + ranks * spread) / sms
        assert spread / split.local <= 1.1 * evenly, sms
