"""`Buffer(ranks_per_domain=)` on GPUs: processes as if on several hosts, puts over NVSHMEM and a wire.

With one GPU its processes share it; MPS lets their kernels run together, without it they take turns.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deepep.backends.cuda.memory import remote
from deepep.sim.links import loopverbs
from deepep.sim.links.hosts import WireOptions, WireResult, run_on_wire

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(remote.why_not() != "", reason=remote.why_not() or "NVSHMEM is there"),
    pytest.mark.skipif(loopverbs.why_not() != "", reason=loopverbs.why_not() or "the wire can be built"),
]
PROGRAM = Path(__file__).with_name("domain_ranks.py")
FOUR = WireOptions(ranks=4, ranks_per_domain=2, deadline=300.0)


def run(wire: WireOptions, rounds: int, *arguments: str) -> tuple[WireResult, str]:
    lines: list[tuple[int, str]] = []
    command = [sys.executable, str(PROGRAM), str(rounds), str(wire.ranks_per_domain), *arguments]
    result = run_on_wire(wire, command, lambda rank, line: lines.append((rank, line)))
    return result, "\n".join(f"{rank}: {line.rstrip()}" for rank, line in lines)


@pytest.mark.parametrize(
    "wire",
    [
        replace(FOUR, ranks=2, ranks_per_domain=1),
        FOUR,
        replace(FOUR, weak=True, delay_us=200, seed=7),
    ],
    ids=["2x1", "2x2", "2x2 in weak order"],
)
def test_the_same_bits_as_the_reference_backend(wire: WireOptions) -> None:
    result, said = run(wire, 3)
    assert result.statuses == [0] * wire.ranks, said
    assert said.count(": equal") == wire.ranks, said
    if wire.ranks == 4:  # rows cross to gateways alone: ranks of the same local index
        for (source, target), sent in result.traffic.items():
            is_rail = source % 2 == target % 2 and source != target
            assert (sent.bytes > 1 << 20) == is_rail, (source, target, sent)


def test_a_nic_that_falls_silent_is_waited_for_no_longer_than_the_deadline() -> None:
    result, said = run(replace(FOUR, silent={1: 1500}), 20, "silent")
    assert result.statuses == [0] * 4, said
    assert said.count(": timed out") == 4, said
