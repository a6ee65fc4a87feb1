"""Buffer between two processes: the same bits for any number of SMs,
whoever is late, and after 10,000 operations.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from harness.steadiness import OPTION_SETS, Late, long_run, option_case, run_steadily

from deepep.sim import World

pytestmark = pytest.mark.gpu

LARGE = {"hidden": 7168, "topk": 8, "local_experts": 128}
SMALL = {"hidden": 144, "topk": 5, "local_experts": 3}
SMS = (1, 2, 8, 24, 132)
#: Of the long run: set DEEPEP_TEST_SEED to run others.
SEED = int(os.environ.get("DEEPEP_TEST_SEED", "11"))
OPERATIONS = 10_000


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=300) as world:
        yield world


@pytest.mark.parametrize("name", OPTION_SETS)
def test_any_number_of_sms_gives_the_same_bits(pair: World, name: str) -> None:
    """Two shapes: one for which the kernels split their roles and rows, and one with odd, small rows."""
    cases = [option_case(name, (513, 260), **LARGE), option_case(name, (0, 33), **SMALL)]
    pair.run(run_steadily, cases, num_sms=SMS, backend="cuda")


@pytest.mark.parametrize("host", [False, True], ids=["late on the device", "late on the host"])
def test_ranks_late_in_turn(pair: World, host: bool) -> None:
    names = (
        "other rows, weights, a bias",
        "two biases, cached, asynchronous",
        "fp8, padded int32 scales",
        "worst case with room",
    )
    cases = [option_case(name, (130, 257), **LARGE) for name in names]
    late = [None, *(Late(rank, host) for rank in range(2)), None]
    pair.run(run_steadily, cases, late=late, num_sms=(24,), backend="cuda")


@pytest.mark.slow
def test_ten_thousand_operations(pair: World) -> None:
    """Random shapes and options, SM counts in turn, one buffer; every result against the oracle."""
    print(f"seed {SEED} (DEEPEP_TEST_SEED)")
    begun = time.monotonic()
    told = pair.run(long_run, SEED, OPERATIONS, backend="cuda")
    assert all(rank.operations >= OPERATIONS for rank in told)
    print(f"{told[0].operations} operations in {time.monotonic() - begun:.0f} s")
    print("\n".join(f"rank {rank}: {one.digest}" for rank, one in enumerate(told)))
