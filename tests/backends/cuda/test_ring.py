"""Sends around a ring on virtual ranks of one GPU: drawn tensors, slots used again, a silent neighbour.

In one process: the sanitizers see all of it (`make test-gpu-sanitize`).
"""

from __future__ import annotations

import random

import pytest
import torch
from harness import side_primitive_cases as cases

pytestmark = pytest.mark.gpu


class VirtualRing:
    """Ranks of one device, each with its memory and its stream."""

    def __init__(self, num_ranks: int, num_slots: int, num_bytes: int, timeout: float = 20.0) -> None:
        from deepep import _cuda
        from deepep.backends.cuda.memory.ipc import SymmetricHeap
        from deepep.backends.cuda.memory.mapped import MappedMemory
        from deepep.backends.cuda.ring import Slots

        self.device = torch.device("cuda", torch.cuda.current_device())
        self.slots = Slots(num_slots, num_bytes)
        size = MappedMemory.heap_bytes(num_ranks, self.slots.num_bytes)
        heaps = [torch.full((size,), 255, dtype=torch.uint8, device=self.device) for _ in range(num_ranks)]
        live, words = (1 << num_ranks) - 1, self.slots.word_bytes
        self.memory = [
            MappedMemory(r, live, timeout, _cuda.Turns(), words, SymmetricHeap(heaps[r], heaps))
            for r in range(num_ranks)
        ]
        self.streams = [torch.cuda.Stream(self.device) for _ in heaps]
        self.calls: dict[tuple[int, int, bool], int] = {}
        torch.cuda.synchronize()

    def call(self, step: cases.Step, t: torch.Tensor) -> None:
        rank, peer = (step.dst, step.src) if step.takes else (step.src, step.dst)
        number = self.calls.get((rank, peer, step.takes), 0)
        self.calls[rank, peer, step.takes] = number + 1
        launch = self.slots.receive if step.takes else self.slots.send
        launch(self.memory[rank], t, peer, number, self.streams[rank].cuda_stream)

    def faults(self) -> list[object]:
        torch.cuda.synchronize()
        return [memory.take_fault() for memory in self.memory]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_drawn_sends(ranks: int, seed: int) -> None:
    """All calls of all ranks are launched before the host looks at anything; streams go as they like."""
    dice = random.Random(seed)
    inflight = dice.choice((1, 2, 3))
    ring = VirtualRing(ranks, inflight, 8 * 8 * 8)
    found = []
    for step in cases.draw_ring(dice, ranks, inflight):
        expected = cases.values(step.shape, step.dtype, seed, step.number)
        t = torch.zeros_like(expected, device=ring.device) if step.takes else expected.to(ring.device)
        torch.cuda.synchronize()
        ring.call(step, t)
        found.append((step, t, expected))
    assert ring.faults() == [None] * ranks
    for step, t, expected in found:
        assert cases.same(t.cpu(), expected), step


def test_large_tensors_in_one_slot() -> None:
    """The receiver's stream is late by turns, and a slot is written only once it was read."""
    ring, elements = VirtualRing(2, 1, 32 << 20), 8 << 20
    sent = [torch.full((elements,), i, dtype=torch.int32, device=ring.device) for i in range(6)]
    got = [torch.zeros_like(t) for t in sent]
    torch.cuda.synchronize()
    for i in range(6):
        with torch.cuda.stream(ring.streams[i % 2]):
            torch.cuda._sleep(5_000_000)
        ring.call(cases.Step(0, 1, False, (elements,), torch.int32, i), sent[i])
        ring.call(cases.Step(0, 1, True, (elements,), torch.int32, i), got[i])
    assert ring.faults() == [None, None]
    for i, t in enumerate(got):
        assert (t.min().item(), t.max().item()) == (i, i)


def test_a_neighbour_that_is_silent() -> None:
    """The kernel leaves at its deadline with a record, and what waits behind it does not wait once more; a
    receiver that was late finds the word that its slot was written over.
    """
    ring = VirtualRing(2, 1, 1024, timeout=0.5)
    t, got = torch.ones(16, device=ring.device), torch.zeros(16, device=ring.device)
    torch.cuda.synchronize()
    send, take = (cases.Step(0, 1, takes, (16,), t.dtype, 0) for takes in (False, True))
    for _ in range(3):
        ring.call(send, t)
    fault, none = ring.faults()
    assert none is None
    assert fault is not None
    assert (fault.operation, fault.phase, fault.waited_on) == ("pp_send", "credit", (1,))
    ring.call(take, got)
    _, fault = ring.faults()
    assert fault is not None
    assert (fault.operation, fault.phase, fault.waited_on) == ("pp_recv", "overwritten", (0,))
