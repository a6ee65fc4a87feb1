"""Dispatch and combine with gradients, between processes, against plain autograd in one process."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deepep.nn as dnn
from deepep.errors import ArgumentError, DestroyedError
from deepep.nn import buffers
from deepep.reference import high_throughput as oracle
from deepep.reference.layout import dispatch_layout

HIDDEN, TOPK, EXPERTS = 8, 4, 12


def inputs(num_ranks: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Per rank: x [T, H], topk_idx with -1 and duplicates, topk_weights, and c [T, H], the loss's
    coefficients.

    T differs by rank; rank 1 has no tokens. Every value is its own.
    """
    generator = torch.Generator().manual_seed(num_ranks)
    made = []
    for rank in range(num_ranks):
        tokens = 0 if rank == 1 else 5 + 2 * rank
        idx = torch.randint(-1, EXPERTS, (tokens, TOPK), generator=generator)
        if tokens:
            idx[0] = -1  # a token that goes nowhere
            idx[1] = idx[1, 0]  # one expert, many times
        made.append(
            {
                "x": torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype),
                "idx": idx,
                "weights": torch.rand(tokens, TOPK, generator=generator),
                "c": torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype),
            }
        )
    return made


def forward_and_backward(buffer: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """y_row = tanh(x_row) * (sum of its local weights)
    on every rank that gets the row; loss = sum(c * combined).
    """
    x, weights = given["x"].requires_grad_(), given["weights"].requires_grad_()
    received = dnn.dispatch(buffer, x, given["idx"], weights, EXPERTS)
    gain = received.topk_weights.to(x.dtype).sum(1, keepdim=True)
    out = dnn.combine(torch.tanh(received.x) * gain, received.route)
    (out * given["c"]).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_gradients_equal_one_process_in_float64(on_ranks: Any, num_ranks: int) -> None:
    """Rows in float64, weights in float32 (as they travel).

    Bounds: out and x's gradient see fewer than 2^6 float64 operations on values of order 1, each with 2^-53
    relative error: 2^-47 is ample. A weight's gradient is rounded to float32 once, where its weight was
    widened: 2^-24.
    """
    given = inputs(num_ranks, torch.float64)
    got = on_ranks(num_ranks, forward_and_backward, per_rank=[(g,) for g in given])
    for mine, theirs in zip(given, got, strict=True):
        x, weights = mine["x"].requires_grad_(), mine["weights"].double().requires_grad_()
        valid = mine["idx"] >= 0
        gain = torch.where(valid, weights, 0).sum(1, keepdim=True)  # every entry counts on exactly one rank
        out = torch.tanh(x) * gain
        grads = torch.autograd.grad((out * mine["c"]).sum(), (x, weights))
        torch.testing.assert_close(theirs["out"], out.detach(), rtol=2.0**-47, atol=2.0**-47)
        torch.testing.assert_close(theirs["x"], grads[0], rtol=2.0**-47, atol=2.0**-47)
        torch.testing.assert_close(theirs["weights"].double(), grads[1], rtol=2.0**-23, atol=2.0**-40)
        assert torch.equal(theirs["weights"] == 0, ~valid), "an absent expert's weight has no gradient"


def bf16_forward_and_backward(buffer: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    received = dnn.dispatch(
        buffer, given["x"].requires_grad_(), given["idx"], given["weights"].requires_grad_(), EXPERTS
    )
    received.x.retain_grad()
    received.topk_weights.retain_grad()
    gain = received.topk_weights.sum(1, keepdim=True).to(torch.bfloat16)
    rows = torch.tanh(received.x) * gain
    rows.retain_grad()
    out = dnn.combine(rows, received.route)
    (out * given["c"]).sum().backward()
    return {
        "received": (received.x.detach(), received.topk_idx, received.topk_weights.detach()),
        "received_grads": (received.x.grad, received.topk_weights.grad),
        "rows": rows.detach(),
        "rows_grad": rows.grad,
        "out": out.detach(),
        "grads": (given["x"].grad, given["weights"].grad),
    }


def test_every_step_in_bf16_has_the_oracles_bits(on_ranks: Any) -> None:
    """Forward: dispatch, combine. Backward: combine's is a dispatch of the gradient, dispatch's a combine."""
    given = inputs(4, torch.bfloat16)
    got = on_ranks(4, bf16_forward_and_backward, per_rank=[(g,) for g in given])
    tables = [dispatch_layout(g["idx"], EXPERTS, 4).is_token_in_rank for g in given]

    def dispatched(field: str, **extra: Any) -> list[oracle.DispatchOutput]:
        made = [
            oracle.DispatchInput(g[field].detach(), t, **{k: g[v].detach() for k, v in extra.items()})
            for g, t in zip(given, tables, strict=True)
        ]
        return oracle.dispatch(made, EXPERTS)

    def same(a: list[torch.Tensor | None], b: list[Any]) -> None:
        for x, y in zip(a, b, strict=True):
            assert x is not None
            assert x.dtype == y.dtype
            assert torch.equal(x, y)

    forward = dispatched("x", topk_idx="idx", topk_weights="weights")
    same([f.recv_x for f in forward], [g["received"][0] for g in got])
    same([f.recv_topk_idx for f in forward], [g["received"][1] for g in got])
    same([f.recv_topk_weights for f in forward], [g["received"][2] for g in got])
    combined = oracle.combine([g["rows"] for g in got], tables)
    same([c.x for c in combined], [g["out"] for g in got])
    same([b.recv_x for b in dispatched("c")], [g["rows_grad"] for g in got])
    grad_weights = [
        torch.where(g["received"][1] >= 0, g["received_grads"][1], 0) for g in got
    ]  # foreign entries are constants
    home = oracle.combine([g["received_grads"][0] for g in got], tables, topk_weights=grad_weights)
    same([h.x for h in home], [g["grads"][0] for g in got])
    same([h.topk_weights for h in home], [g["grads"][1] for g in got])


def test_only_rows_or_only_weights_may_need_gradients(on_ranks: Any) -> None:
    def body(buffer: Any, given: dict[str, torch.Tensor]) -> None:
        for wanted in ("x", "weights"):
            tensors = {name: t.clone() for name, t in given.items()}
            tensors[wanted].requires_grad_()
            received = dnn.dispatch(buffer, tensors["x"], tensors["idx"], tensors["weights"], EXPERTS)
            loss = received.x.sum() if wanted == "x" else received.topk_weights.sum()
            loss.backward()
            in_rank = received.route.is_token_in_rank
            expected = (
                in_rank.sum(1, keepdim=True).expand(-1, HIDDEN).double()
                if wanted == "x"
                else (tensors["idx"] >= 0).float()
            )
            assert torch.equal(tensors[wanted].grad, expected)

    on_ranks(2, body, per_rank=[(g,) for g in inputs(2, torch.float64)])


def test_checkpointing_repeats_the_exchange_and_changes_nothing(on_ranks: Any) -> None:
    def body(buffer: Any, given: dict[str, torch.Tensor]) -> None:
        def layer(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            received = dnn.dispatch(buffer, x, given["idx"], weights, EXPERTS)
            return dnn.combine(torch.tanh(received.x), received.route)

        grads = []
        for call in (layer, lambda *a: checkpoint(layer, *a, use_reentrant=False)):
            x = given["x"].clone().requires_grad_()
            (call(x, given["weights"]) * given["c"]).sum().backward()
            grads.append(x.grad)
        assert torch.equal(*grads)

    on_ranks(2, body, per_rank=[(g,) for g in inputs(2, torch.float32)])


def test_saved_tensors_may_be_moved_and_copied(on_ranks: Any) -> None:
    """Routes are plain tensors: what packs and unpacks saved tensors
    (offloading) needs to know nothing of them.
    """

    def body(buffer: Any, given: dict[str, torch.Tensor]) -> None:
        x = given["x"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            received = dnn.dispatch(buffer, x, given["idx"], given["weights"], EXPERTS)
            out = dnn.combine(received.x, received.route)
        out.sum().backward()
        visits = received.route.is_token_in_rank.sum(1, keepdim=True).expand(-1, HIDDEN)
        assert torch.equal(x.grad, visits.double())

    on_ranks(2, body, per_rank=[(g,) for g in inputs(2, torch.float64)])


def test_observers_get_what_moved(on_ranks: Any) -> None:
    def body(buffer: Any, given: dict[str, torch.Tensor]) -> tuple[list[dnn.Exchange], list[int]]:
        seen: list[dnn.Exchange] = []
        with dnn.observe(seen.append):
            forward_and_backward(buffer, given)
        forward_and_backward(buffer, {k: v.detach() for k, v in given.items()})  # no observer
        sent = dispatch_layout(given["idx"], EXPERTS, buffer.group_size).num_tokens_per_rank
        return seen, sent.tolist()

    given = inputs(3, torch.float64)
    found = on_ranks(3, body, per_rank=[(g,) for g in given])
    matrix = [sent for _, sent in found]
    for rank, (seen, _) in enumerate(found):
        assert [e.name for e in seen] == ["dispatch", "combine", "combine_backward", "dispatch_backward"]
        out, back = tuple(matrix[rank]), tuple(row[rank] for row in matrix)
        assert [(e.rows_sent, e.rows_received) for e in seen] == [
            (out, back), (back, out), (out, back), (back, out),
        ]  # fmt: skip
        assert [e.row_bytes for e in seen] == [
            HIDDEN * 8 + TOPK * (8 + 4), HIDDEN * 8, HIDDEN * 8, HIDDEN * 8 + TOPK * 4,
        ]  # fmt: skip
        assert all(e.seconds > 0 for e in seen)


def test_a_bad_argument_on_one_rank_raises_on_all(on_ranks: Any) -> None:
    def body(buffer: Any, given: dict[str, torch.Tensor]) -> str:
        with pytest.raises(ArgumentError) as caught:
            dnn.dispatch(buffer, given["x"], given["idx"], given["weights"], EXPERTS)
        # The buffer works on.
        idx = torch.zeros(1, 1, dtype=torch.int64)
        dnn.dispatch(buffer, torch.ones(1, HIDDEN), idx, torch.ones(1, 1), EXPERTS)
        return str(caught.value)

    given = inputs(2, torch.float32)
    given[1]["x"] = torch.randn(3, HIDDEN)  # rank 1 has indices for no token
    messages = on_ranks(2, body, per_rank=[(g,) for g in given])
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1: ")


def test_nothing_is_kept_and_a_lost_buffer_is_named(on_ranks: Any) -> None:
    def body(buffer: Any, given: dict[str, torch.Tensor]) -> None:
        from deepep import Buffer

        def count() -> int:
            gc.collect()
            return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

        forward_and_backward(buffer, {k: v.clone() for k, v in given.items()})
        before, passes = count(), 8
        for _ in range(passes):
            forward_and_backward(buffer, {k: v.clone() for k, v in given.items()})
        # What a pass keeps is there `passes` times; another thread may be holding one just now.
        assert count() - before < passes

        other = Buffer(buffer.group, timeout=30.0)
        number = dnn.buffer_number(other)
        assert number == dnn.buffer_number(other) != dnn.buffer_number(buffer)
        received = dnn.dispatch(number, given["x"], given["idx"], given["weights"], EXPERTS)
        gone = weakref.ref(other)
        other.destroy()
        with pytest.raises(DestroyedError):
            dnn.combine(received.x, received.route)
        del other
        gc.collect()
        assert gone() is None, "a number keeps its buffer alive"
        assert number not in buffers._buffers
        with pytest.raises(DestroyedError):
            dnn.combine(received.x, received.route)

    on_ranks(2, body, per_rank=[(g,) for g in inputs(2, torch.float32)])


def test_operators_keep_their_promises_to_torch(on_ranks: Any) -> None:
    """Schemas, fake implementations and autograd registration.

    One rank: the check runs operators as it likes.
    """

    def body(buffer: Any) -> None:
        # Operators cannot travel: the ranks import their own.
        from deepep.nn.exchange import _combine, _dispatch, _dispatch_backward, combine_backward

        (given,) = inputs(1, torch.float32)
        x, weights = given["x"].requires_grad_(), given["weights"].requires_grad_()
        number = dnn.buffer_number(buffer)
        arguments = (x, given["idx"], weights, EXPERTS, number)
        torch.library.opcheck(_dispatch.overload, arguments)
        recv_x, _, recv_weights, in_rank, counts, _, _ = (t.detach() for t in _dispatch(*arguments))
        torch.library.opcheck(
            _combine.overload, (recv_x.clone().requires_grad_(), in_rank, counts, EXPERTS, number)
        )
        torch.library.opcheck(
            _dispatch_backward.overload, (recv_x, recv_weights, in_rank, counts, EXPERTS, number)
        )
        rows = len(recv_x)
        torch.library.opcheck(combine_backward.overload, (x.detach(), in_rank, counts, rows, EXPERTS, number))

    on_ranks(1, body)
