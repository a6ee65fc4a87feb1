"""All-reduces of CUDA tensors over NCCL have the bits that the CPU has: the oracle's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepep.collectives import device_codec
from deepep.collectives.codecs import LOSSY, rounding_key
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
