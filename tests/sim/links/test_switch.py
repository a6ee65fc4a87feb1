"""Emulated networks: the switch in virtual time, the clusters' paths, namespaces that carry what is sent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepep.sim import World
from deepep.sim.links import clusters
from deepep.sim.links.emulated import HINT, EmulatedNetwork, NetworkError, why_not
from deepep.sim.links.measuring import LinkMeasurement
from deepep.sim.links.switch import Network


class Run:
    """A switch in virtual time, that is looked at every so often."""

    def __init__(self, cluster: clusters.EmulatedCluster) -> None:
        self.now = 0.0
        self.arrived: list[tuple[float, int, bytes]] = []
        described = json.loads(cluster.to_json())
        self.network = Network(described, lambda to, packet: self.arrived.append((self.now, to, packet)))

    def until_empty(self) -> None:
        """To each next time that something is due."""
        due = self.network.advance(self.now)
        while due is not None:
            self.now = due
            due = self.network.advance(due)


def test_a_packet_takes_its_links_times_and_its_delay() -> None:
    run = Run(clusters.EmulatedCluster("two", ((0, 1),), (1000.0, 500.0), delay=0.25))
    run.network.send(0.0, 0, 1, b"x" * 100)
    run.until_empty()
    assert [(when, to) for when, to, _ in run.arrived] == [(pytest.approx(0.1 + 0.2 + 0.25), 1)]


def test_ranks_share_their_groups_uplink() -> None:
    """Two senders of a rack get half of it each, two receivers of one sender half of its port each."""
    racks = clusters.EmulatedCluster("racks", ((0, 1), (2, 3)), (1000.0,) * 4, uplink_rate=100.0)
    run = Run(racks)
    for _ in range(10):
        run.network.send(0.0, 0, 2, b"x" * 10)
        run.network.send(0.0, 1, 3, b"x" * 10)
    run.until_empty()
    ends = {to: max(when for when, t, _ in run.arrived if t == to) for to in (2, 3)}
    assert all(end == pytest.approx(200 / 100, rel=0.1) for end in ends.values())


def test_a_packet_that_waits_elsewhere_holds_up_nobody() -> None:
    """The receiver's port is free until the slow sender's packet has come."""
    run = Run(clusters.EmulatedCluster("three", ((0, 1, 2),), (1.0, 1000.0, 1000.0)))
    run.network.send(0.0, 0, 2, b"x" * 100)
    run.network.send(0.0, 1, 2, b"y" * 100)
    run.until_empty()
    assert [packet[:1] for _, _, packet in run.arrived] == [b"y", b"x"]
    assert run.arrived[0][0] == pytest.approx(0.2)


def test_links_change_for_what_is_sent_afterwards() -> None:
    cluster = clusters.cluster("flat", 2)
    run = Run(cluster)
    run.network.change(json.loads(cluster.slowed(1, 5.0).to_json()))
    run.network.send(0.0, 0, 1, b"x" * 5000)
    run.until_empty()
    assert run.arrived[0][0] == pytest.approx(5000 / 10e6 + 5000 / 2e6 + 2e-4)


@st.composite
def _sendings(draw: st.DrawFn) -> tuple[clusters.EmulatedCluster, list[tuple[float, int, int, int]]]:
    name, ranks = draw(st.sampled_from(sorted(clusters.CLUSTERS))), draw(st.integers(2, 6))
    packet = st.tuples(st.floats(0, 0.01), st.integers(0, ranks - 1), st.integers(0, ranks - 1))
    sends = draw(st.lists(st.tuples(packet, st.integers(20, 9000)), max_size=40))
    return clusters.cluster(name, ranks), [(*p, size) for p, size in sends if p[1] != p[2]]


@settings(max_examples=100, deadline=None)
@given(_sendings(), st.floats(1e-5, 1e-2))
def test_every_packet_arrives_once_in_order_and_no_link_is_faster_than_its_rate(
    drawn: tuple[clusters.EmulatedCluster, list[tuple[float, int, int, int]]], tick: float
) -> None:
    """However late the switch is woken: it is, up to a tick, in what it delivers alone."""
    cluster, sends = drawn
    run, sends = Run(cluster), sorted(sends)
    for number, (when, source, target, size) in enumerate(sends):
        while run.now + tick < when:
            run.now += tick
            run.network.advance(run.now)
        run.network.send(when, source, target, number.to_bytes(20, "big").ljust(size, b"\0"))
    run.until_empty()
    numbers = [int.from_bytes(packet[:20], "big") for _, _, packet in run.arrived]
    assert sorted(numbers) == list(range(len(sends)))
    for pair in {(source, target) for _, source, target, _ in sends}:
        mine = [number for number in numbers if sends[number][1:3] == pair]
        assert mine == sorted(mine)
    for (when, _, _), number in zip(run.arrived, numbers, strict=True):
        sent, source, target, size = sends[number]
        links, delay = cluster.path(source, target)
        assert when >= sent + delay + sum(size / cluster.rates[link] for link in links) - 1e-9
    for link, rate in enumerate(cluster.rates):
        crossing = [s for s in sends if link in cluster.path(s[1], s[2])[0]]
        if crossing:
            last = max(w for (w, _, _), n in zip(run.arrived, numbers, strict=True) if sends[n] in crossing)
            assert last - crossing[0][0] >= sum(s[3] for s in crossing) / rate - 1e-9


@pytest.mark.parametrize("name", clusters.CLUSTERS)
@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_paths_begin_and_end_at_the_ranks_own_ports(name: str, ranks: int) -> None:
    cluster = clusters.cluster(name, ranks)
    for source in range(ranks):
        for target in set(range(ranks)) - {source}:
            links, delay = cluster.path(source, target)
            near = cluster.group_of(source) == cluster.group_of(target)
            assert (links[0], links[-1]) == (source, ranks + target)
            assert len(links) == (2 if near or not cluster.uplink_rate else 4)
            assert delay == (cluster.delay if near else cluster.far_delay)
            assert cluster.bottleneck(source, target) <= cluster.port_rates[source]


def test_clusters_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="cluster: got 'ring'; allowed: flat, racks"):
        clusters.cluster("ring")
    with pytest.raises(ValueError, match="ranks: got 1"):
        clusters.cluster("flat", 1)
    with pytest.raises(ValueError, match="each of 2 ranks once"):
        clusters.EmulatedCluster("x", ((0,),), (1.0, 1.0))
    with pytest.raises(ValueError, match="ports above 0"):
        clusters.EmulatedCluster("x", ((0,),), (0.0,))


def test_what_is_off_is_said() -> None:
    assert LinkMeasurement("rate", 10e6, 9e6, True).holds
    assert not LinkMeasurement("rate", 10e6, 8e6, True).holds
    assert LinkMeasurement("delay", 0.010, 0.0115, False).holds
    assert not LinkMeasurement("delay", 0.010, 0.0125, False).holds


def test_without_the_means_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NetworkError, match="iproute2"):
        EmulatedNetwork(clusters.cluster("flat", 2))
    assert why_not() == HINT


@pytest.fixture(scope="module")
def network() -> Iterator[EmulatedNetwork]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with EmulatedNetwork(clusters.cluster("racks", 2)) as made:
        yield made


def _carried(context: Any) -> tuple[int, list[str], float]:
    """A rank's own interface: bytes that it has received, all names, and a sum over the ranks."""
    import torch
    import torch.distributed as dist

    values = torch.full((50_000,), float(context.rank + 1))
    dist.all_reduce(values)
    with open("/proc/self/net/dev") as file:
        counters = {line.split(":")[0].strip(): line.split() for line in file if ":" in line}
    return int(counters["deepep0"][1]), sorted(counters), float(values[-1])


def test_ranks_in_namespaces_send_through_the_switch(network: EmulatedNetwork) -> None:
    with World(2, network=network, timeout=120.0) as world:
        for received, names, total in world.run(_carried):
            assert names == ["deepep0", "lo"]
            assert received > 200_000
            assert total == 3.0
    with pytest.raises(ValueError, match="as many ranks"):
        World(3, network=network)


def test_a_command_runs_once_a_rank_in_the_network(network: EmulatedNetwork) -> None:
    names = "'RANK', 'WORLD_SIZE', 'MASTER_ADDR'"  # in one write each: the ranks share a pipe
    code = (
        f"import os; os.write(1, ('rank ' + ' '.join(os.environ[n] for n in ({names})) + chr(10)).encode())"
    )
    ran = [sys.executable, "-m", "deepep", "links", "--ranks", "2", "--", sys.executable, "-c", code]
    done = subprocess.run(ran, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} 2 10.77.0.1" for rank in range(2)]
    failing = [*ran[:-2], "-c", "raise SystemExit(3)"]
    assert subprocess.run(failing, capture_output=True, timeout=120).returncode == 1
