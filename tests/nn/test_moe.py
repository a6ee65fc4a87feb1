"""ExpertParallelMoE over processes against the same layer written out plainly in one process."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import deepep.nn as dnn
from deepep.errors import RangeError, ShapeError
from deepep.gate import group_limited_topk, sigmoid_topk, softmax_topk

HIDDEN, EXPERT_HIDDEN, EXPERTS, TOPK = 16, 8, 8, 3
GATES = {
    "sigmoid": sigmoid_topk,
    "softmax": partial(softmax_topk, normalize=True),
    "group limited": partial(group_limited_topk, num_groups=4, num_kept_groups=2, scale=2.5),
}


def tokens_of(rank: int) -> torch.Tensor:
    """[T, H] float64; rank 2 has none."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(0 if rank == 2 else 4 + 3 * rank, HIDDEN, generator=generator, dtype=torch.float64)


def layer_on(buffer: Any, gate: str = "sigmoid", **options: Any) -> dnn.ExpertParallelMoE:
    options = {"shared_hidden": 12, "seed": 5, "dtype": torch.float64} | options
    layer = dnn.ExpertParallelMoE(
        buffer,
        hidden=HIDDEN,
        expert_hidden=EXPERT_HIDDEN,
        num_experts=EXPERTS,
        num_topk=TOPK,
        gate=GATES[gate],
        **options,
    )
    # A bias, so that selection and weights differ.
    layer.router.bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS).flip(0))
    return layer


class Lone:
    """Stands for the buffer of a world of one rank, for its weights alone."""

    rank, group_size, group = 0, 1, None


def plain(layer: dnn.ExpertParallelMoE, x: torch.Tensor) -> torch.Tensor:
    """The layer by definition: every token through its experts, one after the other.

    `layer` holds all experts.
    """
    routing = layer.router.gate(x @ layer.router.weight.t(), TOPK, bias=layer.router.bias)
    out = []
    for t in range(len(x)):
        y = torch.zeros(HIDDEN, dtype=x.dtype)
        for k in range(TOPK):
            expert = int(routing.topk_idx[t, k])
            gate, up = (x[t] @ layer.experts.gate_up[expert]).chunk(2)
            row = (nn.functional.silu(gate) * up) @ layer.experts.down[expert]
            y = y + routing.topk_weights[t, k].float().double() * row  # weights travel as float32
        if layer.shared is not None:
            gate, up = (x[t] @ layer.shared.gate_up).chunk(2)
            y = y + (nn.functional.silu(gate) * up) @ layer.shared.down
        out.append(y)
    return torch.stack(out) if out else x.new_zeros(0, HIDDEN)


def run_layer(buffer: Any, gate: str, shared_hidden: int) -> dict[str, Any]:
    layer = layer_on(buffer, gate, shared_hidden=shared_hidden)
    x = tokens_of(buffer.rank).requires_grad_()
    y = layer(x)
    (y * torch.cos(y.detach())).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "grads": grads}


@pytest.mark.parametrize(
    ("num_ranks", "gate", "shared"),
    [(1, "sigmoid", 12), (2, "softmax", 0), (4, "group limited", 12), (4, "sigmoid", 0)],
)
def test_outputs_and_all_gradients_equal_the_plain_layer(
    on_ranks: Any, num_ranks: int, gate: str, shared: int
) -> None:
    """In float64, weights rounded to float32 on both sides where they travel.

    Bounds: some 2^8 float64 operations per value, values of order 1 to 2^5: 2^-53 * 2^8 * 2^5 = 2^-40.
    Gradients that pass through a weight are rounded to float32 on their way home: the router's, and x's
    through the router. A gradient of a weight is a sum of HIDDEN products of order 1, and 2^-24 of it is
    lost: 2^-24 * 2^4 = 2^-20.
    """
    got = on_ranks(num_ranks, run_layer, gate, shared)
    layer = layer_on(Lone(), gate, shared_hidden=shared)
    xs = [tokens_of(r).requires_grad_() for r in range(num_ranks)]
    ys = [plain(layer, x) for x in xs]
    loss = sum(((y * torch.cos(y.detach())).sum() for y in ys), torch.zeros(()))
    loss.backward()
    for rank in range(num_ranks):
        torch.testing.assert_close(got[rank]["y"], ys[rank].detach(), rtol=2.0**-40, atol=2.0**-40)
        if len(xs[rank]) == 0:
            continue  # nothing to differentiate here; the ranks had to exchange gradients all the same
        torch.testing.assert_close(got[rank]["x"], xs[rank].grad, rtol=2.0**-20, atol=2.0**-20)
    for name, parameter in layer.named_parameters():
        parts = [g["grads"][name] for g in got]
        mine = torch.cat(parts) if name.startswith("experts.") else sum(parts[1:], parts[0])
        bound = 2.0**-20 if name.startswith("router.") else 2.0**-40
        torch.testing.assert_close(
            mine, parameter.grad, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_same_seed_is_the_same_model_for_any_number_of_ranks(on_ranks: Any) -> None:
    def weights(buffer: Any) -> dict[str, torch.Tensor]:
        return {k: v.detach() for k, v in layer_on(buffer).state_dict().items()}

    whole = layer_on(Lone()).state_dict()
    for num_ranks in (2, 4):
        parts = on_ranks(num_ranks, weights)
        for name, expected in whole.items():
            if name.startswith("experts."):
                assert torch.equal(torch.cat([p[name] for p in parts]), expected)
            else:
                assert all(torch.equal(p[name], expected) for p in parts)


def test_results_have_the_same_bits_every_time(on_ranks: Any) -> None:
    def body(buffer: Any) -> None:
        layer = layer_on(buffer, dtype=torch.float32)
        results = []
        for _ in range(3):
            layer.zero_grad()
            x = tokens_of(buffer.rank).float().requires_grad_()
            y = layer(x)
            y.sum().backward()
            results.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
        for again in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))

    on_ranks(4, body)


def test_bf16_rows_stay_bf16_and_any_leading_shape_is_taken(on_ranks: Any) -> None:
    def body(buffer: Any) -> None:
        layer = layer_on(buffer, dtype=torch.bfloat16)
        x = torch.randn(2, 3, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        assert (y.dtype, y.shape) == (torch.bfloat16, x.shape)
        assert torch.equal(y[1, 2], layer(x[1:, 2:].contiguous())[0, 0])
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert layer.experts.down.grad.dtype == torch.bfloat16
        assert layer(x[0, 0]).shape == (HIDDEN,)
        with torch.no_grad():
            assert torch.equal(layer(x), y)

    on_ranks(2, body)


def test_a_copy_of_the_layer_works_on_the_same_buffer(on_ranks: Any) -> None:
    """As weight averages and module surgery make them."""

    def body(buffer: Any) -> None:
        layer = layer_on(buffer)
        copy = deepcopy(layer)
        x = tokens_of(buffer.rank)
        assert torch.equal(copy(x), layer(x))
        assert torch.equal(copy.rebalance(), layer.rebalance())

    on_ranks(2, body)


def test_parameters_are_sorted_into_replicated_and_own(on_ranks: Any) -> None:
    layer = layer_on(Lone())
    names = {id(p): name for name, p in layer.named_parameters()}
    assert {names[id(p)] for p in layer.expert_parameters()} == {"experts.gate_up", "experts.down"}
    assert {names[id(p)] for p in layer.replicated_parameters()} == {
        "router.weight", "shared.gate_up", "shared.down",
    }  # fmt: skip


def test_rebalancing_moves_biases_towards_an_even_load(on_ranks: Any) -> None:
    def body(buffer: Any) -> tuple[list[int], list[float], list[float]]:
        layer = layer_on(buffer, shared_hidden=0)
        before = layer.router.bias.clone()
        layer(tokens_of(buffer.rank))
        layer.eval()
        layer(tokens_of(buffer.rank))  # not counted
        layer.train()
        load = layer.rebalance(rate=0.5)
        moved = layer.router.bias - before
        assert (layer.router.load == 0).all(), "the load is forgotten"
        assert torch.equal(layer.rebalance(0.5), torch.zeros(EXPERTS, dtype=torch.int64))
        return load.tolist(), moved.tolist(), (layer.router.bias - before).tolist()

    got = on_ranks(3 if EXPERTS % 3 == 0 else 2, body)
    assert all(g == got[0] for g in got), "all ranks keep the same biases"
    load, moved, unmoved = got[0]
    ranks = len(got)
    counted = torch.zeros(EXPERTS, dtype=torch.int64)
    router = layer_on(Lone(), shared_hidden=0).router.eval()
    for r in range(ranks):
        counted += torch.bincount(router(tokens_of(r)).topk_idx.flatten(), minlength=EXPERTS)
    assert load == counted.tolist()
    mean = counted.double().mean()
    assert max(counted) > mean > min(counted)
    for count, move in zip(counted, moved, strict=True):
        expected = 0.0 if count == mean else 0.5 if count < mean else -0.5
        assert move == pytest.approx(expected, abs=2.0**-22)  # float32 biases of order 1
    assert unmoved == moved, "no load, no move"


def test_biases_are_saved_and_loads_are_not() -> None:
    state = layer_on(Lone()).state_dict()
    assert "router.bias" in state
    assert "router.load" not in state


def test_the_layer_does_not_keep_its_buffer_alive(on_ranks: Any) -> None:
    def body(buffer: Any) -> None:
        import gc
        import weakref

        from deepep import Buffer
        from deepep.errors import DestroyedError

        own = Buffer(buffer.group, timeout=30.0)
        layer = layer_on(own)
        layer(tokens_of(buffer.rank))
        gone = weakref.ref(own)
        own.destroy()
        del own
        gc.collect()
        assert gone() is None
        with pytest.raises(DestroyedError):
            layer(tokens_of(buffer.rank))

    on_ranks(2, body)


@pytest.mark.parametrize(
    ("experts", "topk", "argument"), [(0, 1, "num_experts"), (8, 9, "num_topk"), (8, 0, "num_topk")]
)
def test_bad_sizes_are_named(experts: int, topk: int, argument: str) -> None:
    with pytest.raises(RangeError) as caught:
        dnn.ExpertParallelMoE(Lone(), hidden=8, expert_hidden=8, num_experts=experts, num_topk=topk)
    assert caught.value.argument == argument


def test_experts_must_divide_among_the_ranks_and_rows_must_fit() -> None:
    lone = Lone()
    lone.group_size = 3
    with pytest.raises(RangeError, match="multiple of 3"):
        dnn.ExpertParallelMoE(lone, hidden=8, expert_hidden=8, num_experts=8, num_topk=2)
    with pytest.raises(ShapeError):
        layer_on(Lone())(torch.zeros(2, HIDDEN + 1))
