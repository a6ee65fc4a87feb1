"""`Buffer(ranks_per_domain=)` on GPUs: processes as if on several hosts, puts over NVSHMEM and a wire.

With one GPU its processes share it; MPS lets their kernels run together, without it they take turns.
DEEPEP_TEST_OPERATIONS: operations in a row, of the tests that make many; 400 if it is not set.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.sources import ROOT

from deepep.backends.cuda.memory import remote
from deepep.sim.links import loopverbs
from deepep.sim.links.hosts import WireOptions, WireResult, run_on_wire

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(remote.why_not() != "", reason=remote.why_not() or "NVSHMEM is there"),
    pytest.mark.skipif(loopverbs.why_not() != "", reason=loopverbs.why_not() or "the wire can be built"),
]
THROUGHPUT = Path(__file__).with_name("domain_ranks.py")
LOW_LATENCY = Path(__file__).with_name("low_latency_domain_ranks.py")
FOUR = WireOptions(ranks=4, ranks_per_domain=2, deadline=300.0)
TWO = replace(FOUR, ranks=2, ranks_per_domain=1)
WEAK = {"weak": True, "delay_us": 200, "seed": 7}
OPERATIONS = int(os.environ.get("DEEPEP_TEST_OPERATIONS") or 400)

#: Bytes that NVSHMEM itself may send a peer, when it starts and ends.
OWN_BYTES = 1 << 16


def run(wire: WireOptions, program: Path, rounds: int, *arguments: str) -> tuple[WireResult, str]:
    lines: list[tuple[int, str]] = []
    command = [sys.executable, str(program), str(rounds), str(wire.ranks_per_domain), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
        # Under MPS, ranks share the GPU's queues: of four with 32 each, one got no context.
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", str(64 // wire.ranks))
        result = run_on_wire(wire, command, lambda rank, line: lines.append((rank, line)))
    return result, "\n".join(f"{rank}: {line.rstrip()}" for rank, line in lines)


def check(wire: WireOptions, program: Path, rounds: int, tried: str) -> None:
    """Bits are right, and what crosses is what the ranks say: so many bytes, or from so many to so many."""
    result, said = run(wire, program, rounds, tried)
    assert result.statuses == [0] * wire.ranks, said
    assert said.count(": equal") == wire.ranks, said
    lines = (line.partition(": crossed: ") for line in said.splitlines())
    rule = {int(rank): json.loads(sizes) for rank, _, sizes in lines if sizes}
    for source, sizes in rule.items():
        for target, size in enumerate(sizes):
            least, most = size if isinstance(size, list) else (size, size)
            sent = result.traffic.get((source, target))
            crossed = 0 if sent is None else sent.bytes
            assert least <= crossed <= most + OWN_BYTES, (source, target, crossed, size)


@pytest.mark.parametrize(
    "wire",
    [
        TWO,
        FOUR,
        replace(FOUR, **WEAK),
    ],
    ids=["2x1", "2x2", "2x2 in weak order"],
)
def test_the_same_bits_as_the_reference_backend(wire: WireOptions) -> None:
    result, said = run(wire, THROUGHPUT, 3)
    assert result.statuses == [0] * wire.ranks, said
    assert said.count(": equal") == wire.ranks, said
    if wire.ranks == 4:  # rows cross to gateways alone: ranks of the same local index
        for (source, target), sent in result.traffic.items():
            is_rail = source % 2 == target % 2 and source != target
            assert (sent.bytes > 1 << 20) == is_rail, (source, target, sent)


def test_a_nic_that_falls_silent_is_waited_for_no_longer_than_the_deadline() -> None:
    result, said = run(replace(FOUR, silent={1: 1500}), THROUGHPUT, 20, "silent")
    assert result.statuses == [0] * 4, said
    assert said.count(": timed out") == 4, said


@pytest.mark.parametrize(
    "wire",
    [TWO, FOUR, replace(TWO, **WEAK), replace(FOUR, **WEAK)],
    ids=["2x1", "2x2", "2x1 in weak order", "2x2 in weak order"],
)
def test_low_latency_has_the_same_bits_and_sends_what_it_should(wire: WireOptions) -> None:
    check(wire, LOW_LATENCY, 12, "equal")


@pytest.mark.parametrize("wire", [TWO, FOUR], ids=["2x1", "2x2"])
@pytest.mark.parametrize("reduction", ["exact", "domain"])
def test_other_reductions_in_low_latency(wire: WireOptions, reduction: str) -> None:
    check(wire, LOW_LATENCY, 12, reduction)


@pytest.mark.parametrize("wire", [replace(TWO, **WEAK), replace(FOUR, **WEAK)], ids=["2x1", "2x2"])
def test_many_low_latency_calls_in_a_row(wire: WireOptions) -> None:
    """Two operations a call. In weak order with delays: memory is used again every second call."""
    check(wire, LOW_LATENCY, OPERATIONS // 2, "many")


@pytest.mark.parametrize("wire", [TWO, FOUR], ids=["2x1", "2x2"])
def test_captured_low_latency_calls(wire: WireOptions) -> None:
    """A graph has the kernels that serve its puts; each replay counts on from where the last call was."""
    check(wire, LOW_LATENCY, 36, "graph")


@pytest.mark.parametrize("wire", [replace(TWO, **WEAK), replace(FOUR, **WEAK)], ids=["2x1", "2x2"])
def test_many_throughput_operations_in_a_row(wire: WireOptions) -> None:
    check(wire, THROUGHPUT, OPERATIONS, "many")


@pytest.mark.parametrize("wire", [TWO, FOUR], ids=["2x1", "2x2"])
def test_a_gate_that_keeps_one_domain_sends_a_token_to_no_other(wire: WireOptions) -> None:
    check(wire, THROUGHPUT, 4, "groups")


@pytest.mark.parametrize("wire", [TWO, FOUR], ids=["2x1", "2x2"])
@pytest.mark.parametrize("requests", [100, 103])
def test_low_latency_waits_for_a_silent_nic_no_longer_than_the_deadline(
    wire: WireOptions, requests: int
) -> None:
    """NVSHMEM has started by then. The two lie in different puts, or between a put and its signal."""
    result, said = run(replace(wire, silent={1: requests}, deadline=90.0), LOW_LATENCY, 1000, "silent")
    assert result.statuses == [0] * wire.ranks, said
    assert said.count(": timed out") == wire.ranks, said
