"""Low latency in two levels, on virtual ranks of one GPU against the oracle, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
from harness.low_latency_trips import FORMATS, LowLatencyShape, form_of, round_trip

pytestmark = pytest.mark.gpu

GRIDS = [(2, 1), (4, 2), (8, 4), (8, 2), (6, 3)]  # ranks, ranks per domain


def domains_of(shape: LowLatencyShape, **how: Any) -> Any:
    """Puts are up to 20 us late."""
    from harness.virtual_far_low_latency import VirtualFarLowLatency

    given = {"delay": 20e-6, "ranks_per_domain": shape.per_domain, "has_gateways": True, **how}
    return VirtualFarLowLatency(shape.ranks, form_of(shape).room, **given)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(("ranks", "per_domain"), GRIDS)
def test_grids(ranks: int, per_domain: int, with_weights: bool) -> None:
    tokens = tuple(max(0, 64 - 9 * r) for r in range(ranks))
    shape = LowLatencyShape(tokens, topk=6, with_weights=with_weights, per_domain=per_domain)
    domain = domains_of(shape)
    for seed in range(4):
        round_trip(domain, shape, seed)


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str) -> None:
    shape = LowLatencyShape((37, 64, 0, 5), hidden=1024, per_domain=2, **FORMATS[form])
    domain = domains_of(shape)
    for seed in range(3):
        round_trip(domain, shape, seed)


@pytest.mark.parametrize("hidden", [8, 264, 7168])
@pytest.mark.parametrize("topk", [1, 8, 31])
def test_widths(hidden: int, topk: int) -> None:
    shape = LowLatencyShape((24, 31, 128, 7), hidden=hidden, topk=topk, local_experts=20, per_domain=2)
    round_trip(domains_of(shape), shape, seed=2)


@pytest.mark.parametrize("num_blocks", [1, 3, 17])
def test_results_do_not_depend_on_blocks(num_blocks: int) -> None:
    shape = LowLatencyShape((37, 64, 20, 5), topk=6, per_domain=2)
    round_trip(domains_of(shape, num_blocks=num_blocks), shape, seed=1)


def test_many_calls_in_a_row() -> None:
    """Memory is used again every second call, while puts come in any order."""
    shape = LowLatencyShape((9, 16, 3, 12), topk=4, per_domain=2)
    domain = domains_of(shape, delay=50e-6)
    for seed in range(100):
        round_trip(domain, shape, seed)


def test_a_silent_nic_is_a_fault_of_its_rail_and_of_who_is_behind_it() -> None:
    """Rank 3 loses all it puts: ranks 0 and 1 miss it; its neighbour does not notice in the dispatch."""
    from harness.low_latency_trips import prepared, to_gpu

    shape = LowLatencyShape((8, 8, 8, 8), topk=4, per_domain=2)
    domain = domains_of(shape, silent_from={3: 0}, timeout=1.0)
    case, form = prepared(shape, 0), form_of(shape)
    domain.dispatch(form, [to_gpu(one) for one in case.inputs])
    assert domain.faults() == [("counts", (3,)), ("counts", (3,)), None, None]
