"""JAX: dispatch and combine under jit and grad, with the bits of deepep.nn; arrays in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("jax", reason="jax is not installed")

HIDDEN, EXPERTS, TOPK, LONG = 8, 8, 2, 300.0


def inputs_of(rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and what they are multiplied with in the loss [T, H]; top-k indices and weights [T, K]."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 6 - rank
    x, factors = (torch.randn(tokens, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    indices = torch.randint(-1, EXPERTS, (tokens, TOPK), generator=generator, dtype=torch.int32)
    return x, factors, indices, torch.rand(tokens, TOPK, generator=generator)


def in_torch(buffer: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, and gradients of rows and weights, of two layers of one factor an entry."""
    import deepep.nn as dnn

    x, factors, indices, weights = inputs_of(buffer.rank, dtype)
    x.requires_grad_()
    weights.requires_grad_()
    y = x
    for _ in range(2):
        received = dnn.dispatch(buffer, y, indices, weights, EXPERTS)
        y = dnn.combine(received.x * received.topk_weights[:, :1].to(dtype), received.route)
    (y * factors).sum().backward()
    return [y.detach(), x.grad, weights.grad]


def in_jax(buffer: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    import jax
    import jax.numpy as jnp

    from deepep.interop import from_any, like
    from deepep.interop.jax import JaxExchange

    exchange = JaxExchange(buffer, num_experts=EXPERTS, max_rows=6 * buffer.group_size)
    x, factors, indices, weights = (like(t, jnp.zeros(1)) for t in inputs_of(buffer.rank, dtype))

    def loss(x: Any, weights: Any) -> tuple[Any, Any]:
        y = x
        for _ in range(2):
            received = exchange.dispatch(y, indices, weights)
            y = exchange.combine(received.x * received.topk_weights[:, :1].astype(x.dtype), received.route)
        return (y * factors).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, weights)
    return [from_any(array).clone() for array in (y, *gradients)]


def both(context: Any, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import deepep

    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        return list(zip(in_jax(buffer, dtype), in_torch(buffer, dtype), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_jit_it_has_the_bits_of_the_operators(
    world_of: Callable[[int], Any], dtype: torch.dtype
) -> None:
    for output, of_rows, of_weights in world_of(4).run(both, dtype, timeout=LONG):
        assert torch.equal(*output)
        assert torch.equal(*of_rows)
        assert of_weights[0].abs().sum() > 0
        # Sums over H in another order: 8 terms of order 1 to 10, rounded to 8 bits or 24.
        tolerance = 2.0**-5 if dtype == torch.bfloat16 else 2.0**-18
        torch.testing.assert_close(*of_weights, rtol=tolerance, atol=tolerance)


def too_little_room(context: Any) -> str:
    import jax
    import jax.numpy as jnp

    import deepep
    from deepep.interop.jax import JaxExchange

    with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
        exchange = JaxExchange(buffer, num_experts=2, max_rows=2)
        every = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1))
        try:
            jax.block_until_ready(exchange.dispatch(jnp.ones((3, HIDDEN)), *every).x)
        except Exception as error:
            return str(error)
    return ""


def test_too_little_room_is_told(world_of: Callable[[int], Any]) -> None:
    assert "max_rows: got 2" in world_of(1).run(too_little_room, timeout=LONG)[0]


def test_arrays_of_jax_are_shared() -> None:
    import jax.numpy as jnp

    from deepep.interop import from_any, like

    array = jnp.arange(64.0)
    tensor = from_any(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert bool((like(tensor, array) == array).all())
