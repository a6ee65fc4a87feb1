"""CUDA tensors with a group that does not carry them, as vLLM uses V1: its gloo group, and CUDA tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deepep.sim import World

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, TOPK, LOCAL = 33, 512, 4, 4


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="gloo", timeout=120) as world:
        yield world


def inputs(rank: int, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small integers and eighths: every order of summation gives the same bits."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randint(-4, 5, (TOKENS, HIDDEN), generator=generator).bfloat16()
    idx = torch.rand(TOKENS, LOCAL * num_ranks, generator=generator).topk(TOPK).indices
    weights = torch.randint(1, 9, (TOKENS, TOPK), generator=generator) / 8
    return x, idx, weights


def throughput(buffer: Any, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each rank returns its rows as they came: the sum is x times the ranks that a token goes to."""
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, LOCAL * buffer.group_size)
    received, _, _, _, handle, _ = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)
    return buffer.combine(received, handle)[0]


def low_latency(buffer: Any, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows, _, handle, _, hook = buffer.low_latency_dispatch(
        x, idx, 64, LOCAL * buffer.group_size, use_fp8=False, return_recv_hook=True
    )
    hook()
    combined, _, hook = buffer.low_latency_combine(rows, idx, weights, handle, return_recv_hook=True)
    hook()
    return combined


def served(ctx: Any, backend: str | None, group: str) -> None:
    import torch.distributed as dist

    import deepep

    os.environ["DEEPEP_DEVICE"] = ""  # as outside of a world: the machine decides
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    if torch.cuda.device_count() < ctx.num_ranks:  # NCCL refuses two ranks on one GPU of one host
        os.environ["NCCL_HOSTID"] = f"rank-{ctx.rank}"
        os.environ.update(NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    made = ctx.group if group == "world" else dist.new_group(backend=group)
    here = torch.device("cuda", torch.cuda.current_device())
    x, idx, weights = inputs(ctx.rank, ctx.num_ranks)
    given = x.cuda(), idx.cuda(), weights.cuda()
    with deepep.Buffer(
        made, 0, 1 << 20, low_latency_mode=True, backend=backend, explicitly_destroy=True, timeout=30.0
    ) as buffer:
        assert buffer.info.device == here
        assert backend is None or buffer.info.backend == backend
        ranks = torch.zeros(TOKENS, ctx.num_ranks).scatter_(1, idx // LOCAL, 1.0).sum(1, keepdim=True)
        for _ in range(2):
            assert torch.equal(throughput(buffer, *given).cpu(), (x.float() * ranks).bfloat16())
            expected = (x.float() * weights.sum(1, keepdim=True)).bfloat16()
            assert torch.equal(low_latency(buffer, *given).cpu(), expected)
        with pytest.raises(deepep.DeviceError, match="the buffer's device"):
            buffer.get_dispatch_layout(idx, LOCAL * ctx.num_ranks)
        # The refusal was this rank's part in a dispatch, and so was that of every other: all are in step.
        assert torch.equal(throughput(buffer, *given).cpu(), (x.float() * ranks).bfloat16())
    with deepep.Buffer(made, 0, 1 << 20, low_latency_mode=True, device="cpu", timeout=30.0) as buffer:
        assert buffer.info.backend == "reference"
        assert torch.equal(throughput(buffer, x, idx, weights), (x.float() * ranks).bfloat16())


@pytest.mark.parametrize("group", ["world", "gloo", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize("backend", [None, "cuda", "reference"])
def test_cuda_tensors_whatever_the_group(pair: World, backend: str | None, group: str) -> None:
    pair.run(served, backend, group)


def with_a_default_device(ctx: Any, name: str) -> None:
    """Model loaders and DeepEP's own tests set torch's default device; pinned memory is made nonetheless."""
    import deepep

    os.environ["DEEPEP_DEVICE"] = ""
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    x, idx, weights = (t.cuda() for t in inputs(ctx.rank, ctx.num_ranks))
    options: dict[str, Any] = {"num_rdma_bytes": 1 << 20, "low_latency_mode": True, "timeout": 30.0}
    with torch.device(name), torch.inference_mode(), deepep.Buffer(ctx.group, **options) as buffer:
        first = throughput(buffer, x, idx, weights), low_latency(buffer, x, idx, weights)
        handle = buffer.low_latency_dispatch(x, idx, 64, LOCAL * ctx.num_ranks, use_fp8=False)[2]
        assert handle[0].device == handle[1].device == x.device
    with deepep.Buffer(ctx.group, **options) as buffer:
        second = throughput(buffer, x, idx, weights), low_latency(buffer, x, idx, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["cuda", "meta", "cpu"])
def test_torchs_default_device_changes_nothing(pair: World, name: str) -> None:
    pair.run(with_a_default_device, name)
