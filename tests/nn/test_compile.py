"""torch.compile traces through the layer: one graph, any number of tokens, the bits of the eager layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepep.nn as dnn
from deepep.gate import group_limited_topk

HIDDEN, EXPERTS, TOPK = 16, 8, 3


def compare_with_eager(buffer: Any, sizes: list[int], placement: Any = None) -> int:
    """Forward and backward of the traced and the eager layer for each T; the number of graphs traced."""
    from functools import partial

    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    gate = partial(group_limited_topk, num_groups=4, num_kept_groups=2)
    layer = dnn.ExpertParallelMoE(
        buffer,
        hidden=HIDDEN,
        expert_hidden=8,
        num_experts=EXPERTS,
        num_topk=TOPK,
        gate=gate,
        shared_hidden=8,
        placement=placement,
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for size in sizes:
        tokens = torch.randn(size, HIDDEN, generator=torch.Generator().manual_seed(size))
        results = []
        for call in (layer, compiled):
            layer.zero_grad()
            x = tokens.clone().requires_grad_()
            y = call(x)
            (y * y.detach().cos()).sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)
    return counter.frame_count


def test_aot_eager_is_one_graph_with_the_eager_bits(on_ranks: Any) -> None:
    """T different on every rank and call, and zero. A first graph for the first T, a second for any T, and
    one each for the sizes torch treats apart (0 and 1).
    """

    def body(buffer: Any) -> int:
        sizes = [5 + buffer.rank, 9, 17 + buffer.rank, 30, 0, 12]
        return compare_with_eager(buffer, sizes)

    graphs = on_ranks(2, body)
    assert all(count <= 3 for count in graphs), graphs


def test_a_placed_layer_is_one_graph_too(on_ranks: Any) -> None:
    """In the world of the test above, which has imported what compiles."""

    def body(buffer: Any) -> int:
        from deepep.placement import place

        return compare_with_eager(buffer, [5 + buffer.rank], place([9, 1, 1, 5, 1, 1, 1, 1], 2, 4))

    assert on_ranks(2, body) == [1, 1]


@pytest.mark.slow
def test_inductor_compiles_the_layer(on_ranks: Any) -> None:
    """Forward alone: compiling C++ takes its time, and what is special about backward is in the test above.

    Inductor fuses, and may round otherwise: float32, sums of at most 2^5 terms of order 1: 2^-24 * 2^5 * 2^3.
    """

    def body(buffer: Any) -> None:
        import torch._inductor.config as config

        layer = dnn.ExpertParallelMoE(
            buffer, hidden=HIDDEN, expert_hidden=8, num_experts=EXPERTS, num_topk=TOPK
        )
        x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0))
        # Compile here, without a pool of compiler processes: one graph is too few for it.
        with torch.no_grad(), config.patch(compile_threads=1):
            compiled = torch.compile(layer, fullgraph=True, backend="inductor")
            torch.testing.assert_close(compiled(x), layer(x), rtol=2.0**-16, atol=2.0**-16)

    on_ranks(1, body)


def test_routes_pass_through_a_graph_of_ones_own(on_ranks: Any) -> None:
    """dispatch and combine used directly, with another computation between them, and no gradient."""

    def body(buffer: Any) -> None:
        number = dnn.buffer_number(buffer)

        def double_through_experts(x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
            received = dnn.dispatch(number, x, idx, torch.ones(idx.shape), EXPERTS)
            rows = received.x * 2 + received.x.shape[0] * 0
            return dnn.combine(rows, received.route)

        compiled = torch.compile(double_through_experts, fullgraph=True, backend="aot_eager")
        for tokens in (4, 7):
            x = torch.randn(tokens, HIDDEN)
            idx = torch.arange(tokens * 2).view(tokens, 2) % EXPERTS
            visits = (torch.stack([idx // (EXPERTS // 2) == r for r in range(2)]).any(2)).sum(0).unsqueeze(1)
            with torch.no_grad():
                assert torch.equal(compiled(x, idx), x * 2 * visits)

    on_ranks(2, body)
