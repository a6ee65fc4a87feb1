"""Code of the caller's inside a layer: gates of any kind, and gates and experts that fail on one rank."""

from __future__ import annotations

from collections.abc import Callable
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


class Returning(torch.nn.Module):
    """Experts that return what a function makes of their rows."""

    def __init__(self, make: Callable[[torch.Tensor], Any], num_local_experts: int) -> None:
        super().__init__()
        self.make, self.num_local_experts = make, num_local_experts

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> Any:
        return self.make(rows)


NOT_ROWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "nothing": lambda rows: None,
    "fewer rows": lambda rows: rows[:-1],
    "more rows": lambda rows: rows.repeat(2, 1),
    "one row for all": lambda rows: rows[:1],
    "flat": lambda rows: rows.flatten(),
    "narrower": lambda rows: rows[:, :8].contiguous(),
}
STRIDED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda rows: rows.t().contiguous().t(),
    lambda rows: torch._neg_view(-rows),
    lambda rows: rows.repeat(1, 2)[:, : rows.shape[1]],
]


@pytest.mark.parametrize("backend", [None, "emulator"])
def test_experts_may_return_any_strides_and_no_other_shape(on_ranks: Any, backend: str | None) -> None:
    """A combine that sums experts' rows itself reads one for each that was given, there or not."""
    if backend == "emulator":
        pytest.importorskip("deepep._emulator")

    def body(buffer: Any) -> None:
        from deepep import Buffer

        with Buffer(buffer.group, timeout=60.0, backend=backend) as other:
            layer = layer_on(other, dtype=torch.bfloat16)
            x = tokens(other.rank, dtype=torch.bfloat16)
            layer.experts = Returning(lambda rows: rows.clone(), layer.num_local_experts)
            wanted = layer(x)
            for make in STRIDED:
                layer.experts.make = make
                assert torch.equal(layer(x), wanted)
            for name, make in NOT_ROWS.items():
                layer.experts.make = make if other.rank == 1 else lambda rows: rows
                with pytest.raises(ArgumentError, match="rank 1: experts: got") as caught:
                    layer(x)
                assert caught.value.argument == "experts", name

    on_ranks(2, body)
