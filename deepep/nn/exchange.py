"""Dispatch and combine with gradients, as operators that torch.compile traces through without a break.

The backward of dispatch is combine (rows and top-k weights travel home and are summed), the backward of
combine is a cached dispatch (the gradient of every token goes to all ranks that returned a row for it).

Operators take and return tensors only, so a routing travels between them as three: `is_token_in_rank` [T, R]
bool, `counts` [R, R] int64 on the CPU, rows from each source to each destination, the same on all ranks, and
`table`, the backend's own. Every backend can rebuild its own handle from these without communicating, so
nothing has to be kept on the side: an operator's state lives as long as its tensors, through checkpointing,
saved-tensor hooks and compiled graphs alike. Buffers are known to operators by number (`buffer_number`),
weakly.

Collective: every rank must run the same operators in the same order, forward and backward, also with T = 0.
Whether a backward exchanges must therefore not depend on what requires a gradient on this rank: where grad
mode is on, outputs always take part (`_ANCHOR`). A rank whose loss does not depend on the layer's output
skips the backward exchanges, and the others end in PeerTimeoutError.

Shapes: R ranks, E experts, K top-k, T tokens here, H hidden, N rows received.
"""

from __future__ import annotations

import time
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep.errors import ArgumentError, ArgumentTypeError, HandleError
from deepep.nn.buffers import BufferLike, checked_number, engine_of, refuse
from deepep.nn.observe import Exchange, ExchangeName, observed, report
from deepep.nn.operators import operator
from deepep.nn.precision import check_plain
from deepep.runtime.checks import check_int, dtype_names
from deepep.runtime.engine import Engine
from deepep.runtime.requests import CombineRequest, Dispatched, DispatchRequest, Operation, Route, Schedule

with torch.inference_mode(False):
    #: An input that always requires a gradient, and never gets one.
    _ANCHOR = torch.zeros(0, dtype=torch.float32, device="cpu", requires_grad=True)


class Received(NamedTuple):
    """Rows that `dispatch` gives a rank, in (source rank, source token) order, each once.

    x: [N, H]. topk_idx: [N, K], local expert index, -1 for other ranks' experts. topk_weights: [N, K], 0
    where the index is -1. route: for `combine`. expert_counts: [L] int64 on the CPU, top-k entries of each
    local expert.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    route: RouteTensors
    expert_counts: Tensor


class RouteTensors(NamedTuple):
    """Ranks that each token went to, as tensors.

    is_token_in_rank: [T, R] bool. counts: [R, R] int64 (source, destination), on the CPU. table: [.., R]
    int32, the backend's own; without it the device is waited for in every exchange.
    """

    is_token_in_rank: Tensor
    counts: Tensor
    num_experts: int
    buffer: int
    table: Tensor | None = None


def dispatch(
    buffer: BufferLike | int, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
) -> Received:
    """Sends every token, once, to each rank that owns one of its experts.

    buffer: a deepep.Buffer, or its `buffer_number`. x: [T, H]. topk_idx: [T, K] int32 or int64, -1 for no
    expert. topk_weights: [T, K] of a floating dtype, travel as float32. Differentiable, once, in x and
    topk_weights; where grad mode is on, the outputs require gradients whatever the inputs do. Raises as
    `Buffer.dispatch` does.
    """
    number = checked_number(buffer)
    if not torch.compiler.is_compiling():
        problem = _problem_of(x=x, topk_idx=topk_idx, topk_weights=topk_weights, num_experts=num_experts)
        if problem is not None:
            refuse(number, Operation.DISPATCH, problem)
    if topk_weights.dtype != torch.float32:
        topk_weights = topk_weights.float()
    anchor = anchor_for(x, topk_weights)
    recv_x, recv_idx, recv_weights, in_rank, counts, expert_counts, table = _dispatch(
        x, topk_idx, topk_weights, num_experts, number, anchor
    )
    route = RouteTensors(in_rank, counts, num_experts, number, table)
    return Received(recv_x, recv_idx, recv_weights, route, expert_counts)


def combine(y: Tensor, route: RouteTensors) -> Tensor:
    """Returns y's rows [N, H] to their tokens and sums them, ranks ascending: [T, H].

    No weights are applied. Differentiable, once, in y; where grad mode is on, the sum requires a gradient
    whatever y does. Raises as `Buffer.combine` does.
    """
    if not torch.compiler.is_compiling():
        if not isinstance(route, RouteTensors):
            raise ArgumentTypeError("route", type(route).__name__, "the route of deepep.nn.dispatch")
        number = checked_number(route.buffer)
        problem = _problem_of(
            y=y,
            is_token_in_rank=route.is_token_in_rank,
            counts=route.counts,
            num_experts=route.num_experts,
        )
        if problem is not None:
            refuse(number, Operation.COMBINE, problem)
    anchor = anchor_for(y)
    return _combine(
        y, route.is_token_in_rank, route.counts, route.num_experts, route.buffer, anchor, route.table
    )


def anchor_for(*inputs: Tensor) -> Tensor | None:
    """An input that has outputs require gradients: where grad mode is on, if no other input does."""
    if any(tensor.requires_grad for tensor in inputs):
        return None
    return _ANCHOR if torch.is_grad_enabled() else None


def _problem_of(num_experts: object, **tensors: object) -> ArgumentError | None:
    """The problem of arguments that the operators' schemas would refuse on this rank alone."""
    try:
        for name, value in tensors.items():
            check_plain(name, value)
        check_int("num_experts", num_experts, 1, 2**31 - 1)
        weights = tensors.get("topk_weights")
        if isinstance(weights, Tensor) and not weights.is_floating_point():
            raise ArgumentTypeError("topk_weights", dtype_names([weights.dtype]), "a floating-point tensor")
    except ArgumentError as problem:
        return problem
    return None


@operator("dispatch")
def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    buffer: int,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    engine, started = engine_of(buffer), time.perf_counter()
    received, tables = send_rows(engine, in_memory(x), None, topk_idx, topk_weights, num_experts)
    assert received.topk_idx is not None
    assert received.topk_weights is not None
    row_bytes = row_bytes_of(x, topk_idx, topk_weights)
    report_exchange(engine, "dispatch", tables[1].t(), row_bytes, started)
    return received.x, received.topk_idx, received.topk_weights, *tables


def send_rows(
    engine: Engine, x: Tensor, scales: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, num_experts: int
) -> tuple[Dispatched, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A fresh dispatch, and the tensors of its route: is_token_in_rank, counts, expert_counts, table."""
    request = DispatchRequest(
        x,
        scales,
        topk_idx=in_memory(topk_idx),
        topk_weights=in_memory(topk_weights),
        num_experts=num_experts,
    )
    received = engine.dispatch(request, Schedule())
    # torch.tensor of a list takes three times as long, and the device has nothing to do meanwhile.
    expert_counts = torch.frombuffer(array("q", received.num_tokens_per_expert), dtype=torch.int64)
    counts, table = engine.route_counts(received.route), engine.route_table(received.route)
    return received, (received.route.is_token_in_rank, counts, expert_counts, table)


@_dispatch.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    buffer: int,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(num_rows, x.shape[1]), *fake_fields(
        num_rows, x, topk_idx, topk_weights, num_experts, buffer
    )


def fake_fields(
    num_rows: Any, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int, buffer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs of a fresh dispatch beside its rows, without values."""
    info = engine_of(buffer).info
    num_ranks = info.num_ranks
    table_rows = x.shape[0] + num_ranks if info.backend == "cuda" else 0
    return (
        topk_idx.new_empty(num_rows, topk_idx.shape[1]),
        topk_weights.new_empty(num_rows, topk_weights.shape[1]),
        x.new_empty(x.shape[0], num_ranks, dtype=torch.bool),
        torch.empty(num_ranks, num_ranks, dtype=torch.int64, device="cpu"),
        torch.empty(num_experts // num_ranks, dtype=torch.int64, device="cpu"),
        x.new_empty(table_rows, num_ranks, dtype=torch.int32),
    )


@operator("dispatch_backward")
def _dispatch_backward(
    grad_x: Tensor,
    grad_weights: Tensor,
    in_rank: Tensor,
    counts: Tensor,
    num_experts: int,
    buffer: int,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """grad_x [N, H], grad_weights [N, K] -> [T, H], [T, K]: a combine with weights."""
    engine, started = engine_of(buffer), time.perf_counter()
    route = restored(buffer, Operation.COMBINE, in_rank, counts, num_experts, table)
    request = CombineRequest(in_memory(grad_x), route, topk_weights=in_memory(grad_weights))
    combined = engine.combine(request, Schedule())
    assert combined.topk_weights is not None
    report_exchange(engine, "dispatch_backward", counts, row_bytes_of(grad_x, grad_weights), started)
    return combined.x, combined.topk_weights


@_dispatch_backward.register_fake
def _(
    grad_x: Tensor,
    grad_weights: Tensor,
    in_rank: Tensor,
    counts: Tensor,
    num_experts: int,
    buffer: int,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    num_tokens = in_rank.shape[0]
    return (
        grad_x.new_empty(num_tokens, grad_x.shape[1]),
        grad_weights.new_empty(num_tokens, grad_weights.shape[1]),
    )


@operator("combine")
def _combine(
    y: Tensor,
    in_rank: Tensor,
    counts: Tensor,
    num_experts: int,
    buffer: int,
    anchor: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    engine, started = engine_of(buffer), time.perf_counter()
    route = restored(buffer, Operation.COMBINE, in_rank, counts, num_experts, table)
    combined = engine.combine(CombineRequest(in_memory(y), route), Schedule())
    report_exchange(engine, "combine", counts, row_bytes_of(y), started)
    return combined.x


@_combine.register_fake
def _(
    y: Tensor,
    in_rank: Tensor,
    counts: Tensor,
    num_experts: int,
    buffer: int,
    anchor: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    return y.new_empty(in_rank.shape[0], y.shape[1])


@operator("combine_backward")
def combine_backward(
    grad: Tensor,
    in_rank: Tensor,
    counts: Tensor,
    num_rows: int,
    num_experts: int,
    buffer: int,
    table: Tensor | None = None,
) -> Tensor:
    """grad [T, H] -> [N, H]: a cached dispatch. `num_rows`: N, which the caller knows from the forward."""
    engine, started = engine_of(buffer), time.perf_counter()
    route = restored(buffer, Operation.DISPATCH, in_rank, counts, num_experts, table)
    received = engine.dispatch(DispatchRequest(in_memory(grad), route=route), Schedule())
    report_exchange(engine, "combine_backward", counts.t(), row_bytes_of(grad), started)
    return received.x


@combine_backward.register_fake
def _(
    grad: Tensor,
    in_rank: Tensor,
    counts: Tensor,
    num_rows: int,
    num_experts: int,
    buffer: int,
    table: Tensor | None = None,
) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[1])


def save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves the route. The output: rows, more that has no gradient, then as `fake_fields` lists them."""
    *more, recv_idx, _, in_rank, counts, expert_counts, table = output[1:]
    ctx.save_for_backward(recv_idx, in_rank, counts, table)
    ctx.num_experts, ctx.buffer = inputs[3], inputs[4]
    ctx.mark_non_differentiable(*more, recv_idx, in_rank, counts, expert_counts, table)


def grad_of_dispatch(
    ctx: Any, grad_x: Tensor, _idx: None, grad_weights: Tensor, *_: None
) -> tuple[Tensor, None, Tensor, None, None, None]:
    """A combine with weights of the gradients of the rows and of their top-k weights."""
    refuse_second_derivative(ctx.buffer, Operation.COMBINE, grad_x, grad_weights)
    recv_idx, in_rank, counts, table = ctx.saved_tensors
    # The weight of another rank's expert is a constant zero here, whatever the caller computed from it.
    grad_weights = torch.where(recv_idx >= 0, grad_weights, 0)
    grad_x, grad_weights = _dispatch_backward(
        grad_x, grad_weights, in_rank, counts, ctx.num_experts, ctx.buffer, table
    )
    return grad_x, None, grad_weights, None, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, in_rank, counts, ctx.num_experts, ctx.buffer, _, table = inputs
    ctx.num_rows = y.shape[0]
    ctx.save_for_backward(in_rank, counts, table)


def _grad_of_combine(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
    refuse_second_derivative(ctx.buffer, Operation.DISPATCH, grad)
    in_rank, counts, table = ctx.saved_tensors
    grad_y = combine_backward(grad, in_rank, counts, ctx.num_rows, ctx.num_experts, ctx.buffer, table)
    return grad_y, None, None, None, None, None, None


_dispatch.register_autograd(grad_of_dispatch, setup_context=save_dispatch)
_combine.register_autograd(_grad_of_combine, setup_context=_save_combine)


def refuse_second_derivative(buffer: int, operation: Operation, *grads: Tensor) -> None:
    """Backward exchanges have no gradient of their own: torch would take them for constants, in silence."""
    if torch.is_grad_enabled() and any(grad.requires_grad for grad in grads):
        allowed = "False: dispatch and combine are differentiable once"
        refuse(buffer, operation, ArgumentError("create_graph", "True", allowed))


def restored(
    buffer: int,
    operation: Operation,
    in_rank: Tensor,
    counts: Tensor,
    num_experts: int,
    table: Tensor | None,
) -> Route:
    """The engine's route of these tensors; on all ranks a HandleError for tensors that are no route here."""
    engine = engine_of(buffer)
    ranks, rank = engine.info.num_ranks, engine.info.rank
    got = None
    if in_rank.dtype != torch.bool or in_rank.ndim != 2 or in_rank.shape[1] != ranks:
        got = f"is_token_in_rank {dtype_names([in_rank.dtype])} {list(in_rank.shape)}"
    elif counts.dtype != torch.int64 or counts.shape != (ranks, ranks) or counts.device.type != "cpu":
        got = f"counts {dtype_names([counts.dtype])} {list(counts.shape)} on {counts.device}"
    elif ranks and int(counts.min()) < 0:
        got = "counts below 0"
    elif in_rank.device.type == "cpu":  # on a device the sum would have to be waited for
        sent, stated = in_rank.sum(0), counts[rank]
        if bool(
            ((sent != stated) & (stated != 0)).any()
        ):  # a masked rank has no rows, whatever the table says
            got = f"a table of {sent.tolist()} tokens, counts of {stated.tolist()}"
    if got is not None:
        refuse(buffer, operation, HandleError("route", got, "the route of deepep.nn.dispatch, unchanged"))
    if table is not None and (table.dtype != torch.int32 or table.device != in_rank.device):
        got = f"a table {dtype_names([table.dtype])} on {table.device}"
        refuse(buffer, operation, HandleError("route", got, "the route of deepep.nn.dispatch, unchanged"))
    try:
        return engine.restore_route(in_rank, counts, num_experts, table)
    except HandleError as problem:
        refuse(buffer, operation, problem)


def in_memory(tensor: Tensor) -> Tensor:
    """Contiguous, and with its values in its bytes: a negated view has them with the other sign."""
    return tensor.contiguous().resolve_neg()


def row_bytes_of(*fields: Tensor) -> int:
    """Bytes of a row of all these."""
    return sum(field.shape[1] * field.element_size() for field in fields)


def report_exchange(
    engine: Engine, name: ExchangeName, arriving: Tensor, row_bytes: int, started: float
) -> None:
    """Reports an exchange to those who observe.

    arriving [R, R]: rows this exchange brings to each rank (table rows) from each rank (columns).
    """
    if not observed():
        return
    seconds = time.perf_counter() - started
    rank = engine.info.rank
    sent, received = arriving[:, rank].tolist(), arriving[rank].tolist()
    report(Exchange(name, tuple(sent), tuple(received), row_bytes, seconds))
