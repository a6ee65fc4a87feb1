"""Traffic is counted exactly, costs follow from it, and the plan chosen is the cheapest: pure parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep.collectives import PlanTable, ReductionPlan
from deepep.collectives.codecs import FIXED
from deepep.collectives.cost import LinkSpeeds, find_groups, predicted
from deepep.collectives.plan_table import (
    LEAST_GAIN,
    SIZES,
    PlanEntry,
    candidates,
    codecs_of,
    load_plan,
    settled,
    shortlist,
)
from deepep.collectives.probe import pairings
from deepep.collectives.traffic import traffic_of
from deepep.errors import RangeError
from deepep.sim.cases.reductions import draw_reduction
from deepep.sim.links.clusters import CLUSTERS, EmulatedCluster, cluster

KB, MB = 1 << 10, 1 << 20


def speeds_of(described: EmulatedCluster) -> LinkSpeeds:
    """Speeds as found without error; an exchange takes the delay twice, as gloo asks before it sends."""
    ranks = range(described.num_ranks)
    latency = tuple(
        tuple(2 * described.path(i, j)[1] + 3e-4 if i != j else 0.0 for j in ranks) for i in ranks
    )
    rate = tuple(tuple(described.bottleneck(i, j) if i != j else 0.0 for j in ranks) for i in ranks)
    groups = find_groups(latency, rate)
    return LinkSpeeds(latency, rate, groups, described.uplink_rate)


def best(name: str, size: int, codec: str = FIXED) -> PlanEntry:
    speeds = speeds_of(cluster(name))
    return shortlist(candidates(codec, speeds.groups), size, speeds)[0]


def seconds(name: str, size: int, plan: ReductionPlan) -> float:
    return predicted(traffic_of(plan, size // 4, 8), speeds_of(cluster(name)))


# traffic


def sent_by_cases(context: Any, seeds: range) -> list[int]:
    from deepep.collectives.communicator import Communicator

    sent = []
    with Communicator(context.group, timeout=60.0) as comm:
        for seed in seeds:
            case, before = draw_reduction(seed, context.num_ranks), comm.bytes_sent
            comm.all_reduce(case.inputs()[context.rank], case.plan, mean=case.mean, dice=case.dice)
            sent.append(comm.bytes_sent - before)
    return sent


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_traffic_is_what_ranks_send(world_of: Callable[[int], Any], num_ranks: int) -> None:
    """Byte for byte, on every rank, of drawn plans, sizes and dtypes."""
    seeds = range(500, 530)
    for rank, sent in enumerate(world_of(num_ranks).run(sent_by_cases, seeds)):
        cases = [draw_reduction(seed, num_ranks) for seed in seeds]
        assert sent == [traffic_of(c.plan, c.count, num_ranks, c.dtype).sent_by(rank) for c in cases]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_what_is_sent_is_received_and_nobody_sends_to_itself(seed: int, num_ranks: int) -> None:
    case = draw_reduction(seed, num_ranks)
    traffic = traffic_of(case.plan, case.count, num_ranks, case.dtype)
    for one in [*traffic.ahead, *(one for piece in traffic.pieces for one in piece)]:
        assert one
        assert all(i != j and 0 <= i < num_ranks and 0 <= j < num_ranks for i, j in one)
        assert all(size > 0 for size in one.values())


# cost


def uniform(ranks: int, latency: float, rate: float) -> LinkSpeeds:
    def square(value: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(0.0 if i == j else value for j in range(ranks)) for i in range(ranks))

    return LinkSpeeds(square(latency), square(rate), (tuple(range(ranks)),))


def test_times_on_equal_links_are_those_of_the_textbook() -> None:
    ranks, latency, rate, size = 8, 1e-3, 1e8, 1 << 20
    speeds, parts = uniform(ranks, latency, rate), 2 * (ranks - 1)

    def time(name: str, pieces: int = 1) -> float:
        return predicted(traffic_of(ReductionPlan(name, "plain", pieces=pieces), size // 4, ranks), speeds)

    assert time("oneshot") == pytest.approx(latency + (ranks - 1) * size / rate)
    assert time("direct") == pytest.approx(2 * latency + parts * size / ranks / rate)
    assert time("ring") == pytest.approx(parts * latency + parts * size / ranks / rate)
    assert time("ring", 2) == pytest.approx(parts * latency + (parts + 1) * size / ranks / 2 / rate)
    assert time("ring", 16) == pytest.approx(
        latency + parts * size / ranks / rate
    )  # no faster than its links
    assert time("native") == pytest.approx(time("ring"), rel=1e-4)
    assert time("tree") == pytest.approx(2 * 3 * (latency + size / rate))
    assert time("chain") == pytest.approx(parts * (latency + size / rate))
    assert time("chain", 16) == pytest.approx(parts * latency + (parts + 15) * size / 16 / rate)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 8),
    st.floats(1.0, 10.0),
    st.lists(st.floats(1e6, 1e9), min_size=64, max_size=64),
    st.lists(st.floats(1e-5, 1e-2), min_size=64, max_size=64),
)
def test_better_links_never_take_longer(
    seed: int, ranks: int, factor: float, rates: list[float], delays: list[float]
) -> None:
    def square(values: list[float], by: float) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(values[8 * i + j] * by for j in range(ranks)) for i in range(ranks))

    case = draw_reduction(seed, ranks)
    traffic = traffic_of(case.plan, case.count, ranks, case.dtype)
    everyone = (tuple(range(ranks)),)
    now = predicted(traffic, LinkSpeeds(square(delays, 1.0), square(rates, 1.0), everyone))
    faster = predicted(traffic, LinkSpeeds(square(delays, 1.0), square(rates, factor), everyone))
    nearer = predicted(traffic, LinkSpeeds(square(delays, 1 / factor), square(rates, 1.0), everyone))
    assert faster <= now * (1 + 1e-9)
    assert nearer <= now * (1 + 1e-9)
    halves = LinkSpeeds(square(delays, 1 / factor), square(rates, factor), everyone)
    assert predicted(traffic, halves) == pytest.approx(now / factor)


# groups


def test_groups_are_those_of_the_racks() -> None:
    assert speeds_of(cluster("racks")).groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert speeds_of(cluster("interleaved")).groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    for name in ("flat", "far"):
        assert len(speeds_of(cluster(name)).groups) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=9), st.randoms(use_true_random=False))
def test_groups_are_found_through_noise(labels: list[int], chance: Any) -> None:
    """Any partition, times of a pair up to 1.4 too long, links across four times slower or later."""
    ranks = range(len(labels))
    for latency_alone in (False, True):
        factor = [[chance.uniform(1, 1.4) * (1 if a == b else 4) for b in labels] for a in labels]
        flat = tuple(tuple(1e8 if i != j else 0.0 for j in ranks) for i in ranks)
        rate = tuple(tuple(1e8 / factor[i][j] if i != j else 0.0 for j in ranks) for i in ranks)
        latency = tuple(tuple(1e-3 * factor[i][j] if i != j else 0.0 for j in ranks) for i in ranks)
        wanted: dict[int, list[int]] = {}
        for rank in ranks:
            wanted.setdefault(labels[rank], []).append(rank)
        if len(wanted) == len(labels):  # nobody is near anybody
            continue
        found = find_groups(latency, flat if latency_alone else rate)
        assert sorted(found) == sorted(map(tuple, wanted.values()))


@pytest.mark.parametrize("ranks", range(2, 10))
def test_in_pairings_everybody_meets_everybody_once(ranks: int) -> None:
    met = []
    for one in pairings(ranks):
        members = [rank for pair in one for rank in pair]
        assert len(members) == len(set(members))
        met += one
    assert sorted(met) == [(i, j) for i in range(ranks) for j in range(i + 1, ranks)]


# choice


def test_the_best_plans_are_what_the_clusters_ask_for() -> None:
    assert best("far", 4 * KB).plan.schedule == "oneshot"
    assert best("flat", 4 * MB).plan.schedule in ("direct", "ring", "native")
    for name in ("racks", "interleaved"):
        chosen = best(name, 4 * MB, "fp8").plan
        assert (chosen.schedule, chosen.groups) == ("hierarchical", speeds_of(cluster(name)).groups)
    # The ranks in the order of their numbers cross the uplinks at every step.
    assert best("interleaved", 4 * MB).seconds < 0.4 * seconds("interleaved", 4 * MB, ReductionPlan("native"))
    assert best("far", 4 * KB).seconds < 0.35 * seconds("far", 4 * KB, ReductionPlan("native"))


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("codec", ["fixed32", "plain", "fp8", "bf16"])
def test_the_list_has_the_cheapest_and_the_transports_own(name: str, codec: str) -> None:
    speeds = speeds_of(cluster(name))
    for size in SIZES:
        plans = candidates(codec, speeds.groups)
        listed = shortlist(plans, size, speeds)
        times = [predicted(traffic_of(plan, size // 4, 8), speeds) for plan in plans]
        assert listed[0].seconds == min(times)
        assert [entry.seconds for entry in listed[:3]] == sorted(entry.seconds for entry in listed[:3])
        assert any(entry.plan.schedule == "native" for entry in listed) == (codec in ("fixed32", "plain"))


def test_one_schedule_may_be_asked_for() -> None:
    groups = ((0, 1), (2, 3))
    assert {plan.schedule for plan in candidates("fp8", groups, "hierarchical")} == {"hierarchical"}
    assert candidates("fp8", ((0, 1),), "hierarchical") == [
        ReductionPlan("hierarchical", "fp8", "", ((0, 1),))
    ]


def test_what_is_in_use_stays_unless_another_is_clearly_faster() -> None:
    listed = [PlanEntry(4096, ReductionPlan(name), 1.0) for name in ("direct", "ring", "native")]
    ring = listed[1].plan
    assert settled(listed, [0.5, 0.9, 0.7], None).plan.schedule == "direct"
    assert settled(listed, [0.5, 0.5 / (1 - LEAST_GAIN) - 1e-9, 0.7], ring).plan == ring
    assert settled(listed, [0.5, 0.5 / (1 - LEAST_GAIN) + 1e-3, 0.7], ring).plan.schedule == "direct"
    assert settled(listed, [0.5, 0.9, 0.7], None).is_measured


def table() -> PlanTable:
    entries = [
        PlanEntry(size, ReductionPlan("direct", codec), size / 1e6)
        for size in SIZES
        for codec in (FIXED, "fp8")
    ]
    return PlanTable(((0, 1), (2,)), tuple(entries), 3)


def test_a_table_has_the_nearest_size() -> None:
    plans = table()
    for size, wanted in (
        (0, 4 * KB),
        (31 * KB, 4 * KB),
        (33 * KB, 256 * KB),
        (2 * MB, 4 * MB),
        (1 << 30, 4 * MB),
    ):
        assert plans.entry_for("fp8", size).size == wanted
    with pytest.raises(
        RangeError, match="compression: got 'bf16'; allowed: codecs of the plan: fixed32, fp8"
    ):
        plans.entry_for("bf16", 10)
    assert plans.expected_seconds("fp8", 1) == pytest.approx(4 * KB / 1e6)
    assert plans.expected_seconds("fp8", 100 * KB) == pytest.approx(100 * KB / 1e6)
    assert plans.expected_seconds("fp8", 8 * MB) == pytest.approx(8 * MB / 1e6)


def test_a_table_is_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    table().save(path)
    assert PlanTable.load(path) == table() == load_plan(path)
    ReductionPlan("ring").save(path)
    assert load_plan(path) == ReductionPlan("ring")
    with pytest.raises(RangeError, match=r"a file that PlanTable.save wrote"):
        PlanTable.load(path)
    text = '{"version": 2, "table": {"groups": [[0]], "entries": [], "version": 0}}'
    path.write_text(text)
    with pytest.raises(RangeError):
        load_plan(path)


def test_codecs_follow_from_the_options() -> None:
    assert codecs_of("off", True) == ("fixed32",)
    assert codecs_of("fp16", False) == ("fp16", "plain")
    assert codecs_of("auto", True) == ("fp8", "bf16", "fixed32")
