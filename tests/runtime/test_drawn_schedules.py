"""Constructing, connecting, masks and the end, in virtual time and on drawn schedules.

A life is a construction, an operation, a rank left out, all taken in again, each with an operation, and the
end. Nobody takes longer than a fifth of the time-out in a call, unless a test says so: so between two ranks
that wait for each other there is less than a time-out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from harness.virtual_group import TIMEOUT, VirtualRanks
from harness.virtual_time import Gone, Schedule

from deepep.errors import PeerTimeoutError

SEEDS = range(15)
ALLOWANCE = 0.2 * TIMEOUT
GRACE = 1.0 + 0.05 * TIMEOUT


def live(ranks: VirtualRanks, rank: int) -> int:
    """A life. Returns the number of its construction in the store, from which follows who is left out."""
    control = ranks.construct(rank)
    number = int(control.membership._store.prefix.rpartition("/")[2])
    try:
        ranks.schedule.refresh()
        ranks.barrier(control)
        absent = number % ranks.num_ranks
        if rank != absent:
            control.mask(absent, True)
            ranks.barrier(control)
        for other in range(ranks.num_ranks):
            control.mask(other, False)
        ranks.barrier(control)
        control.leave()
    except PeerTimeoutError:
        control.close(0.0)
        raise
    finally:
        ranks.schedule.refresh()
    return number


def live_often(ranks: VirtualRanks, rank: int, count: int) -> list[int]:
    """The numbers of so many lives."""
    return [live(ranks, rank) for _ in range(count)]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_nobody_fails_while_nobody_is_late(monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
    for seed in SEEDS:
        schedule = Schedule(seed, num_ranks, ALLOWANCE)
        ranks = VirtualRanks(monkeypatch, schedule, num_ranks)
        found = schedule.run([partial(live_often, ranks, rank, 3) for rank in range(num_ranks)])
        assert found == [[1, 2, 3]] * num_ranks, f"seed {seed}: {found}"
        # of the last two constructions: their number, who knew of them, and who has left
        assert len(ranks.store.data) == 1 + 2 * 2 * num_ranks, sorted(ranks.store.data)


def live_on(ranks: VirtualRanks, rank: int) -> list[tuple[int, ...]]:
    """Lives in which every call is made until it works. Returns the ranks that calls in vain have named."""
    named = []

    def insist(call: Callable[[], Any]) -> Any:
        for _ in range(8):
            try:
                return call()
            except PeerTimeoutError as error:
                named.append(error.record.waited_on)
        raise AssertionError(f"rank {rank} does not find the others: {named}")

    def take_in_and_meet(control: Any) -> None:
        for other in range(ranks.num_ranks):
            control.mask(other, False)
        ranks.barrier(control)

    def live_once() -> None:
        control = insist(lambda: ranks.construct(rank))
        ranks.schedule.refresh()
        for _ in range(3):
            insist(lambda: take_in_and_meet(control))
        control.leave()
        ranks.schedule.refresh()

    live_once()
    live_once()
    return named


def meetings(ranks: VirtualRanks) -> list[tuple[int, int]]:
    """Numbers of the constructions' meetings that the store has keys of, each with that of the last one."""
    keys = [key.split("/") for key in ranks.store.data]
    last = int(ranks.store.data["deepep/construct/number"])
    return [(int(key[2]), last) for key in keys if key[2].isdigit() and key[3] not in ("link", "members")]


def test_a_rank_that_is_late_is_named_alone_and_all_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in SEEDS:
        schedule = Schedule(seed, 3, ALLOWANCE)
        ranks = VirtualRanks(monkeypatch, schedule, 3)
        late, moment = schedule.random.randrange(3), schedule.random.uniform(0.0, TIMEOUT)
        schedule.stall(late, moment, schedule.random.uniform(1.2, 4.0) * TIMEOUT)
        found = schedule.run([partial(live_on, ranks, rank) for rank in range(3)])
        about = f"seed {seed}, rank {late} late at {moment:.2f}: {found}"
        assert not any(isinstance(named, BaseException) for named in found), about
        assert {rank for named in found for those in named for rank in those} <= {late}, about
        assert all(number >= last - 1 for number, last in meetings(ranks)), f"{about}: {ranks.store.data}"


def live_until_the_end(ranks: VirtualRanks, rank: int) -> tuple[PeerTimeoutError, float] | None:
    """Lives until a call raises: the error, and when it came. None for the rank that dies."""
    try:
        live_often(ranks, rank, 20)
    except PeerTimeoutError as error:
        return error, ranks.schedule.now
    except Gone:
        ranks.hang_up_of(rank)
    return None


def test_a_rank_that_dies_is_named_alone_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in SEEDS:
        schedule = Schedule(seed, 3, ALLOWANCE)
        ranks = VirtualRanks(monkeypatch, schedule, 3)
        dead, moment = schedule.random.randrange(3), schedule.random.uniform(0.0, 3.0 * TIMEOUT)
        schedule.kill(dead, moment)

        found = schedule.run([partial(live_until_the_end, ranks, rank) for rank in range(3)])
        about = f"seed {seed}, rank {dead} dead at {moment}: {found}"
        for rank in {0, 1, 2} - {dead}:
            error, ended = found[rank]
            others = {dead, 3 - rank - dead}  # the other may have raised, and left, before
            assert {dead} <= set(error.record.waited_on) <= others, about
            assert ended < moment + TIMEOUT + GRACE + 1.0, about
