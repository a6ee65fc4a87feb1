"""On a GPU, virtual ranks: kernels say whom they waited for. Two that are waited for at the same time, one of
them in time, are told apart.

pytest -m gpu tests/backends/cuda/test_waits.py
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

RANKS, TOKENS, HIDDEN, LATE = 3, 16, 512, 2
MUCH, LITTLE = 40_000_000, 10_000_000  # nanoseconds; a late rank is some 100 ms late


def late_alone(waited: list[int], rank: int) -> bool:
    """True if a rank waited for the late one, and for no other."""
    expected = [MUCH if peer == LATE != rank else 0 for peer in range(RANKS)]
    return all((got > MUCH) if least else (got < LITTLE) for got, least in zip(waited, expected, strict=True))


def test_throughput_kernels_wait_for_the_late_rank_alone() -> None:
    from harness.virtual_ranks import RankInputs, VirtualDomain

    domain = VirtualDomain(RANKS, num_sms=24, timeout=20.0)
    device = domain.device
    torch.cuda._sleep(1)  # its kernel is loaded here: later that would wait for kernels that wait for it
    sums = [torch.zeros(4, RANKS, dtype=torch.int64, device=device) for _ in range(RANKS)]
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    counts = torch.full((RANKS,), TOKENS, dtype=torch.int32, device=device)
    everywhere = torch.ones(TOKENS, RANKS, dtype=torch.bool, device=device)
    given = [RankInputs(x, everywhere, counts, counts) for _ in range(RANKS)]
    room = {"capacity": RANKS * TOKENS, "num_experts": RANKS}
    plans = [arrived.plan for arrived in domain.dispatch(given, **room)]  # kernels are loaded
    rows = [torch.ones(RANKS * TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)] * RANKS
    domain.combine(rows, plans, hidden=HIDDEN)
    assert not any(tensor.any() for tensor in sums)
    for rank, endpoint in enumerate(domain.endpoints):
        endpoint.measure_waits(sums[rank])
    for cached in (None, plans):
        domain.dispatch(given, capacity=RANKS * TOKENS, num_experts=RANKS, plans=cached, late=LATE)
        for rank in range(RANKS):
            metadata, of_rows, digests, returned = sums[rank].tolist()
            assert late_alone(metadata, rank), sums
            assert max(of_rows) < LITTLE
            assert digests == returned == [0] * RANKS
            sums[rank].zero_()
    domain.combine(rows, plans, hidden=HIDDEN, late=LATE)
    for rank in range(RANKS):
        assert late_alone(sums[rank][2].tolist(), rank), sums
        assert int(sums[rank][3].max()) < LITTLE
        sums[rank].zero_()
    for endpoint in domain.endpoints:
        endpoint.measure_waits(None)
    domain.dispatch(given, **room)
    assert not any(tensor.any() for tensor in sums)


def test_low_latency_kernels_wait_for_the_late_rank_alone() -> None:
    from harness.virtual_low_latency import VirtualLowLatency

    from deepep.backends.cuda.low_latency_launch import Halves, LowLatencyFormat, LowLatencyRoom

    ranks = VirtualLowLatency(RANKS, LowLatencyRoom(1, TOKENS, RANKS, HIDDEN), timeout=20.0)
    device = ranks.device
    torch.cuda._sleep(1)
    form = LowLatencyFormat(RANKS, 1, TOKENS, RANKS, HIDDEN, torch.int64)
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    idx = torch.arange(RANKS, device=device).expand(TOKENS, -1).contiguous()
    sums = [torch.zeros(RANKS, dtype=torch.int64, device=device) for _ in range(RANKS)]
    for late in (None, LATE):  # the first call loads the kernels
        torch.cuda.synchronize()
        for rank, endpoint in enumerate(ranks.endpoints):
            with torch.cuda.stream(ranks.streams[rank]):
                stream = ranks.streams[rank].cuda_stream
                sums[rank].zero_()
                out, plan = form.outputs(TOKENS, device, stream)
                if rank == late:
                    torch.cuda._sleep(180_000_000)
                given = (plan, x, idx, None, out, Halves.BOTH, ranks.num_blocks, stream)
                endpoint.dispatch(*given, waits=sums[rank])
        torch.cuda.synchronize()
    for rank in range(RANKS):
        assert late_alone(sums[rank].tolist(), rank), sums
