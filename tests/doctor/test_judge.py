"""The judge: whoever was made slow is named, and nobody else; nobody is where nobody was.

Measurements are drawn: times of ranks that are alike, within what a busy machine does to them, and one fault.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep.doctor.judge import CHECKS, LEAST_LATE, SLOW, Evidence, Suspect, judge

WORK = 0.004


def quiet(size: int, seed: int, hosts: int = 1) -> Evidence:
    """Ranks that are alike; links between hosts take ten times as long as those inside one."""
    noise = random.Random(seed)
    per_host = -(-size // hosts)
    host = [rank // per_host for rank in range(size)]

    def link(i: int, k: int) -> float:
        return noise.uniform(1.0, SLOW * 0.99) * (1e-3 if host[i] == host[k] else 1e-2)

    late = [[noise.uniform(0, LEAST_LATE * WORK * 0.99) for _ in range(size)] for _ in range(size)]
    return Evidence(
        late=[[0.0 if i == k else late[i][k] for k in range(size)] for i in range(size)],
        links=[[0.0 if i == k else link(i, k) for k in range(size)] for i in range(size)],
        share=[noise.uniform(0.5, 1.0) for _ in range(size)],
        work=WORK,
        hosts=host,
    )


def late_rank(evidence: Evidence, rank: int) -> Evidence:
    """All others wait for it for ten times the work."""
    rows = [list(row) for row in evidence.late]
    for i, row in enumerate(rows):
        row[rank] = 0.0 if i == rank else 10 * WORK
    return replace(evidence, late=rows)


def slow_links(evidence: Evidence, pairs: list[tuple[int, int]]) -> Evidence:
    """Messages from the first of each pair to the second take twenty times as long."""
    rows = [list(row) for row in evidence.links]
    for source, target in pairs:
        rows[target][source] *= 20
    return replace(evidence, links=rows)


def starved(evidence: Evidence, rank: int) -> Evidence:
    """Its process gets a tenth of a core, so it is late, and its messages take long."""
    share = [0.05 if r == rank else s for r, s in enumerate(evidence.share)]
    others = [r for r in range(evidence.num_ranks) if r != rank]
    ways = [(rank, r) for r in others] + [(r, rank) for r in others[:1]]
    return replace(slow_links(late_rank(evidence, rank), ways), share=share)


SIZES, SEEDS, HOSTS = st.integers(2, 9), st.integers(0, 10**6), st.integers(1, 3)


def named(evidence: Evidence) -> list[tuple[str, tuple[int, ...]]]:
    return [(suspect.kind, suspect.ranks) for suspect in judge(evidence)]


@settings(deadline=None)
@given(size=st.integers(1, 9), seed=SEEDS, hosts=HOSTS)
def test_nobody_is_named_among_equals(size: int, seed: int, hosts: int) -> None:
    assert named(quiet(size, seed, hosts)) == []


@settings(deadline=None)
@given(size=SIZES, seed=SEEDS, hosts=HOSTS, data=st.data())
def test_a_late_rank_is_named_and_nobody_else(size: int, seed: int, hosts: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, size - 1))
    assert named(late_rank(quiet(size, seed, hosts), rank)) == [("rank", (rank,))]


@settings(deadline=None)
@given(size=SIZES, seed=SEEDS, data=st.data())
def test_a_slow_link_is_named_with_its_direction(size: int, seed: int, data: st.DataObject) -> None:
    pair = tuple(data.draw(st.permutations(range(size)))[:2])
    assert named(slow_links(quiet(size, seed), [pair])) == [("link", pair)]


@settings(deadline=None)
@given(size=SIZES, seed=SEEDS, data=st.data())
def test_a_process_without_its_core_is_named_and_not_what_follows_from_it(
    size: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, size - 1))
    assert named(starved(quiet(size, seed), rank)) == [("process", (rank,))]


@settings(deadline=None)
@given(size=st.integers(4, 9), seed=SEEDS, out=st.booleans(), data=st.data())
def test_all_links_of_a_rank_are_named_once(size: int, seed: int, out: bool, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, size - 1))
    others = [r for r in range(size) if r != rank]
    ways = [(rank, r) if out else (r, rank) for r in others]
    assert named(slow_links(quiet(size, seed), ways)) == [("port", (rank,))]


@settings(deadline=None)
@given(size=st.integers(5, 9), seed=SEEDS, data=st.data())
def test_two_faults_are_named_both(size: int, seed: int, data: st.DataObject) -> None:
    rank, source, target = data.draw(st.permutations(range(size)))[:3]
    evidence = slow_links(late_rank(quiet(size, seed), rank), [(source, target)])
    assert named(evidence) == [("rank", (rank,)), ("link", (source, target))]


@settings(deadline=None)
@given(size=SIZES, seed=SEEDS, scale=st.sampled_from([2.0**-20, 2.0**10]), data=st.data())
def test_neither_order_nor_unit_matters(size: int, seed: int, scale: float, data: st.DataObject) -> None:
    """Ranks renumbered are named by their new numbers; times in another unit name the same."""
    rank = data.draw(st.integers(0, size - 1))
    evidence = data.draw(st.sampled_from([late_rank, starved]))(quiet(size, seed), rank)
    order = data.draw(st.permutations(range(size)))  # place -> the rank that stands there now
    place = {old: new for new, old in enumerate(order)}
    moved = Evidence(
        late=[[scale * evidence.late[i][k] for k in order] for i in order],
        links=[[scale * evidence.links[i][k] for k in order] for i in order],
        share=[evidence.share[i] for i in order],
        work=scale * evidence.work,
        hosts=[evidence.hosts[i] for i in order],
    )
    assert sorted(named(moved)) == sorted(
        (kind, tuple(place[r] for r in ranks)) for kind, ranks in named(evidence)
    )


def test_what_is_named_is_said_in_words() -> None:
    assert str(Suspect("link", (0, 2), 5.0)) == (
        "the link from rank 0 to rank 2 is 5 times as slow as the others"
    )
    assert str(Suspect("process", (1,), 8.0)).startswith("the process of rank 1 is 8 times")
    assert str(Suspect("port", (1,), 8.0)).startswith("all links of rank 1, one way or both, are 8")
    assert str(Suspect("rank", (3,), 1.5)).startswith("rank 3 is 1.5 times")
    assert set(CHECKS) == {"process", "rank", "port", "link"}


@pytest.mark.parametrize("share", [0.0, 1e-9])
def test_a_process_that_got_nothing_is_named(share: float) -> None:
    evidence = replace(quiet(3, 1), share=[1.0, share, 1.0])
    assert named(evidence) == [("process", (1,))]
