"""Operators around the experts that the device's kernels have, in plain torch: promises, gradients, bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepep.errors import RangeError
from deepep.nn import GroupedSwiGLU, apply_experts
from deepep.nn.activation import _gated, swiglu, swiglu_backward
from deepep.nn.rows import (
    expert_rows,
    sort_pairs,
    sum_weighted_rows,
    sum_weighted_rows_backward,
    weighted_sum,
)
from deepep.nn.selection import select_topk

LOCAL = 3


def drawn() -> tuple[torch.Tensor, ...]:
    """topk_idx, and pairs, counts, slots as sorted."""
    idx = torch.randint(-1, LOCAL, (6, 3), generator=torch.Generator().manual_seed(1))
    return idx, *expert_rows(idx, LOCAL)


def test_known_counts_sort_the_same_without_a_wait() -> None:
    idx, pairs, counts, slots = drawn()
    found = sort_pairs(idx, counts)
    assert torch.equal(found[0], pairs)
    assert torch.equal(found[1], slots)
    assert found[2].tolist() == counts.cumsum(0).tolist()
    assert found[2].dtype == torch.int32


@pytest.mark.parametrize("wrong", [[1, 2, 3], [-1, 0, 1], [2**40, 0, 0]])
def test_other_counts_than_the_entries_are_refused(wrong: list[int]) -> None:
    experts, (idx, *_) = GroupedSwiGLU(LOCAL, 8, 8), drawn()
    with pytest.raises(RangeError, match="expert_counts"):
        apply_experts(experts, torch.randn(6, 8), idx, torch.rand(6, 3), torch.tensor(wrong))


def test_the_weighted_sum_has_the_bits_of_its_parts() -> None:
    _, pairs, _, slots = drawn()
    y, weights = torch.randn(len(pairs), 8).bfloat16(), torch.randn(6, 3)
    assert torch.equal(sum_weighted_rows(y, weights, pairs, slots), weighted_sum(y, weights, pairs, slots))


def test_gradients_are_those_of_the_parts() -> None:
    """In float32; of the weights as dot products, which round otherwise: 8 terms of order 1, 2^-24 each."""
    _, pairs, _, slots = drawn()
    y, weights = torch.randn(len(pairs), 8, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    grad = torch.randn(6, 8)
    parts = torch.autograd.grad(weighted_sum(y, weights, pairs, slots), (y, weights), grad)
    for create_graph in (False, True):
        total = sum_weighted_rows(y, weights, pairs, slots)
        fused = torch.autograd.grad(total, (y, weights), grad, create_graph=create_graph)
        for ours, wanted in zip(fused, parts, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=2.0**-20, atol=2.0**-20)
    h = torch.randn(5, 16, requires_grad=True)
    for create_graph in (False, True):
        (ours,) = torch.autograd.grad(swiglu(h), h, torch.ones(5, 8), create_graph=create_graph)
        (wanted,) = torch.autograd.grad(_gated(h), h, torch.ones(5, 8))
        torch.testing.assert_close(ours, wanted, rtol=2.0**-18, atol=2.0**-20)


def test_operators_keep_their_promises_to_torch() -> None:
    idx, pairs, counts, slots = drawn()
    y, weights = torch.randn(len(pairs), 8, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    h = torch.randn(5, 16, requires_grad=True)
    torch.library.opcheck(sort_pairs.overload, (idx, counts))
    torch.library.opcheck(sum_weighted_rows.overload, (y, weights, pairs, slots))
    grads = torch.randn(6, 8), y.detach(), weights.detach(), pairs, slots
    torch.library.opcheck(sum_weighted_rows_backward.overload, grads)
    torch.library.opcheck(swiglu.overload, (h,))
    torch.library.opcheck(select_topk.overload, (torch.randn(5, 7), 3))
    torch.library.opcheck(swiglu_backward.overload, (h.detach(), torch.randn(5, 8)))


def test_what_is_traced_or_a_subclass_goes_through_the_dispatcher() -> None:
    """Modes and subclasses of tensors see the operator, also where no gradient is wanted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    names: list[str] = []
    h = torch.randn(5, 16)
    with torch.no_grad():
        wanted = swiglu(h)
        with Seen():
            assert torch.equal(swiglu(h), wanted)
        assert any("swiglu" in name for name in names)
        names.clear()
        assert torch.equal(swiglu(h.as_subclass(Tagged)), wanted)
        assert any("swiglu" in name for name in names)
