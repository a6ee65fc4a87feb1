"""Layers whose combine sums the experts' rows itself: the bits of those that sum them before."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from harness.layers import layer_on

HIDDEN = 64


def rows_of(rank: int) -> torch.Tensor:
    """[T, H] bf16."""
    generator = torch.Generator().manual_seed(3 + rank)
    return torch.randn(5 + 4 * rank, HIDDEN, generator=generator).bfloat16()


def test_gradients_that_are_differentiated_are_of_operators_that_can_be(on_ranks: Any) -> None:
    """torch warns of one that has no gradient; on CUDA it would be a constant, in silence."""

    def body(buffer: Any) -> None:
        from deepep import Buffer

        with Buffer(buffer.group, timeout=60.0, backend="emulator") as emulated:
            layers = [layer_on(b, hidden=HIDDEN, dtype=torch.bfloat16) for b in (buffer, emulated)]
            found = []
            for layer in layers:
                y = layer(rows_of(buffer.rank)).float().sum()
                (of_down,) = torch.autograd.grad(y, layer.experts.down, create_graph=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    found += torch.autograd.grad(of_down.float().square().sum(), layer.router.weight)
            assert found[0].abs().sum() > 0
            assert torch.equal(*found)

    on_ranks(2, body)


def test_bits_of_sums_inside_and_before(on_ranks: Any) -> None:
    def body(buffer: Any) -> None:
        from deepep import Buffer

        emulated = Buffer(buffer.group, timeout=60.0, backend="emulator")
        assert emulated.runtime.sums_expanded(rows_of(0))
        assert not buffer.runtime.sums_expanded(rows_of(0))
        sizes = {"hidden": HIDDEN, "dtype": torch.bfloat16}
        layers = [layer_on(each, **sizes) for each in (buffer, emulated)]
        try:
            given = [rows_of(buffer.rank).requires_grad_() for _ in layers]
            before, inside = (layer(x) for layer, x in zip(layers, given, strict=True))
            assert torch.equal(before.view(torch.int16), inside.view(torch.int16))
            for y in (before, inside):
                (y * y.detach().cos()).sum().backward()
            # Those of weights are summed in bf16 on one way, in float32 on the other.
            torch.testing.assert_close(given[0].grad, given[1].grad, rtol=0.05, atol=0.05)
            for a, b in zip(layers[0].experts.parameters(), layers[1].experts.parameters(), strict=True):
                assert torch.equal(a.grad.view(torch.int16), b.grad.view(torch.int16))
        finally:
            emulated.destroy()

    on_ranks(2, body)
