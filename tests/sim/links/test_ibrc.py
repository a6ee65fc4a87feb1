"""NVSHMEM's own IBRC transport, as its wheel ships it, between CPU processes over the wire without a NIC."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.wire import build, nvshmem_library, why_no_nvshmem

from deepep.runtime.traffic_lanes import TrafficLanes
from deepep.sim.links import loopverbs
from deepep.sim.links.hosts import WireOptions, WireResult, run_on_wire

_REASON = loopverbs.why_not() or why_no_nvshmem()
pytestmark = pytest.mark.skipif(_REASON != "", reason=_REASON or "it can be run")

ADDITIONS = 50  # ibrc_probe.cpp


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Path(__file__).with_name("ibrc_probe.cpp"), tmp_path_factory.mktemp("probe") / "ibrc_probe")


@dataclass(frozen=True)
class Run:
    result: WireResult
    lines: dict[int, list[str]]

    def totals(self, name: str) -> list[int]:
        """A number of each rank's last line: "wrong", "read" or "sum"."""
        return [int(re.findall(rf"{name} (-?\d+)", said[-1])[0]) for _, said in sorted(self.lines.items())]


def run(probe: Path, folder: Path, wire: WireOptions, rounds: int, size: int, signal: str = "add") -> Run:
    folder.mkdir()
    plugin = nvshmem_library("nvshmem_transport_ibrc.so.3")
    lines: dict[int, list[str]] = {rank: [] for rank in range(wire.ranks)}
    command = [str(probe), str(plugin), str(folder), str(rounds), str(size), signal]
    result = run_on_wire(wire, command, lambda rank, line: lines[rank].append(line))
    return Run(result, lines)


def wire(ranks: int, **manners: object) -> WireOptions:
    return WireOptions(ranks=ranks, ranks_per_domain=1, deadline=120.0, **manners)  # type: ignore[arg-type]


def check(ran: Run, rounds: int, size: int) -> None:
    """All ranks ended well, saw what was signalled, and the wire carried that and no more."""
    ranks = len(ran.result.statuses)
    assert ran.result.statuses == [0] * ranks, ran.lines
    assert ran.totals("wrong") == ran.totals("read") == ran.totals("sum") == [0] * ranks
    for source in range(ranks):
        for target in set(range(ranks)) - {source}:
            sent = ran.result.traffic[source, target]
            assert sent.bytes == rounds * size
            answers = 2 * rounds + (ADDITIONS if target == 0 else 0)
            assert sent.atomics == answers
            assert sent.requests == rounds + answers + 1  # and a read


@pytest.mark.parametrize(
    ("ranks", "rounds", "size", "manners"),
    [
        (2, 20, 8, {}),
        (2, 3, 3 << 20, {"delay_us": 200}),
        (3, 10, 65536, {"delay_us": 300, "seed": 7}),
        (4, 10, 4096, {"weak": True, "delay_us": 300}),
        (2, 4, 2 << 20, {"weak": True, "delay_us": 2000}),
    ],
)
def test_what_is_put_with_an_added_signal_is_there(
    probe: Path, tmp_path: Path, ranks: int, rounds: int, size: int, manners: dict
) -> None:
    ran = run(probe, tmp_path / "told", wire(ranks, **manners), rounds, size)
    check(ran, rounds, size)
    if manners.get("weak"):
        assert sum(sent.late for sent in ran.result.traffic.values()) > 0


@pytest.mark.parametrize("roce", [False, True])
def test_lanes_are_taken_from_their_variables(
    probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roce: bool
) -> None:
    for name, value in TrafficLanes(service_level=5, traffic_class=104).environment().items():
        monkeypatch.setenv(name, value)
    ran = run(probe, tmp_path / "told", wire(2, roce=roce), 2, 64)
    check(ran, 2, 64)
    lanes = {(sent.service_level, sent.traffic_class) for sent in ran.result.traffic.values()}
    assert lanes == {(5, 104 if roce else 0)}  # a traffic class is RoCE's


def test_a_set_signal_does_not_carry_its_data_in_weak_order(probe: Path, tmp_path: Path) -> None:
    # The plug-in sets a signal by a plain write. Why kernels add: docs/operations.md.
    ran = run(probe, tmp_path / "told", wire(2, weak=True, delay_us=3000), 40, 1024, "set")
    assert ran.result.statuses == [0, 0], ran.lines
    assert sum(ran.totals("wrong")) > 0


def test_several_queue_pairs_a_peer(probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_IB_NUM_RC_PER_DEVICE", "3")
    check(run(probe, tmp_path / "told", wire(2, delay_us=300), 10, 4096), 10, 4096)


def test_a_nic_that_dies_leaves_the_others_waiting_and_alive(
    probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IBRC_PROBE_SECONDS", "3")
    ran = run(probe, tmp_path / "told", wire(3, silent={1: 9}), 20, 64)
    assert ran.result.statuses == [3, 3, 3], ran.lines  # each ended by its own deadline
    missed = {rank: said[-1].split() for rank, said in ran.lines.items()}
    assert all(said[0] == "missing" for said in missed.values())
    assert "1" in missed[0]
    assert "1" in missed[2]
    assert sum(sent.requests for (source, _), sent in ran.result.traffic.items() if source == 1) == 9


def test_another_interface_is_noticed(probe: Path, tmp_path: Path) -> None:
    # A plug-in whose structures are others: here one that has no such function at all.
    tmp_path.joinpath("told").mkdir()
    command = [str(probe), str(nvshmem_library("nvshmem_bootstrap_uid.so.3")), str(tmp_path / "told")]
    lines: list[str] = []
    result = run_on_wire(wire(1), [*command, "1", "8", "add"], lambda rank, line: lines.append(line))
    assert result.statuses == [5]
    assert "nvshmemt_init" in lines[-1]
