"""On GPUs: what kernels waited for by rank, the self-test by default, the doctor.

pytest -m gpu tests/backends/cuda/test_observing.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest

from deepep.runtime.control.waits import KERNEL_WAITS
from deepep.sim import World

LATE = 1


def waits_for_a_late_rank(ctx: Any) -> dict[tuple[str, str], list[int]]:
    import torch

    from deepep import Buffer

    x = torch.ones(8, 256, dtype=torch.bfloat16, device=ctx.device)
    idx = torch.arange(ctx.num_ranks, device=ctx.device).expand(8, -1).contiguous()
    weights = torch.ones(8, ctx.num_ranks, device=ctx.device)

    def trip(buffer: Buffer) -> None:
        quick = buffer.low_latency_dispatch(x, idx, 8, ctx.num_ranks, use_fp8=False)
        buffer.low_latency_combine(quick.recv_x, idx, weights, quick.handle)
        sent = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=ctx.num_ranks)
        buffer.combine(sent.recv_x, sent.handle)
        torch.cuda.synchronize()

    with Buffer(ctx.group, low_latency_mode=True, backend="cuda") as buffer:
        trip(buffer)
        buffer.measure_waits()
        if ctx.rank == LATE:
            time.sleep(0.2)
        trip(buffer)
        found = buffer.wait_statistics(clear=True).nanoseconds
        sums = {key: waited.tolist() for key, waited in found.items() if key[1] != "arrive"}
        assert not any(waited.any() for waited in buffer.wait_statistics().nanoseconds.values())
    return sums


@pytest.mark.gpu
def test_kernels_say_whom_they_waited_for() -> None:
    with World(2, backend="nccl") as world:
        found = world.run(waits_for_a_late_rank)
    for rank, sums in enumerate(found):
        low_latency = {(name, "kernels") for name in ("low_latency_dispatch", "low_latency_combine")}
        assert set(sums) == low_latency | set(KERNEL_WAITS)
        assert all(waited[rank] == 0 for waited in sums.values())
    assert found[0]["low_latency_dispatch", "kernels"][LATE] > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--ranks", "2"], "cuda on GPUs, 2 ranks"),
        (["doctor", "--rounds", "5"], "traffic on backend"),
    ],
)
def test_commands_take_the_gpus(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "deepep", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert words in done.stdout, done.stdout + done.stderr
    if arguments[0] == "check":
        assert done.returncode == 0, done.stdout
