"""Dispatch and combine as functions of JAX: ordered callbacks with gradients, under jit as well.

A callback reaches this library's operators (deepep.nn.exchange), whose routes are tensors: nothing is kept
between calls, so XLA may run forward and backward of several layers in any order that the program has. On the
CPU arrays are shared; where JAX computes on a GPU, its callbacks bring them to the host and back.

Shapes: R ranks, E experts, K top-k, T tokens here, H hidden, M rows that have room, of which N are received.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental import io_callback
from torch import Tensor

from deepep.errors import CapacityError
from deepep.interop.arrays import from_any
from deepep.nn import exchange
from deepep.nn.buffers import BufferLike, buffer_number, engine_of
from deepep.runtime.checks import check_int


class JaxRoute(NamedTuple):
    """Ranks that each token went to, as arrays: RouteTensors of deepep.nn."""

    is_token_in_rank: Any  # [T, R] bool
    counts: Any  # [R, R] int32
    table: Any  # [.., R] int32


class JaxReceived(NamedTuple):
    """Rows in (source rank, source token) order, then room: zeros, whose topk_idx is -1.

    x [M, H]. topk_idx [M, K]: local expert or -1. topk_weights [M, K] float32. expert_counts [L] int32.
    """

    x: Any
    topk_idx: Any
    topk_weights: Any
    route: JaxRoute
    expert_counts: Any


class JaxExchange:
    """Dispatch and combine of one buffer. Collective: all ranks call the same ones in the same order, which
    ordered callbacks keep, inside a jit and between several.

        exchange = deepep.interop.jax.JaxExchange(buffer, num_experts=E)
        received = exchange.dispatch(x, topk_idx, topk_weights)
        y = exchange.combine(experts(received), received.route)

    max_rows: M; 0: R * T, which is enough if no rank has more tokens than this one. XLA knows no sizes that
    the run finds out. Differentiable in x, topk_weights and y; the backward of the one is the other.
    """

    def __init__(self, buffer: BufferLike, *, num_experts: int, max_rows: int = 0) -> None:
        self.buffer, self.number = buffer, buffer_number(buffer)
        self.num_experts = check_int("num_experts", num_experts, 1, 2**31 - 1)
        self.max_rows = check_int("max_rows", max_rows, 0, 2**31 - 1)
        info = engine_of(self.number).info
        self.num_ranks, self.has_table, self.device = info.num_ranks, info.backend == "cuda", "cpu"
        if self.has_table:
            self.device = f"cuda:{torch.cuda.current_device()}"

        self._dispatch: Any = jax.custom_vjp(self._dispatch_forward)
        self._dispatch.defvjp(self._save_dispatch, self._grad_of_dispatch)
        self._combine: Any = jax.custom_vjp(self._combine_forward)
        self._combine.defvjp(self._save_combine, self._grad_of_combine)

    def dispatch(self, x: Any, topk_idx: Any, topk_weights: Any) -> JaxReceived:
        """x [T, H], topk_idx [T, K] integers, topk_weights [T, K] float32, as deepep.nn.dispatch.

        An error of this library is raised inside XLA, on all ranks: CapacityError where M is too small.
        """
        rows, indices, weights, marks, counts, table, per_expert = self._dispatch(x, topk_idx, topk_weights)
        return JaxReceived(rows, indices, weights, JaxRoute(marks, counts, table), per_expert)

    def combine(self, y: Any, route: JaxRoute) -> Any:
        """y [M, H] -> [T, H]: each token's rows, summed, ranks ascending; what lies past N is not sent."""
        return self._combine(y, *route)

    # Callbacks of the four exchanges: arrays to tensors, an operator, tensors to arrays.

    def _dispatch_forward(self, x: Any, topk_idx: Any, topk_weights: Any) -> Any:
        tokens, topk = topk_idx.shape
        room = self.max_rows or self.num_ranks * tokens
        table = tokens + self.num_ranks if self.has_table else 0
        shape = partial(jax.ShapeDtypeStruct)
        results = (
            shape((room, x.shape[1]), x.dtype),
            shape((room, topk), topk_idx.dtype),
            shape((room, topk), jnp.float32),
            shape((tokens, self.num_ranks), jnp.bool_),
            shape((self.num_ranks, self.num_ranks), jnp.int32),
            shape((table, self.num_ranks), jnp.int32),
            shape((self.num_experts // self.num_ranks,), jnp.int32),
        )
        return io_callback(partial(self._send, room), results, x, topk_idx, topk_weights, ordered=True)

    @torch.no_grad()
    def _send(self, room: int, *arrays: Any) -> tuple[Any, ...]:
        x, topk_idx, topk_weights = self._tensors(*arrays)
        found = exchange.dispatch(self.number, x, topk_idx, topk_weights, self.num_experts)
        num_rows = found.x.shape[0]
        if num_rows > room:
            raise CapacityError("max_rows", str(room), f"at least {num_rows}, the rows received")
        fills = (found.x, 0), (found.topk_idx, -1), (found.topk_weights, 0)
        route, table = found.route, found.route.table
        assert table is not None
        return (
            *(_array(_padded(tensor, room, fill)) for tensor, fill in fills),
            _array(route.is_token_in_rank),
            _array(route.counts.int()),
            _array(table.view(-1, self.num_ranks)),
            _array(found.expert_counts.int()),
        )

    def _save_dispatch(self, x: Any, topk_idx: Any, topk_weights: Any) -> Any:
        found = self._dispatch_forward(x, topk_idx, topk_weights)
        return found, (found[1], *found[3:6])

    def _grad_of_dispatch(self, saved: Any, gradients: Any) -> Any:
        indices, *route = saved
        # The weight of another rank's expert is a constant zero, whatever the caller made of it.
        of_weights = jnp.where(indices >= 0, gradients[2], 0)
        tokens, hidden = route[0].shape[0], gradients[0].shape[1]
        results = (
            jax.ShapeDtypeStruct((tokens, hidden), gradients[0].dtype),
            jax.ShapeDtypeStruct((tokens, indices.shape[1]), jnp.float32),
        )
        of_x, of_weights = io_callback(
            self._send_back, results, gradients[0], of_weights, *route, ordered=True
        )
        return of_x, None, of_weights

    @torch.no_grad()
    def _send_back(self, *arrays: Any) -> tuple[Any, Any]:
        of_x, of_weights, *route = self._tensors(*arrays)
        marks, counts, table, num_rows = self._route(*route)
        found = exchange._dispatch_backward(
            of_x[:num_rows], of_weights[:num_rows], marks, counts, self.num_experts, self.number, table
        )
        return _array(found[0]), _array(found[1])

    def _combine_forward(self, y: Any, marks: Any, counts: Any, table: Any) -> Any:
        result = jax.ShapeDtypeStruct((marks.shape[0], y.shape[1]), y.dtype)
        return io_callback(self._return, result, y, marks, counts, table, ordered=True)

    @torch.no_grad()
    def _return(self, *arrays: Any) -> Any:
        y, *route = self._tensors(*arrays)
        marks, counts, table, num_rows = self._route(*route)
        made = exchange.RouteTensors(marks, counts, self.num_experts, self.number, table)
        return _array(exchange.combine(y[:num_rows], made))

    def _save_combine(self, y: Any, marks: Any, counts: Any, table: Any) -> Any:
        return self._combine_forward(y, marks, counts, table), (y.shape[0], marks, counts, table)

    def _grad_of_combine(self, saved: Any, gradient: Any) -> Any:
        room, *route = saved
        result = jax.ShapeDtypeStruct((room, gradient.shape[1]), gradient.dtype)
        of_y = io_callback(partial(self._send_again, room), result, gradient, *route, ordered=True)
        return of_y, None, None, None

    @torch.no_grad()
    def _send_again(self, room: int, *arrays: Any) -> Any:
        gradient, *route = self._tensors(*arrays)
        marks, counts, table, num_rows = self._route(*route)
        found = exchange.combine_backward(
            gradient, marks, counts, num_rows, self.num_experts, self.number, table
        )
        return _array(_padded(found, room, 0))

    def _tensors(self, *arrays: Any) -> list[Tensor]:
        return [from_any(array).to(self.device) for array in arrays]

    def _route(self, marks: Tensor, counts: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """As operators take it, and N."""
        on_host = counts.to("cpu", torch.int64)
        return marks, on_host, table, int(on_host[:, self.buffer.rank].sum())


def _padded(tensor: Tensor, rows: int, fill: int) -> Tensor:
    """The tensor with rows of `fill` up to so many."""
    padded = tensor.new_full((rows, *tensor.shape[1:]), fill)
    padded[: tensor.shape[0]] = tensor
    return padded


def _array(tensor: Tensor) -> Any:
    """The tensor as numpy has it, with jax's dtype where numpy knows none."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
    return np.asarray(tensor)
