"""Ranks whose rows are made of other tensors, of as many bytes: the kernels' digest says so, to all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

_emulator = pytest.importorskip("deepep._emulator", reason="deepep._emulator is not built")

from deepep.sim.emulator import shapes  # noqa: E402
from deepep.sim.emulator.calls import DispatchCall  # noqa: E402
from deepep.sim.emulator.domain import EmulatedDomain  # noqa: E402


def phases(payloads: tuple[int, int], how: str, seed: int) -> list[int]:
    """The phase of each rank's fault record, 0 for none, after a dispatch of three tokens to either rank."""
    gpu, x = shapes.GPUS[seed % len(shapes.GPUS)], torch.zeros(3, 16, dtype=torch.bfloat16)
    idx = torch.tensor([[0], [1], [0]])
    machine = _emulator.Machine(
        num_ranks=2,
        copy_engines=gpu.ce_chunks > 0,
        max_blocks=gpu.num_blocks,
        max_threads=gpu.num_threads,
        num_sms=gpu.num_sms,
        strategy=shapes.STRATEGIES[seed % len(shapes.STRATEGIES)],
        seed=seed,
        max_steps=10**7,
    )
    domain = EmulatedDomain(
        machine,
        _emulator.own_kernels(),
        gpu,
        num_ranks=2,
        max_local_experts=1,
        staging_rows=6,
        row_bytes=64,
        slot_bytes=1 << 14,
    )
    call = DispatchCall(x, 1, 6, (0, 1), topk_idx=idx, topk_weights=torch.ones(3, 1), num_worst_tokens=6)
    if how == "cached":
        call = DispatchCall(x, 1, 6, (0, 1), cached=True)
    in_rank = idx == torch.tensor([[0, 1]])  # [T, R]
    counts = torch.tensor([[2, 1], [2, 1]], dtype=torch.int32)
    for rank, payload in enumerate(payloads):
        ones = torch.tensor([2, 1], dtype=torch.int32)
        first = torch.tensor([[0, -1], [-1, 0], [1, -1]], dtype=torch.int32)  # a token's row at each rank
        send_row = torch.where(in_rank, first + rank * counts[0], -1).to(torch.int32)
        plan = domain.given_plan(rank, counts, send_row) if how == "cached" else domain.new_plan(rank, 3)
        by_topk = how == "top-k"
        layout = domain.layout_inside(rank, 3) if by_topk else domain.given_layout(rank, ones, ones, in_rank)
        domain.dispatch(rank, replace(call, payload=payload, by_topk=by_topk), layout, plan)
    while (outcome := machine.run()).status != "done":
        assert outcome.status != "failed", outcome.text
    faults = [domain.take_fault(rank) for rank in (0, 1)]
    return [0 if fault is None else fault.phase for fault in faults]


@pytest.mark.parametrize("how", ["layout", "top-k", "cached"])
def test_numbers_of_payloads_are_compared(how: str) -> None:
    for seed in range(3):
        assert phases((5, 5), how, seed) == [0, 0]
        assert phases((5, 0xFFFFFFFF), how, seed) == [_emulator.DISAGREEMENT] * 2
