"""The low-latency kernels between domains, on virtual ranks of one GPU against the oracle, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.low_latency_trips import (
    FORMATS,
    LowLatencyShape,
    bits,
    check_received,
    form_of,
    prepared,
    round_trip,
    to_gpu,
)

pytestmark = pytest.mark.gpu

GRIDS = [(2, 1), (4, 2), (8, 4), (8, 2), (5, 3)]  # ranks, ranks per domain


def domains_of(shape: LowLatencyShape, per_domain: int, **how: Any) -> Any:
    """Puts are up to 20 us late."""
    from harness.virtual_far_low_latency import VirtualFarLowLatency

    return VirtualFarLowLatency(
        shape.ranks, form_of(shape).room, ranks_per_domain=per_domain, **{"delay": 20e-6, **how}
    )


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("ranks", "per_domain"), GRIDS)
def test_grids(ranks: int, per_domain: int, hooked: bool) -> None:
    tokens = tuple(max(0, 64 - 9 * r) for r in range(ranks))
    shape = LowLatencyShape(tokens, topk=6, hooked=hooked)
    domain = domains_of(shape, per_domain)
    for seed in range(4):
        round_trip(domain, shape, seed)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, with_weights: bool, hooked: bool) -> None:
    shape = LowLatencyShape(
        (37, 64, 0, 5), hidden=1024, with_weights=with_weights, hooked=hooked, **FORMATS[form]
    )
    domain = domains_of(shape, 2)
    for seed in range(3):
        round_trip(domain, shape, seed)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("exact", "logfmt"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("hidden", [128, 640, 1024, 7168])
def test_ways_for_rows_to_go_back(hidden: int, exact: bool, logfmt: bool, hooked: bool) -> None:
    """Rows in LogFMT are encoded in some chunks, and go as they are in others."""
    shape = LowLatencyShape((37, 64, 0, 5), hidden=hidden, topk=6, hooked=hooked, exact=exact, logfmt=logfmt)
    domain = domains_of(shape, 2)
    for seed in range(3):
        round_trip(domain, shape, seed)


@pytest.mark.parametrize("hidden", [8, 264, 7168])
@pytest.mark.parametrize("topk", [1, 8, 31])
def test_widths(hidden: int, topk: int) -> None:
    """An odd K leaves words of a message that are nobody's."""
    shape = LowLatencyShape((24, 31, 128), hidden=hidden, topk=topk, local_experts=20)
    round_trip(domains_of(shape, 1), shape, seed=2)


@pytest.mark.parametrize("num_blocks", [1, 3, 17])
def test_results_do_not_depend_on_blocks(num_blocks: int) -> None:
    shape = LowLatencyShape((37, 64, 20, 5), topk=6)
    round_trip(domains_of(shape, 2, num_blocks=num_blocks), shape, seed=1)


@pytest.mark.parametrize("hooked", [False, True])
def test_many_calls_in_a_row(hooked: bool) -> None:
    """Memory is used again every second call, while puts come in any order."""
    shape = LowLatencyShape((9, 16, 3, 12), topk=4, hooked=hooked)
    domain = domains_of(shape, 2, delay=50e-6)
    for seed in range(100):
        round_trip(domain, shape, seed)


def test_a_silent_nic_is_a_fault_that_names_its_rank() -> None:
    """Rank 3 loses all it puts: its neighbour does not notice in the dispatch."""
    shape = LowLatencyShape((8, 8, 8, 8), topk=4)
    domain = domains_of(shape, 2, silent_from={3: 0}, timeout=1.0)
    case, form = prepared(shape, 0), form_of(shape)
    domain.dispatch(form, [to_gpu(one) for one in case.inputs])
    assert domain.faults() == [("counts", (3,)), ("counts", (3,)), None, None]


def test_a_replayed_graph_counts_on() -> None:
    """Turns are counted on the device."""
    shape = LowLatencyShape((9, 16), topk=4, with_weights=True)
    case, form = prepared(shape, 3), form_of(shape)
    domain = domains_of(shape, 1)
    given = [to_gpu(one) for one in case.inputs]
    domain.dispatch(form, given)
    graphs, made = [], []
    for rank in range(shape.ranks):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=domain.streams[rank]):
            made.append(domain.dispatch_rank(rank, form, given[rank]))
        graphs.append(graph)
    for _ in range(5):
        torch.cuda.synchronize()
        domain.serve()
        for graph, stream in zip(graphs, domain.streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert domain.faults() == [None] * shape.ranks
        for (_, out), wanted in zip(made, case.layouts, strict=True):
            check_received(out, wanted)
    plans, rows = [plan for plan, _ in made], [r.to("cuda") for r in case.rows]
    for got, wanted in zip(domain.combine(plans, rows, given), case.sums, strict=True):
        assert torch.equal(bits(got), bits(wanted))
