"""Wrong arguments of deepep.nn: the library's own errors, on every rank where the call is collective."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import deepep.nn as dnn
from deepep.errors import ArgumentError, ArgumentTypeError, DestroyedError, HandleError, RangeError
from deepep.nn.grouped import grouped_mm
from deepep.nn.rows import expand_rows, expert_rows

HIDDEN, EXPERTS, TOPK = 8, 4, 2


class Lone:
    """Stands for the buffer of a world of one rank, for its weights alone."""

    rank, group_size, group = 0, 1, None


def good(rank: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "x": torch.randn(3, HIDDEN, generator=generator),
        "topk_idx": torch.tensor([[0, 3], [2, -1], [1, 1]]),
        "topk_weights": torch.rand(3, TOPK, generator=generator),
        "num_experts": EXPERTS,
    }


BAD_DISPATCH: dict[str, tuple[str, Any]] = {
    "x a list": ("x", [[1.0] * HIDDEN] * 3),
    "x an array": ("x", np.ones((3, HIDDEN), np.float32)),
    "x None": ("x", None),
    "x on meta": ("x", torch.ones(3, HIDDEN, device="meta")),
    "x sparse": ("x", torch.ones(3, HIDDEN).to_sparse()),
    "x of bools": ("x", torch.ones(3, HIDDEN, dtype=torch.bool)),
    "x of one dimension": ("x", torch.ones(HIDDEN)),
    "x of odd rows": ("x", torch.ones(3, 1)),
    "topk_idx a list": ("topk_idx", [[0, 1]] * 3),
    "topk_idx of floats": ("topk_idx", torch.zeros(3, TOPK)),
    "topk_idx of int8": ("topk_idx", torch.zeros(3, TOPK, dtype=torch.int8)),
    "topk_idx too large": ("topk_idx", torch.full((3, TOPK), EXPERTS)),
    "topk_weights None": ("topk_weights", None),
    "topk_weights of ints": ("topk_weights", torch.ones(3, TOPK, dtype=torch.int64)),
    "topk_weights of other tokens": ("topk_weights", torch.ones(2, TOPK)),
    "num_experts a float": ("num_experts", 4.0),
    "num_experts a flag": ("num_experts", True),
    "num_experts an array": ("num_experts", np.array([4, 4])),
    "num_experts a tensor": ("num_experts", torch.tensor([4, 4])),
    "num_experts odd": ("num_experts", 3),
    "num_experts huge": ("num_experts", 1 << 70),
    "num_experts none": ("num_experts", 0),
}


@pytest.mark.parametrize("everywhere", [False, True], ids=["one rank", "all ranks"])
def test_dispatch_names_the_argument_on_all_ranks(on_ranks: Any, everywhere: bool) -> None:
    def body(buffer: Any) -> dict[str, tuple[str, str]]:
        found = {}
        for name, (argument, value) in BAD_DISPATCH.items():
            bad = {argument: value} if everywhere or buffer.rank == 1 else {}
            with pytest.raises(ArgumentError) as caught:
                dnn.dispatch(buffer, **(good(buffer.rank) | bad))
            received = dnn.dispatch(buffer, **good(buffer.rank))
            assert dnn.combine(received.x, received.route).shape == (3, HIDDEN), "the buffer works on"
            found[name] = (caught.value.argument, str(caught.value))
        return found

    first, second = on_ranks(2, body)
    for name, (argument, _) in BAD_DISPATCH.items():
        # Of two tensors that do not fit together, either may be named.
        pair = (
            {argument, "topk_idx", "topk_weights"}
            if argument.startswith("topk") or argument == "x"
            else {argument}
        )
        assert first[name][0] == second[name][0], name
        assert first[name][0] in pair, (name, first[name])
        if not everywhere:
            assert first[name][1].startswith("rank 1: "), name
            assert first[name] == second[name]


def bad_routes(route: dnn.RouteTensors) -> dict[str, Any]:
    table, counts = route.is_token_in_rank, route.counts
    return {
        "another table": route._replace(is_token_in_rank=~table),
        "fewer ranks": route._replace(is_token_in_rank=table[:, :1].contiguous()),
        "a table of numbers": route._replace(is_token_in_rank=table.int()),
        "other counts": route._replace(counts=counts + (counts > 0)),
        "negative counts": route._replace(counts=counts - 100),
        "counts of another dtype": route._replace(counts=counts.int()),
        "counts of other ranks": route._replace(counts=counts[:1]),
        "no counts": route._replace(counts=None),
        "a list for a table": route._replace(is_token_in_rank=table.tolist()),
        "experts": route._replace(num_experts=np.array([1, 2])),
    }


def test_combine_refuses_what_is_no_route_of_its_dispatch_on_all_ranks(on_ranks: Any) -> None:
    def body(buffer: Any) -> dict[str, str]:
        received = dnn.dispatch(buffer, **good(buffer.rank))
        expected = dnn.combine(received.x, received.route)
        found = {}
        for name, route in bad_routes(received.route).items():
            with pytest.raises(ArgumentError) as caught:
                dnn.combine(received.x, route if buffer.rank == 1 else received.route)
            found[name] = str(caught.value)
        for name, rows in {
            "rows None": None,
            "fewer rows": received.x[1:],
            "bytes": received.x.byte(),
        }.items():
            with pytest.raises(ArgumentError) as caught:
                dnn.combine(rows if buffer.rank == 1 else received.x, received.route)
            found[name] = str(caught.value)
        assert torch.equal(dnn.combine(received.x, received.route), expected), "the buffer works on"
        with pytest.raises(HandleError):
            dnn.combine(received.x, bad_routes(received.route)["another table"])
        with pytest.raises(ArgumentTypeError):  # no buffer is known, so no other rank can be reached
            dnn.combine(received.x, tuple(received.route))
        return found

    first, second = on_ranks(2, body)
    assert first == second
    assert all(message.startswith("rank 1: ") for message in first.values()), first


def test_negated_views_travel_with_their_sign(on_ranks: Any) -> None:
    """Such a tensor's bytes hold the other sign."""

    def body(buffer: Any) -> None:
        plain = good(buffer.rank)
        negated = torch.complex(torch.zeros(3, HIDDEN), -plain["x"]).conj().imag
        assert negated.is_neg()
        assert torch.equal(negated, plain["x"])
        expected, got = dnn.dispatch(buffer, **plain), dnn.dispatch(buffer, **(plain | {"x": negated}))
        assert torch.equal(got.x, expected.x)
        rows = torch.complex(torch.zeros_like(got.x), -got.x.detach()).conj().imag
        assert torch.equal(dnn.combine(rows, got.route), dnn.combine(expected.x, expected.route))

    on_ranks(2, body)


def test_buffers_that_are_none() -> None:
    for wrong in (None, "buffer", 1.5, True, object(), [1], np.arange(2)):
        with pytest.raises(ArgumentTypeError) as caught:
            dnn.dispatch(wrong, **good())  # type: ignore[arg-type]
        assert caught.value.argument == "buffer"
    for number in (0, -1, 1 << 40, 1 << 100):
        with pytest.raises(RangeError):
            dnn.dispatch(number, **good())
    number = dnn.buffer_number(Lone())
    with pytest.raises(DestroyedError):
        dnn.dispatch(number, **good())


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("hidden", [0, -1, 8.0, True, None, "8", np.array([8, 8]), 1 << 70]),
        ("expert_hidden", [0, 8.0, torch.tensor([8, 8]), 1 << 70]),
        ("num_experts", [0, 4.0, np.arange(3), 1 << 40]),
        ("num_topk", [0, EXPERTS + 1, 1.0, None, 10**5000]),
        ("shared_hidden", [-1, 1.5, "", np.array([1, 2])]),
        ("seed", [1.5, None, 1 << 64, np.arange(2)]),
        ("gate", [None, 3, torch.ones(2)]),
        ("device", ["nowhere", 1.5, object(), True]),
        ("dtype", ["bfloat16", torch.int32, torch.float16, torch.bool, 16]),
        ("buffer", [None, 3, "x"]),
    ],
)
def test_a_layers_arguments_are_named(argument: str, values: list[Any]) -> None:
    sizes = {"hidden": HIDDEN, "expert_hidden": 8, "num_experts": EXPERTS, "num_topk": TOPK}
    lone = Lone()
    for value in values:
        with pytest.raises(ArgumentError) as caught:
            dnn.ExpertParallelMoE(**({"buffer": lone} | sizes | {argument: value}))
        assert caught.value.argument == argument, value
    dnn.ExpertParallelMoE(lone, **(sizes | {"hidden": np.int64(HIDDEN), "num_topk": torch.tensor(TOPK)}))


def test_rows_of_a_layer_are_refused_on_all_ranks(on_ranks: Any) -> None:
    def body(buffer: Any) -> list[str]:
        layer = dnn.ExpertParallelMoE(
            buffer, hidden=HIDDEN, expert_hidden=8, num_experts=EXPERTS, num_topk=TOPK
        )
        found = []
        for wrong in (
            None,
            [1.0],
            torch.ones(3, HIDDEN + 1),
            torch.tensor(1.0),
            torch.ones(2, HIDDEN).long(),
        ):
            with pytest.raises(ArgumentError) as caught:
                layer(wrong if buffer.rank == 1 else torch.ones(2, HIDDEN))
            found.append(str(caught.value))
        layer(torch.ones(2, HIDDEN))
        return found

    first, second = on_ranks(2, body)
    assert first == second
    assert all(message.startswith("rank 1: x: got ") for message in first)


def test_parts_used_alone_check_what_they_get() -> None:
    experts = dnn.GroupedSwiGLU(2, HIDDEN, 8)
    x, idx, weights = torch.ones(3, HIDDEN), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    assert dnn.apply_experts(experts, x, idx, weights).shape == (3, HIDDEN)
    for change in (
        {"x": None},
        {"x": torch.ones(HIDDEN)},
        {"x": x.double()},
        {"topk_idx": idx.float()},
        {"topk_idx": idx[1:]},
        {"topk_idx": idx + 1},
        {"topk_idx": idx - 2},
        {"topk_weights": weights[:, 1:]},
        {"topk_weights": idx},
    ):
        with pytest.raises(ArgumentError):
            dnn.apply_experts(experts, **({"x": x, "topk_idx": idx, "topk_weights": weights} | change))
    pairs, counts, slots = expert_rows(idx, 2)
    rows = expand_rows(x, pairs, slots)
    for wrong in (counts + 1, counts[:1], torch.tensor([7, -1])):
        with pytest.raises(ArgumentError) as caught:
            grouped_mm(rows, experts.gate_up.detach(), wrong)
        assert caught.value.argument == "counts"
    with pytest.raises(ArgumentTypeError):
        grouped_mm(rows.double(), experts.gate_up.detach(), counts)
    with pytest.raises(ArgumentError):
        dnn.SwiGLU(HIDDEN, 8)(x.double())
    with pytest.raises(ArgumentTypeError), dnn.observe("not a function"):  # type: ignore[arg-type]
        pass


def test_operators_have_a_namespace_of_their_own() -> None:
    """torchtitan defines deepep::dispatch and deepep::combine."""
    library = torch.library.Library("deepep", "DEF")
    library.define("dispatch(Tensor x) -> Tensor")
    library.define("combine(Tensor x) -> Tensor")
    assert torch.ops.deepep_nn.dispatch is not None
