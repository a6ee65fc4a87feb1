"""Gates against definitions written out token by token in plain Python, ties, and the node limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from deepep.errors import ArgumentTypeError, RangeError, ShapeError
from deepep.gate import (
    Routing,
    group_limited_topk,
    nodes_per_token,
    sigmoid_topk,
    softmax_topk,
    stable_topk,
)


def best(values: Sequence[float], k: int, among: Sequence[int] | None = None) -> list[int]:
    """Indices of the k largest, the lowest index first among equals."""
    pool = range(len(values)) if among is None else among
    return sorted(pool, key=lambda i: (-values[i], i))[:k]


def group_limited_by_hand(
    scores: Sequence[float], bias: Sequence[float], k: int, groups: int, kept: int
) -> list[int]:
    size = len(scores) // groups
    # float32 sums, as the tensors hold them: a tie in float32 need not be one in float64.
    biased = [float(torch.tensor(s) + torch.tensor(b)) for s, b in zip(scores, bias, strict=True)]
    group_score = []
    for g in range(groups):
        two = sorted(biased[g * size : (g + 1) * size], reverse=True)[:2]
        group_score.append(float(torch.tensor(two).sum()))
    open_experts = [e for g in best(group_score, kept) for e in range(g * size, (g + 1) * size)]
    return best(biased, k, open_experts)


def coarse_logits(tokens: int, experts: int, seed: int) -> torch.Tensor:
    """Logits on a grid of nine values, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (tokens, experts), generator=generator).float() / 2


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 1), (8, 8), (64, 6)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gate", [softmax_topk, sigmoid_topk])
def test_selection_is_by_biased_score_and_ties_go_to_the_lowest_index(gate, experts, k, with_bias) -> None:
    logits = coarse_logits(50, experts, seed=experts)
    bias = coarse_logits(1, experts, seed=9)[0] / 8 if with_bias else None
    routing: Routing = gate(logits, k, bias=bias)
    scores = torch.softmax(logits, -1) if gate is softmax_topk else torch.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    assert routing.topk_idx.dtype == torch.int64
    assert routing.topk_idx.tolist() == [best(row, k) for row in choice.tolist()]
    assert torch.equal(routing.scores, scores)
    assert routing.topk_idx.is_contiguous(), "dispatch takes contiguous tensors"
    assert routing.topk_weights.is_contiguous()


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "k"),
    [(256, 8, 4, 8), (64, 8, 3, 6), (16, 4, 1, 4), (8, 8, 3, 3), (12, 3, 3, 12), (8, 1, 1, 2)],
)
def test_group_limited_selection_equals_the_definition(experts: int, groups: int, kept: int, k: int) -> None:
    logits = coarse_logits(40, experts, seed=k)
    # Biases far below -1 push every biased score below zero: a gate that masks closed groups with zeros
    # fails here.
    for bias in (torch.zeros(experts), coarse_logits(1, experts, seed=3)[0] / 8 - 3.0):
        routing = group_limited_topk(logits, k, num_groups=groups, num_kept_groups=kept, bias=bias)
        scores = torch.sigmoid(logits)
        expected = [group_limited_by_hand(row, bias.tolist(), k, groups, kept) for row in scores.tolist()]
        assert routing.topk_idx.tolist() == expected


def test_all_equal_scores_choose_the_first_experts_everywhere() -> None:
    logits = torch.zeros(3, 32)
    assert sigmoid_topk(logits, 4).topk_idx.tolist() == [[0, 1, 2, 3]] * 3
    limited = group_limited_topk(logits, 4, num_groups=8, num_kept_groups=2)
    assert limited.topk_idx.tolist() == [[0, 1, 2, 3]] * 3


def test_a_tokens_choice_does_not_depend_on_the_batch_it_is_in() -> None:
    logits = coarse_logits(200, 64, seed=5)
    whole = group_limited_topk(logits, 8, num_groups=8, num_kept_groups=4)
    parts = [
        group_limited_topk(part, 8, num_groups=8, num_kept_groups=4) for part in logits.split([1, 72, 127])
    ]
    assert torch.equal(whole.topk_idx, torch.cat([p.topk_idx for p in parts]))
    assert torch.equal(whole.topk_weights, torch.cat([p.topk_weights for p in parts]))


def test_weights_come_from_unbiased_scores_normalised_then_scaled() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    bias = torch.tensor([10.0, 0.0, 10.0, 0.0])  # selects experts 0 and 2, and must not show in their weights
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.0, 1.0, -1.0, 2.0)]
    routing = sigmoid_topk(logits, 2, bias=bias, scale=2.5)
    assert routing.topk_idx.tolist() == [[0, 2]]
    total = sigmoid[0] + sigmoid[2]
    # float32 carries 2^-24 per operation, and there are fewer than ten of them here.
    assert routing.topk_weights.tolist()[0] == pytest.approx(
        [2.5 * sigmoid[0] / total, 2.5 * sigmoid[2] / total], rel=10 * 2.0**-24
    )
    plain = sigmoid_topk(logits, 2, bias=bias, normalize=False)
    assert torch.equal(plain.topk_weights, plain.scores.gather(1, plain.topk_idx))
    exponentials = [math.exp(x) for x in (0.0, 1.0, -1.0, 2.0)]
    soft = softmax_topk(logits, 2)
    expected = [exponentials[3] / sum(exponentials), exponentials[1] / sum(exponentials)]
    assert soft.topk_weights.tolist()[0] == pytest.approx(expected, rel=10 * 2.0**-24)
    assert softmax_topk(logits, 3, normalize=True).topk_weights.sum().item() == pytest.approx(1.0, rel=1e-6)


def test_scores_of_zero_give_zero_weights_not_nan() -> None:
    routing = sigmoid_topk(torch.full((2, 8), -1e4), 4)
    assert torch.equal(routing.topk_weights, torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_is_at_least_float32(dtype: torch.dtype) -> None:
    routing = group_limited_topk(torch.randn(5, 16).to(dtype), 4, num_groups=4, num_kept_groups=2)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert routing.topk_weights.dtype == routing.scores.dtype == expected


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 8])
def test_a_token_visits_at_most_the_kept_groups_of_nodes(num_nodes: int) -> None:
    """The contract that bounds traffic between nodes: DeepSeek-V3's numbers,
    256 experts in 8 groups, 4 kept, top 8.
    """
    generator = torch.Generator().manual_seed(1)
    for bias in (None, torch.randn(256, generator=generator) * 3):
        for scale in (0.0, 1e-3, 1.0, 30.0):  # all tied; nearly tied; usual; saturated
            logits = torch.randn(500, 256, generator=generator) * scale
            idx = group_limited_topk(logits, 8, num_groups=8, num_kept_groups=4, bias=bias).topk_idx
            assert (idx.sort(1).values.diff(dim=1) > 0).all(), "an expert was chosen twice"
            assert nodes_per_token(idx, 256, num_nodes).max() <= min(4, num_nodes)
    free = sigmoid_topk(torch.randn(500, 256, generator=generator), 8).topk_idx
    assert nodes_per_token(free, 256, 8).max() > 4, "the limit would hold by itself: this test shows nothing"


def test_nodes_per_token_counts_distinct_nodes_and_ignores_no_expert() -> None:
    idx = torch.tensor([[0, 1, 2, 3], [0, 4, 8, 12], [-1, -1, -1, -1], [15, -1, 0, 15]])
    assert nodes_per_token(idx, 16, 4).tolist() == [1, 4, 0, 2]
    assert nodes_per_token(idx.int(), 16, 4).tolist() == [1, 4, 0, 2]
    assert nodes_per_token(idx[:0], 16, 4).tolist() == []


def test_narrow_indices_are_not_compared_in_their_own_dtype() -> None:
    """256 does not fit into uint8, nor does -1."""
    idx = torch.tensor([[0, 255], [128, 129]], dtype=torch.uint8)
    assert nodes_per_token(idx, 256, 2).tolist() == [2, 1]
    assert nodes_per_token(torch.tensor([[-1, 100]], dtype=torch.int8), 256, 2).tolist() == [1]


@pytest.mark.parametrize("gate", [sigmoid_topk, softmax_topk])
def test_torchs_ambient_modes_change_nothing(gate) -> None:
    logits, bias = coarse_logits(20, 16, seed=1), coarse_logits(1, 16, seed=2)[0]
    expected = gate(logits, 4, bias=bias)
    before = torch.get_default_dtype()

    def again() -> None:
        for got, wanted in zip(gate(logits, 4, bias=bias), expected, strict=True):
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)
        assert nodes_per_token(expected.topk_idx, 16, 2).device.type == "cpu"

    for mode in (
        torch.device("meta"),
        torch.inference_mode(),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with mode:
            again()
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.use_deterministic_algorithms(True)
        again()
    finally:
        torch.set_default_dtype(before)
        torch.use_deterministic_algorithms(False)


def test_no_tokens() -> None:
    routing = group_limited_topk(torch.empty(0, 16), 4, num_groups=4, num_kept_groups=2)
    assert routing.topk_idx.shape == routing.topk_weights.shape == (0, 4)


def test_nan_logits_still_choose_k_different_experts() -> None:
    logits = torch.randn(4, 16)
    logits[1], logits[2, 5] = float("nan"), float("nan")
    for idx in (
        sigmoid_topk(logits, 4).topk_idx,
        group_limited_topk(logits, 4, num_groups=4, num_kept_groups=2).topk_idx,
    ):
        assert (idx.sort(1).values.diff(dim=1) > 0).all()
        assert ((idx >= 0) & (idx < 16)).all()


def test_gradients_flow_through_weights_alone() -> None:
    logits = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(16, dtype=torch.float64, requires_grad=True)

    def weights(z: torch.Tensor) -> torch.Tensor:
        return group_limited_topk(z, 4, num_groups=4, num_kept_groups=2, bias=bias, scale=2.5).topk_weights

    assert torch.autograd.gradcheck(weights, logits)
    weights(logits).sum().backward()
    assert bias.grad is None


def test_stable_topk_on_more_dimensions() -> None:
    values = torch.tensor([[[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]]])
    assert stable_topk(values, 2).tolist() == [[[1, 2], [0, 1]]]


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: sigmoid_topk(torch.zeros(8), 2), ShapeError, "logits"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 0), RangeError, "num_topk"),
        (lambda: softmax_topk(torch.zeros(1, 8), 9), RangeError, "num_topk"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 2, bias=torch.zeros(7)), ShapeError, "bias"),
        (lambda: grouped(3, 1, 1), RangeError, "num_groups"),
        (lambda: grouped(0, 1, 1), RangeError, "num_groups"),
        (lambda: grouped(4, 0, 1), RangeError, "num_kept_groups"),
        (lambda: grouped(4, 5, 1), RangeError, "num_kept_groups"),
        (lambda: grouped(4, 1, 3), RangeError, "num_topk"),
        (lambda: nodes_per_token(torch.zeros(1, 2).long(), 8, 3), RangeError, "num_nodes"),
        (lambda: nodes_per_token(torch.zeros(1, 2).long(), 8, 0), RangeError, "num_nodes"),
        (lambda: nodes_per_token(torch.zeros(1, 2).long(), 8, 2.0), ArgumentTypeError, "num_nodes"),
        (lambda: nodes_per_token(torch.zeros(1, 2).long(), 1 << 70, 2), RangeError, "num_experts"),
        (lambda: nodes_per_token(torch.full((1, 2), 8), 8, 2), RangeError, "topk_idx"),
        (lambda: nodes_per_token(torch.full((1, 2), -2), 8, 2), RangeError, "topk_idx"),
        (lambda: nodes_per_token(torch.zeros(1, 2), 8, 2), ArgumentTypeError, "topk_idx"),
        (lambda: nodes_per_token(torch.zeros(2).long(), 8, 2), ShapeError, "topk_idx"),
        (lambda: nodes_per_token([[0, 1]], 8, 2), ArgumentTypeError, "topk_idx"),
        (lambda: stable_topk(torch.zeros(3), 4), RangeError, "k"),
        (lambda: stable_topk(torch.zeros(3), -1), RangeError, "k"),
        (lambda: stable_topk(torch.tensor(1.0), 1), ShapeError, "values"),
        (lambda: stable_topk([1.0], 1), ArgumentTypeError, "values"),
        (lambda: sigmoid_topk([[0.0] * 8], 2), ArgumentTypeError, "logits"),
        (lambda: sigmoid_topk(torch.zeros(1, 8).long(), 2), ArgumentTypeError, "logits"),
        (lambda: softmax_topk(torch.zeros(1, 8, dtype=torch.complex64), 2), ArgumentTypeError, "logits"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 2.0), ArgumentTypeError, "num_topk"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), True), ArgumentTypeError, "num_topk"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), np.array([2, 2])), ArgumentTypeError, "num_topk"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), torch.tensor([2, 2])), ArgumentTypeError, "num_topk"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 10**5000), RangeError, "num_topk"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 2, bias=[0.0] * 8), ArgumentTypeError, "bias"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 2, bias=torch.zeros(8).long()), ArgumentTypeError, "bias"),
        (
            lambda: sigmoid_topk(torch.zeros(1, 8), 2, normalize=np.array([1, 0])),
            ArgumentTypeError,
            "normalize",
        ),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 2, normalize="no"), ArgumentTypeError, "normalize"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 2, scale=torch.ones(2)), ArgumentTypeError, "scale"),
        (lambda: sigmoid_topk(torch.zeros(1, 8), 2, scale=float("nan")), RangeError, "scale"),
        (lambda: softmax_topk(torch.zeros(1, 8), 2, scale=float("inf")), RangeError, "scale"),
        (lambda: grouped(np.array([4, 4]), 1, 1), ArgumentTypeError, "num_groups"),
        (lambda: grouped(4, "1", 1), ArgumentTypeError, "num_kept_groups"),
    ],
)
def test_bad_arguments_are_named(call, error, argument) -> None:
    with pytest.raises(error) as caught:
        call()
    assert caught.value.argument == argument


def grouped(groups: int, kept: int, k: int) -> Routing:
    return group_limited_topk(torch.zeros(1, 8), k, num_groups=groups, num_kept_groups=kept)
