"""All-reduces over symmetric memory: virtual ranks of one GPU, and processes, with the oracle's bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepep.collectives import Communicator, ReductionPlan
from deepep.collectives.codecs import rounding_key
from deepep.collectives.schedules import ADDEND, ANYBODY, RESULT
from deepep.reference.all_reduce import all_reduce
from deepep.sim import World
from deepep.sim.cases.gradients import KINDS, draw_gradient
from deepep.sim.rules.reductions import differing_plans, same_numbers

pytestmark = pytest.mark.gpu

PAIR_BYTES = 1 << 20
FORMS = ("plain", "fixed32", "fp8", "fp16", "bf16")


class VirtualReduces:
    """Ranks of one device, each with its stream; all kernels are resident together."""

    def __init__(self, num_ranks: int, timeout: float = 5.0) -> None:
        from deepep import _cuda

        self.num_ranks = num_ranks
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.blocks = min(
            32, torch.cuda.get_device_properties(self.device).multi_processor_count // num_ranks
        )
        size = _cuda.all_reduce_bytes(num_ranks, PAIR_BYTES)
        ranks = range(num_ranks)
        self.heaps = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in ranks]
        words = _cuda.ALL_REDUCE_STATE_WORDS
        self.states = [torch.zeros(words, dtype=torch.int32, device=self.device) for _ in ranks]
        self.missing = [torch.zeros(1, dtype=torch.int32).pin_memory() for _ in ranks]
        self.streams = [torch.cuda.Stream(self.device) for _ in ranks]
        self.made = [
            _cuda.AllReduce(
                rank=r,
                heaps=[heap.data_ptr() for heap in self.heaps],
                pair_bytes=PAIR_BYTES,
                state=self.states[r].data_ptr(),
                host_missing=self.missing[r].data_ptr(),
                timeout_seconds=timeout,
            )
            for r in ranks
        ]
        torch.cuda.synchronize()

    def run(
        self,
        tensors: list[torch.Tensor],
        form: str,
        *,
        is_oneshot: bool,
        dice: tuple[int, int, int] | None,
        skip: int = -1,
    ) -> None:
        for rank, made in enumerate(self.made):
            if rank == skip:
                continue
            keys = []
            if dice is not None:
                keys = [*rounding_key(*dice, rank, ADDEND), *rounding_key(*dice, ANYBODY, RESULT)]
            made.launch(
                tensor=tensors[rank].data_ptr(),
                count=tensors[rank].numel(),
                is_bf16=tensors[rank].dtype == torch.bfloat16,
                is_oneshot=is_oneshot,
                format="plain" if form == "fixed32" else form,
                is_fixed=form == "fixed32",
                divisor=float(self.num_ranks),
                keys=keys,
                first_index=0,
                num_blocks=self.blocks,
                stream=self.streams[rank].cuda_stream,
            )
        torch.cuda.synchronize()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_virtual_ranks_have_the_oracles_bits(num_ranks: int, form: str) -> None:
    ranks = VirtualReduces(num_ranks)
    rng = np.random.default_rng([5, num_ranks])
    for case, kind in enumerate(KINDS * 2):
        count = int(rng.integers(1, 60_000))
        dtype = torch.bfloat16 if case % 3 == 2 else torch.float32
        inputs = [draw_gradient(rng, count, kind).to(dtype) for _ in range(num_ranks)]
        dice = None if case % 2 else (case, 1, 2)
        want = all_reduce(inputs, "nvlink", form, mean=True, dice=dice)
        for is_oneshot in (True, False):
            tensors = [x.cuda() for x in inputs]
            ranks.run(tensors, form, is_oneshot=is_oneshot, dice=dice)
            for got in tensors:
                assert same_numbers(got.cpu(), want), (kind, count, dtype, is_oneshot)
    assert not any(int(word) for word in ranks.missing)


@pytest.mark.parametrize("is_oneshot", [True, False])
def test_a_virtual_rank_that_does_not_come_is_noted(is_oneshot: bool) -> None:
    ranks = VirtualReduces(3, timeout=0.2)
    tensors = [torch.ones(5000, device="cuda") for _ in range(3)]
    ranks.run(tensors, "plain", is_oneshot=is_oneshot, dice=None, skip=1)
    assert [int(word) for word in ranks.missing] == [2, 0, 2]
    ranks.run(tensors, "plain", is_oneshot=is_oneshot, dice=None)  # at once: later calls do nothing
    assert all(torch.equal(tensors[r].cpu(), torch.ones(5000)) for r in (0, 2))


def reduced(context: Any) -> list[str]:
    from deepep.collectives import communicator

    torch.cuda.set_device(context.device)
    plans = [ReductionPlan("nvlink", form).for_ranks(context.num_ranks) for form in ("plain", *FORMS[1:])]
    with Communicator(context.group, device="cuda", timeout=60.0) as comm:
        found = differing_plans(comm, plans)
        assert comm._nvlink is not None, communicator
        assert comm._nvlink[1] is not None, "no memory was mapped"
        large = torch.full((20_000_000,), float(comm.rank + 1), device="cuda")  # several launches
        comm.all_reduce(large, plans[0])
        total = sum(range(1, comm.num_ranks + 1))
        if not bool((large == total).all().item()):
            found.append(f"rank {comm.rank}: a tensor of several launches")
    return found


def test_processes_have_the_oracles_bits() -> None:
    """By CUDA IPC, on GPUs of their own or on one that they take turns on."""
    with World(2, backend="nccl", timeout=300.0) as world:
        assert world.run(reduced) == [[], []]
