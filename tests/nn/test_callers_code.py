"""Code of the caller's inside a layer: gates of any kind, and gates and experts that fail on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.layers import EXPERTS, TOPK, layer_on, tokens

from deepep.errors import ArgumentError
from deepep.gate import Routing, sigmoid_topk


def test_gates_may_give_int32_and_no_expert(on_ranks: Any) -> None:
    def body(buffer: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        def gate(z: torch.Tensor, k: int, bias: torch.Tensor) -> Any:
            routing = sigmoid_topk(z, k, bias=bias)
            idx = routing.topk_idx.to(dtype, copy=True)
            idx[:, -1] = -1
            idx[0] = -1
            return Routing(idx, routing.topk_weights.bfloat16(), routing.scores)

        layer = layer_on(buffer, gate=gate)
        x = tokens(buffer.rank).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert torch.equal(y[0], layer.shared(x)[0]), "a token without an expert"
        assert int(layer.router.load.sum()) == (len(x) - 1) * (TOPK - 1)
        return y.detach(), x.grad

    narrow, wide = on_ranks(2, body, torch.int32), on_ranks(2, body, torch.int64)
    for a, b in zip(narrow, wide, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def bad_gates() -> dict[str, Any]:
    def changed(**parts: Any) -> Any:
        def gate(z: torch.Tensor, k: int, bias: torch.Tensor) -> Any:
            routing = sigmoid_topk(z, k, bias=bias)
            return routing._replace(
                **{name: change(getattr(routing, name)) for name, change in parts.items()}
            )

        return gate

    def raising(z: torch.Tensor, k: int, bias: torch.Tensor) -> Any:
        raise ZeroDivisionError("a gate's own fault")

    return {
        "a tuple": lambda z, k, bias: tuple(sigmoid_topk(z, k, bias=bias)),
        "float indices": changed(topk_idx=lambda t: t.float()),
        "int16 indices": changed(topk_idx=lambda t: t.short()),
        "other tokens": changed(topk_idx=lambda t: t[1:], topk_weights=lambda t: t[1:]),
        "other width": changed(topk_weights=lambda t: t[:, 1:]),
        "integer weights": changed(topk_weights=lambda t: t.long()),
        "no such expert": changed(topk_idx=lambda t: t + EXPERTS),
        "below no expert": changed(topk_idx=lambda t: t * 0 - 2),
        "raising": raising,
    }


@pytest.mark.parametrize("name", list(bad_gates()))
def test_a_gate_that_fails_on_one_rank_fails_on_all(on_ranks: Any, name: str) -> None:
    def body(buffer: Any, gate: Any) -> str:
        layer = layer_on(buffer, **({"gate": gate} if buffer.rank == 1 else {}))
        expected = ZeroDivisionError if buffer.rank == 1 and name == "raising" else ArgumentError
        with pytest.raises(expected) as caught:
            layer(tokens(buffer.rank))
        assert torch.isfinite(layer_on(buffer)(tokens(buffer.rank))).all(), "the buffer works on"
        return str(caught.value)

    here, cause = on_ranks(2, body, bad_gates()[name])
    assert here.startswith("rank 1: ")
    assert cause in here


@pytest.mark.parametrize("part", ["experts", "shared"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_experts_that_raise_on_one_rank_end_the_call_on_all(
    on_ranks: Any, error: type[BaseException], part: str
) -> None:
    def body(buffer: Any) -> str:
        layer = layer_on(buffer)

        def failing(*_: Any) -> None:
            raise error("out of memory, say")

        hook = getattr(layer, part).register_forward_pre_hook(failing) if buffer.rank == 1 else None
        with pytest.raises(error if hook else ArgumentError) as caught:
            layer(tokens(buffer.rank))
        if hook:
            hook.remove()
        assert torch.isfinite(layer(tokens(buffer.rank))).all(), "the buffer works on"
        return str(caught.value)

    here, _ = on_ranks(2, body)
    assert here.startswith(f"rank 1: {part}: got " + error.__name__)
