"""deepep.nn on the kernels: a layer learns what it learns on the reference over NCCL, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deepep.sim import World

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=180) as world:
        yield world


def layer_of(ctx: Any, backend: str, **options: Any) -> tuple[Any, Any]:
    """A buffer on that backend, and a small layer that exchanges through it."""
    import deepep
    from deepep.nn import ExpertParallelMoE

    buffer = deepep.Buffer(ctx.group, timeout=30.0, backend=backend)
    assert buffer.runtime.info.backend == backend
    sizes = {"hidden": 256, "expert_hidden": 128, "num_experts": 16, "num_topk": 4, "shared_hidden": 64}
    moe = ExpertParallelMoE(buffer, device=ctx.device, dtype=torch.bfloat16, **sizes, **options)
    return buffer, moe


def train(ctx: Any, backend: str, compiles: bool, fp8: bool) -> list[torch.Tensor]:
    """Three steps of a small layer: losses, outputs' and inputs' gradients, and the weights at the end."""
    buffer, moe = layer_of(ctx, backend, fp8_dispatch=fp8)
    layer = torch.compile(moe, fullgraph=True, backend="aot_eager") if compiles else moe
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    told = []
    for step in range(3):
        torch.manual_seed(10 * step + ctx.rank)
        tokens = (100, 37)[ctx.rank] if step != 1 else (0, 50)[ctx.rank]
        x = torch.randn(tokens, 256, dtype=torch.bfloat16).to(ctx.device).requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        told += [y.detach().cpu(), x.grad.cpu()]
        for parameter in moe.replicated_parameters():
            torch.distributed.all_reduce(parameter.grad, group=ctx.group)
        optimizer.step()
        optimizer.zero_grad()
    told += [parameter.detach().cpu() for parameter in moe.parameters()]
    buffer.destroy()
    return told


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16 rows", "fp8 rows"])
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_a_layer_learns_the_same(pair: World, compiles: bool, fp8: bool) -> None:
    kernels = pair.run(train, "cuda", compiles, fp8)
    reference = pair.run(train, "reference", compiles, fp8)
    for rank in range(2):
        assert len(kernels[rank]) == len(reference[rank]) > 6
        for ours, wanted in zip(kernels[rank], reference[rank], strict=True):
            assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))
        assert any(t.abs().sum() > 0 for t in kernels[rank])


def capture(ctx: Any, fp8: bool, recompute: bool) -> list[bool]:
    """Compare captured steps in fixed shapes with those of a layer that waits, for some numbers of tokens."""
    from copy import copy

    buffer, moe = layer_of(ctx, "cuda", fp8_dispatch=fp8, recompute=recompute, num_max_tokens=64)
    usual, same = copy(moe), []
    usual.num_max_tokens = 0

    def step(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
        x.grad = None
        moe.zero_grad()
        y = layer(x)
        y.float().square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in moe.parameters())]

    for tokens in ((40, 64)[ctx.rank], (5, 0)[ctx.rank]):
        x = torch.zeros(tokens, 256, dtype=torch.bfloat16, device=ctx.device).requires_grad_()
        step(moe, x)
        graph, made = torch.cuda.CUDAGraph(), []
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            made += step(moe, x)
        for seed in range(3):
            torch.manual_seed(10 * seed + ctx.rank)
            with torch.no_grad():
                x.copy_(torch.randn(tokens, 256, dtype=torch.bfloat16))
            graph.replay()
            wanted = step(usual, x.detach().clone().requires_grad_())
            same += [torch.equal(a, b) for a, b in zip(made, wanted, strict=True)]
    buffer.destroy()
    return same


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16 rows", "fp8 rows"])
def test_steps_in_fixed_shapes_are_captured_and_replayed(pair: World, fp8: bool, recompute: bool) -> None:
    for same in pair.run(capture, fp8, recompute):
        assert len(same) > 40
        assert all(same)
