"""Grouped experts in one process: grouping, its gradients, and the sum's order."""

from __future__ import annotations

import pytest
import torch

from deepep.nn.experts import GroupedSwiGLU, SwiGLU
from deepep.nn.grouped import grouped_mm, grouped_mm_weight_grad
from deepep.nn.moe import apply_experts
from deepep.nn.rows import expand_rows, expert_rows, reduce_rows

LOCAL = 3


def indices(rows: int, topk: int, seed: int = 0) -> torch.Tensor:
    """Local experts and -1, duplicates included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, LOCAL, (rows, topk), generator=generator)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "topk"), [(0, 4), (1, 1), (7, 4), (50, 8)])
def test_pairs_are_sorted_by_expert_then_row_then_k(rows: int, topk: int, dtype: torch.dtype) -> None:
    idx = indices(rows, topk).to(dtype)
    pairs, counts, slots = expert_rows(idx, LOCAL)
    expected = sorted(
        (expert, n, k) for n, row in enumerate(idx.tolist()) for k, expert in enumerate(row) if expert >= 0
    )
    assert pairs.tolist() == [n * topk + k for _, n, k in expected]
    assert counts.tolist() == [sum(e == expert for e, _, _ in expected) for expert in range(LOCAL)]
    assert counts.device.type == "cpu"
    for position, (_, n, k) in enumerate(expected):
        assert slots[n, k] == position
    assert int((slots >= 0).sum()) == len(expected)


def test_all_entries_absent() -> None:
    pairs, counts, slots = expert_rows(torch.full((4, 2), -1), LOCAL)
    assert pairs.numel() == 0
    assert counts.tolist() == [0] * LOCAL
    assert (slots == -1).all()
    assert torch.equal(reduce_rows(torch.empty(0, 8), pairs, slots), torch.zeros(4, 8))


def test_the_sum_of_a_row_runs_over_k_ascending_in_float32() -> None:
    """2^24 + 1 + 1 is 2^24 in float32 from the left, 2^24 + 2 from the right; bf16 sums would lose more."""
    idx = torch.tensor([[2, 1, 0], [0, 1, 2]])
    pairs, _, slots = expert_rows(idx, LOCAL)
    y = torch.ones(6, 1)
    y[slots[0, 0]] = 2.0**24
    y[slots[1, 2]] = 2.0**24
    assert reduce_rows(y, pairs, slots).flatten().tolist() == [2.0**24, 2.0**24 + 2]
    fine = torch.full((6, 1), 1.0, dtype=torch.bfloat16)
    fine[slots[0, 0]] = fine[slots[1, 2]] = 256.0  # bf16 holds 8 bits: 256 + 1 is lost there, 256 + 2 is not
    assert reduce_rows(fine, pairs, slots).flatten().tolist() == [258.0, 258.0]


def test_gradients_of_every_operator() -> None:
    idx = indices(6, 3)
    pairs, counts, slots = expert_rows(idx, LOCAL)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(pairs), 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(LOCAL, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: expand_rows(x, pairs, slots), x)
    assert torch.autograd.gradcheck(lambda y: reduce_rows(y, pairs, slots), y)
    assert torch.autograd.gradcheck(lambda y, w: grouped_mm(y, w, counts), (y, w))


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm_is_a_product_per_expert(transposed: bool) -> None:
    counts = torch.tensor([3, 0, 4])
    x = torch.randn(7, 4, dtype=torch.float64)
    weight = (
        torch.randn(LOCAL, 5, 4, dtype=torch.float64).transpose(1, 2)
        if transposed
        else torch.randn(LOCAL, 4, 5, dtype=torch.float64)
    )
    assert torch.equal(grouped_mm(x, weight, counts), torch.cat([x[:3] @ weight[0], x[3:] @ weight[2]]))
    grad = torch.randn(7, 5, dtype=torch.float64)
    by_weight = grouped_mm_weight_grad(x, grad, counts)
    expected = torch.stack([x[:3].t() @ grad[:3], torch.zeros(4, 5).double(), x[3:].t() @ grad[3:]])
    assert torch.equal(by_weight, expected)


def test_grouped_experts_equal_dense_ones() -> None:
    """Each entry's expert applied to the row on its own, weighted and added up, in float64.

    Bound: both sides do the same products of 8 and 6 terms; 2^-52 per operation and some hundred operations.
    """
    torch.manual_seed(0)
    experts = GroupedSwiGLU(LOCAL, 8, 6, dtype=torch.float64)
    experts.reset_parameters(seed=4, first_expert=3)
    idx, weights = indices(20, 4, seed=2), torch.rand(20, 4, dtype=torch.float64)
    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    weights.requires_grad_()
    got = apply_experts(experts, x, idx, weights)
    rows = []
    for n in range(20):
        row = torch.zeros(8, dtype=torch.float64)
        for k in range(4):
            if idx[n, k] >= 0:
                one = SwiGLU(8, 6, dtype=torch.float64)
                one.gate_up.data = experts.gate_up[idx[n, k]].detach()
                one.down.data = experts.down[idx[n, k]].detach()
                row = row + weights[n, k] * one(x[n])
        rows.append(row)
    expected = torch.stack(rows)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(got)
    got_grads = torch.autograd.grad(got, (x, weights), upstream)
    expected_grads = torch.autograd.grad(expected, (x, weights), upstream)
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_weights_do_not_depend_on_how_many_there_are_here(dtype: torch.dtype) -> None:
    whole = GroupedSwiGLU(6, 4, 4, dtype=dtype)
    whole.reset_parameters(seed=7, first_expert=0)
    part = GroupedSwiGLU(2, 4, 4, dtype=dtype)
    part.reset_parameters(seed=7, first_expert=4)
    assert torch.equal(whole.gate_up[4:], part.gate_up)
    assert torch.equal(whole.down[4:], part.down)
    assert not torch.equal(whole.down[0], whole.down[1])
    assert not torch.equal(whole.gate_up[0, :, :4], whole.gate_up[0, :, 4:])


def test_operators_keep_their_promises_to_torch() -> None:
    """Schemas, fake implementations and autograd registration, with static and dynamic shapes."""
    idx = indices(6, 3)
    pairs, counts, slots = expert_rows(idx, LOCAL)
    x = torch.randn(6, 4, requires_grad=True)
    y = torch.randn(len(pairs), 4, requires_grad=True)
    w = torch.randn(LOCAL, 4, 5, requires_grad=True)
    torch.library.opcheck(expert_rows.overload, (idx, LOCAL))
    torch.library.opcheck(expand_rows.overload, (x, pairs, slots))
    torch.library.opcheck(reduce_rows.overload, (y, pairs, slots))
    torch.library.opcheck(grouped_mm.overload, (y, w, counts))
    torch.library.opcheck(grouped_mm_weight_grad.overload, (y.detach(), y.detach() @ w[0].detach(), counts))
