"""ExpertParallelMoE in mixed precision: autocast, weights that are cast, and the default dtype."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from harness.layers import EXPERTS, HIDDEN, TOPK, Lone, OnCuda, layer_on, tokens

import deepep.nn as dnn
from deepep.errors import ArgumentTypeError
from deepep.gate import Routing, sigmoid_topk
from deepep.nn.grouped import grouped_mm
from deepep.nn.precision import parameter_options
from deepep.nn.rows import expert_rows


def test_autocast_computes_experts_in_its_dtype_and_the_router_in_float32(on_ranks: Any) -> None:
    """The bits are those of a layer with bfloat16 experts and a float32 router."""

    def body(buffer: Any) -> None:
        logits = []

        def gate(z: torch.Tensor, k: int, bias: torch.Tensor) -> Routing:
            logits.append(z)
            return sigmoid_topk(z, k, bias=bias)

        layer = layer_on(buffer, gate=gate, dtype=torch.float32)
        low = deepcopy(layer).bfloat16()
        low.router.float()
        low.router.load_state_dict(layer.router.state_dict())
        x = tokens(buffer.rank, dtype=torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert torch.equal(y, low(x))
        assert y.dtype == torch.bfloat16
        assert logits[0].dtype == torch.float32
        assert torch.equal(logits[0], x.float() @ layer.router.weight.t())
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
        assert layer.experts.down.grad.abs().sum() > 0
        # float32 rows, as a norm gives them: they travel in bfloat16, and backward may run inside as well.
        seen: list[dnn.Exchange] = []
        with dnn.observe(seen.append), torch.autocast("cpu", dtype=torch.bfloat16):
            layer(tokens(buffer.rank).requires_grad_()).float().sum().backward()
        assert [e.row_bytes for e in seen] == [
            HIDDEN * 2 + TOPK * 12,
            HIDDEN * 2,
            HIDDEN * 2,
            HIDDEN * 2 + TOPK * 4,
        ]

    on_ranks(2, body)


def test_operators_compute_the_same_inside_autocast() -> None:
    idx = torch.tensor([[0, 1], [1, -1]])
    _, counts, _ = expert_rows(idx, 2)
    x, w = torch.randn(3, 4), torch.randn(2, 4, 4)
    expected = grouped_mm(x, w, counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grouped_mm(x, w, counts)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", ["other dtype", "float16 autocast", "float16 weights"])
def test_rows_that_cannot_pass_are_refused_on_all_ranks_before_they_travel(on_ranks: Any, case: str) -> None:
    def body(buffer: Any) -> tuple[str, str]:
        layer = layer_on(buffer, dtype=torch.float32)
        x = tokens(buffer.rank)
        bad = buffer.rank == 1
        used, given, low = layer, x, torch.float32
        if bad and case == "other dtype":
            given = x.bfloat16()
        elif bad and case == "float16 autocast":
            low = torch.float16
        elif bad:
            used, given = deepcopy(layer).half(), x.half()
        with (
            pytest.raises(ArgumentTypeError) as caught,
            torch.autocast("cpu", low, enabled=low == torch.float16),
        ):
            used(given)
        assert torch.isfinite(layer(x)).all(), "the buffer works on"
        return caught.value.argument, str(caught.value)

    (argument, first), (_, second) = on_ranks(2, body)
    assert argument == "x"
    assert first == second
    assert first.startswith("rank 1: x: got ")


def test_the_bias_stays_float32_with_its_value_and_the_load_int64(on_ranks: Any) -> None:
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: torch.nn.Sequential(m).half()[0],
    ):
        layer = layer_on(Lone())
        layer.router.bias.copy_(torch.linspace(-5, 5, EXPERTS) + 1e-3)
        layer.router.load += 3
        before = layer.router.bias.clone()
        cast(layer)
        assert layer.router.bias.dtype == torch.float32
        assert torch.equal(layer.router.bias, before), "cast to 16 bits and back"
        assert layer.router.load.tolist() == [3] * EXPERTS
        assert layer.experts.down.dtype != torch.float32
        state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
        assert layer.router.bias.dtype == torch.float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert layer_on(Lone()).router.bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    router = layer_on(Lone()).router
    for _ in range(1000):
        router.load.copy_(torch.tensor([100, 0, 0, 0, 0, 0, 0, 100]))
        router.bfloat16().rebalance(1e-3)
    assert router.bias[1].item() == pytest.approx(
        1.0, abs=1000 * 2.0**-25
    )  # steps of 0.001 each rounded once


def test_a_bias_that_a_wrapper_cast_is_refused() -> None:
    router = layer_on(Lone()).router
    router.bias.data = router.bias.data.bfloat16()  # as FSDP's and DDP's mixed precision cast buffers
    with pytest.raises(ArgumentTypeError, match=r"router\.bias"):
        router(tokens(0))


def test_the_default_dtype_is_that_of_the_exchange() -> None:
    assert layer_on(Lone()).experts.down.dtype == torch.float32
    assert layer_on(OnCuda(), device="meta").experts.down.dtype == torch.bfloat16
    assert layer_on(OnCuda(), device="meta").router.bias.dtype == torch.float32
    assert parameter_options(Lone(), "cuda", None)["dtype"] == torch.bfloat16
    for dtype in (torch.float32, torch.float64, torch.float16):
        with pytest.raises(ArgumentTypeError, match=r"bfloat16.*combine") as caught:
            layer_on(OnCuda(), device="meta", dtype=dtype)
        assert caught.value.argument == "dtype"
    with pytest.raises(ArgumentTypeError):
        layer_on(Lone(), dtype=torch.float16)
