"""Waits that throughput kernels report, in the emulated machine's time, of a rank that is late."""

from __future__ import annotations

import pytest
import torch

from deepep import _emulator
from deepep.sim.emulator.calls import CombineCall, DispatchCall, Gpu
from deepep.sim.emulator.domain import EmulatedDomain

RANKS, TOKENS, HIDDEN, LATE = 3, 4, 64, 2
PAUSE = 200_000_000  # nanoseconds
METADATA, DISPATCH_ROWS, DIGEST, RETURNED_ROWS = range(_emulator.NUM_WAITS)


@pytest.mark.parametrize("by_topk", [False, True])
def test_a_late_rank_is_waited_for_and_nobody_else(by_topk: bool) -> None:
    """Rank 2 is late by a fifth of a second in the dispatch, and in time in the combine."""
    gpu = Gpu(num_blocks=2, push_blocks=2, local_blocks=2)
    pause = _emulator.MachineFault(rank=LATE, at=1, counts_writes=False, pause_ns=PAUSE, loses_writes=False)
    machine = _emulator.Machine(
        num_ranks=RANKS,
        max_blocks=2,
        max_threads=gpu.num_threads,
        strategy="random",
        seed=5,
        max_steps=10**9,
        faults=[pause],
    )
    domain = EmulatedDomain(
        machine,
        _emulator.own_kernels(),
        gpu,
        num_ranks=RANKS,
        max_local_experts=1,
        staging_rows=RANKS * TOKENS,
        row_bytes=2 * HIDDEN + 32,
        slot_bytes=1 << 14,
    )
    live, idx = tuple(range(RANKS)), torch.arange(RANKS).expand(TOKENS, -1).contiguous()
    x, ones = torch.ones(TOKENS, HIDDEN).bfloat16(), torch.ones(RANKS, dtype=torch.int32)
    plans = []
    for rank in live:
        domain.measure_waits(rank)
        call = DispatchCall(
            x=x,
            num_local_experts=1,
            capacity=RANKS * TOKENS,
            live=live,
            topk_idx=idx,
            topk_weights=torch.ones(TOKENS, RANKS),
            num_worst_tokens=RANKS * TOKENS,
            by_topk=by_topk,
        )
        in_rank = torch.ones(TOKENS, RANKS, dtype=torch.bool)
        layout = domain.layout_inside(rank, TOKENS)
        if not by_topk:
            layout = domain.given_layout(rank, TOKENS * ones, TOKENS * ones, in_rank)
        plans.append(domain.new_plan(rank, TOKENS))
        domain.dispatch(rank, call, layout, plans[rank])
    assert machine.run().status == "done"
    before = [domain.read_waits(rank) for rank in live]
    for rank in (0, 1):
        # While all only look, time passes in jumps, each up to twice the one before.
        assert PAUSE * 0.9 < before[rank][METADATA][LATE] < PAUSE * 2
        assert before[rank][METADATA][1 - rank] < PAUSE * 0.1
    for rank in live:
        assert max(before[rank][DISPATCH_ROWS]) < PAUSE * 0.1
        assert [row[rank] for row in before[rank]] == [0] * _emulator.NUM_WAITS
        assert before[rank][DIGEST] == before[rank][RETURNED_ROWS] == [0] * RANKS
    assert max(before[LATE][METADATA]) < PAUSE * 0.1
    rows = torch.ones(RANKS * TOKENS, HIDDEN).bfloat16()
    for rank in live:
        domain.combine(rank, CombineCall(x=rows, hidden=HIDDEN, num_tokens=TOKENS, live=live), plans[rank])
    assert machine.run().status == "done"
    for rank in live:
        after = domain.read_waits(rank)
        assert after[:DIGEST] == before[rank][:DIGEST]
        assert 0 < sum(after[DIGEST]) + sum(after[RETURNED_ROWS]) < PAUSE * 0.2
        assert [row[rank] for row in after] == [0] * _emulator.NUM_WAITS
