"""Two-level dispatch and combine of more ranks than a mask of 32 bits has, on the emulator."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from deepep import RangeError
from deepep.runtime import backends
from deepep.sim.cases.case import Case
from deepep.sim.cases.options import Options
from deepep.sim.emulator.calls import Gpu
from deepep.sim.explore.emulated import run
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.scenarios import Scenario, Stop

MORE = [(64, 8), (40, 4), (48, 16), (62, 31), (60, 2)]
"""Ranks, and those of a domain; some 2 GB and a quarter of a minute each: with DEEPEP_TEST_MANY_RANKS=1."""
GRIDS = [(39, 8), *(MORE if os.environ.get("DEEPEP_TEST_MANY_RANKS") else [])]


def routed(num_ranks: int, per_domain: int, tokens: int, *, masked: tuple[int, ...] = (), **how: Any) -> Case:
    """Every token goes to two ranks at random; the last rank has none of its own."""
    rng = np.random.default_rng(num_ranks + per_domain)
    idx = [np.stack([rng.permutation(num_ranks)[:2] for _ in range(tokens)]) for _ in range(num_ranks)]
    idx[-1] = idx[-1][:0]
    options = Options(mode="ht", reduce="domain", ranks_per_node=per_domain, **how)
    return Case(num_ranks, tuple(idx), 16, options=options, seed=3, masked=masked)


def scenario_of(*cases: Case) -> Scenario:
    gpu = Gpu(num_blocks=1, num_threads=64, window=16, timeout=1.0)
    return Scenario(cases, gpu, between_domains=True)


def check(case: Case, seed: int) -> None:
    report = run(scenario_of(case), draw_schedule(seed), max_steps=50_000_000)
    assert report.kind == "ok", report.text


def test_one_rank_more_than_a_warp_has_lanes() -> None:
    """It has a domain of its own, and is the gateway of all others there."""
    check(routed(33, 8, 2, payload="fp8", combine_rows="other", biases=1, combine_weights=True), seed=1)


def test_ranks_beyond_a_mask_that_take_no_part() -> None:
    """Others are the gateways in their place, of one of the domains that rank 32 begins or parts."""
    check(routed(36, 8, 1, masked=(3, 32, 35), biases=2), seed=2)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "per_domain"), GRIDS)
def test_more_of_them(ranks: int, per_domain: int) -> None:
    check(routed(ranks, per_domain, 3, cached=True, combine_weights=True), seed=ranks)
    check(routed(ranks, per_domain, 1, masked=(1, ranks - 1), worst="exact"), seed=per_domain)


def test_a_rank_beyond_a_mask_is_named_when_it_stops() -> None:
    case = routed(34, 17, 1)
    stops = (Stop(rank=33, at=0),)
    report = run(scenario_of(case), draw_schedule(3), stops=stops, max_steps=50_000_000)
    assert report.kind == "fault", report.text
    assert set(report.faults) == set(range(33))
    assert any(33 in fault.waited_on for fault in report.faults.values())
    assert all(16 in fault.waited_on or 33 in fault.waited_on for fault in report.faults.values())


@pytest.mark.parametrize(
    ("num_ranks", "per_domain", "refused"),
    [
        (33, 0, "33 ranks in a domain; its kernels serve at most 32"),
        (80, 40, "40 ranks in a domain; its kernels serve at most 32"),
        (257, 32, "257 ranks; its kernels serve at most 256"),
        (62, 2, "31 domains; its kernels serve at most 30"),
        (33, 32, ""),
        (240, 8, ""),
    ],
)
def test_groups_that_the_kernels_serve(num_ranks: int, per_domain: int, refused: str) -> None:
    class Group(torch.distributed.ProcessGroup):
        def __init__(self) -> None:
            super().__init__(0, num_ranks)

    asked: dict[str, Any] = {"num_ranks": num_ranks, "ranks_per_domain": per_domain}
    if not refused:
        assert backends.choose("emulator", Group(), torch.device("cpu"), **asked)[0].name == "emulator"
        return
    with pytest.raises(RangeError, match=refused):
        backends.choose("emulator", Group(), torch.device("cpu"), **asked)
