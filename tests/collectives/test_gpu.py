"""All-reduces of CUDA tensors over NCCL have the bits that the CPU has: the oracle's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepep.collectives import ReductionPlan, device_codec
from deepep.collectives.choosing_on_devices import choose_on_device
from deepep.collectives.codecs import LOSSY, rounding_key
from deepep.collectives.communicator import Communicator
from deepep.reference import gradient_codec as oracle
from deepep.sim import World
from deepep.sim.cases.gradients import KINDS, draw_gradient
from deepep.sim.rules.reductions import failing_reductions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


def test_drawn_reductions_over_nccl() -> None:
    num_ranks = min(torch.cuda.device_count(), 4)
    with World(num_ranks, backend="nccl", timeout=300.0) as world:
        for failed in world.run(failing_reductions, range(100), "cuda"):
            assert failed == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_codec_in_torch_has_the_oracles_bits_on_a_gpu(kind: str) -> None:
    rng = np.random.default_rng([3, KINDS.index(kind)])
    for case in range(20):
        values = draw_gradient(rng, int(rng.integers(0, 5000)), kind)
        for form in LOSSY:
            for key in (None, rounding_key(case)):
                want = oracle.encode(form, values, key, case)
                message = torch.empty_like(want, device="cuda")
                device_codec.encode(form, values.cuda(), message, key, case)
                assert torch.equal(message.cpu(), want)
                restored = torch.empty_like(values, device="cuda")
                device_codec.decode(form, message, restored, False)
                wanted = oracle.decode(form, want, values.numel())
                assert torch.equal(restored.cpu().nan_to_num(7.0), wanted.nan_to_num(7.0))


def chosen(context: Any) -> Any:
    """A table timed on GPUs, and whether sums by its plans in fixed point have one plan's bits."""
    with Communicator(context.group, device="cuda", timeout=60.0) as comm:
        table = choose_on_device(comm, ("fp8", "fixed32"), 5.0, (tuple(range(comm.num_ranks)),))
        generator = torch.Generator("cuda").manual_seed(context.rank)
        whole = torch.randn(1 << 20, device="cuda", generator=generator)
        wanted = comm.all_reduce(whole.clone(), ReductionPlan("direct"))
        plans = [entry.plan for entry in table.entries if entry.plan.codec == "fixed32"]
        return table, all(torch.equal(comm.all_reduce(whole.clone(), plan), wanted) for plan in plans)


def test_plans_are_timed_in_place_and_alike_on_all_ranks() -> None:
    with World(2, backend="nccl", timeout=300.0) as world:
        first, other = world.run(chosen)
    assert first == other
    assert first[1]
    for entry in first[0].entries:
        words = f"{entry.size >> 10:6} KiB {entry.plan.codec}: {entry.plan.schedule}"
        print(f"{words}, {entry.seconds * 1e6:.0f} us")
