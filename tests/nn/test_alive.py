"""Gates without the experts that are gone, against the same gates of a model that never had them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from deepep.errors import ArgumentTypeError, RangeError, ShapeError
from deepep.gate import group_limited_topk, sigmoid_topk, softmax_topk

T, E, K = 40, 12, 3
GONE = [(0,), (1, 2, 5, 11), (0, 1, 2, 3, 4, 5, 6, 7, 8)]


def drawn(seed: int, grid: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, E], on a grid so that ties are everywhere, or not; a bias [E], some of it -inf or NaN."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    bias = torch.randn(E, generator=generator, dtype=torch.float64) / 4
    if grid:
        logits = (2 * logits).round() / 2
        bias[3], bias[8], bias[9] = -torch.inf, torch.nan, -torch.inf
    return logits, bias


def alive_of(gone: Sequence[int]) -> torch.Tensor:
    return torch.tensor([e not in gone for e in range(E)])


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gate", [softmax_topk, sigmoid_topk])
def test_the_experts_that_are_gone_are_as_if_there_were_none(
    gate: Any, normalize: bool, gone: Sequence[int]
) -> None:
    left = torch.tensor([e for e in range(E) if e not in gone])
    for seed in range(5):
        logits, bias = drawn(seed)
        if len(left) == K:
            bias = bias.nan_to_num(0.0, neginf=0.0)
        mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        got = gate(mine, K, bias=bias, normalize=normalize, alive=alive_of(gone))
        wanted = gate(theirs[:, left], K, bias=bias[left], normalize=normalize)
        assert torch.equal(got.topk_idx, left[wanted.topk_idx])
        torch.testing.assert_close(got.topk_weights, wanted.topk_weights, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(got.scores[:, left], wanted.scores, rtol=1e-14, atol=0.0)
        assert not got.scores[:, list(gone)].any()
        ways = torch.arange(1.0, K + 1, dtype=torch.float64)
        for found in (got, wanted):
            (found.topk_weights * ways).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def by_hand(scores: list[float], bias: list[float], gone: Sequence[int], groups: int, kept: int) -> list[int]:
    """The K best of the best groups, by definition: the lowest index first among equals."""
    size, of_group = E // groups, {}
    biased = {e: scores[e] + bias[e] for e in range(E) if e not in gone}
    for g in range(groups):
        there = [biased[e] for e in range(g * size, (g + 1) * size) if e in biased]
        if there:
            of_group[g] = sum(sorted(there, reverse=True)[:2])
    chosen = sorted(of_group, key=lambda g: (-of_group[g], g))[:kept]
    among = [e for e in biased if e // size in chosen]
    return sorted(among, key=lambda e: (-biased[e], e))[:K]


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (4, 3), (6, 3), (12, 5)])
@pytest.mark.parametrize("gone", [(0, 1), (4, 5, 6, 7, 8), (0, 1, 2, 9, 10), (0, 1, 2, 3, 4, 5, 7)])
def test_groups_are_judged_by_who_is_there(gone: Sequence[int], groups: int, kept: int) -> None:
    """Groups of one that is left, of none, and fewer of them than are kept."""
    for seed in range(5):
        logits, bias = drawn(seed, grid=False)
        bias -= 2.0  # so that a zero for what is not there would win
        counts = [sum(e not in gone for e in range(g, g + E // groups)) for g in range(0, E, E // groups)]
        fewest = sorted(count for count in counts if count)[:kept]
        arguments = {"bias": bias, "num_groups": groups, "num_kept_groups": kept, "alive": alive_of(gone)}
        if sum(fewest) < K:
            with pytest.raises(RangeError, match=f"{sum(fewest)} experts in the"):
                group_limited_topk(logits, K, **arguments)
            continue
        got = group_limited_topk(logits, K, **arguments)
        scores = torch.sigmoid(logits)
        wanted = [by_hand(row, bias.tolist(), gone, groups, kept) for row in scores.tolist()]
        assert got.topk_idx.tolist() == wanted
        weights = scores.gather(1, torch.tensor(wanted))
        torch.testing.assert_close(got.topk_weights, weights / weights.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "gate", [softmax_topk, sigmoid_topk, partial(group_limited_topk, num_groups=4, num_kept_groups=2)]
)
def test_all_alive_is_as_without_the_argument(gate: Any) -> None:
    logits, _ = drawn(0)
    for got, wanted in zip(gate(logits, K, alive=alive_of(())), gate(logits, K), strict=True):
        assert torch.equal(got, wanted)


def test_what_is_no_mask_is_refused() -> None:
    logits, _ = drawn(0)
    for alive, error in (
        (torch.ones(E), ArgumentTypeError),
        ([True] * E, ArgumentTypeError),
        (torch.ones(E - 1, dtype=torch.bool), ShapeError),
        (torch.arange(E) < K - 1, RangeError),
    ):
        with pytest.raises(error, match="alive"):
            sigmoid_topk(logits, K, alive=alive)  # type: ignore[arg-type]


def router_of(gate: Any = softmax_topk, experts: int = 6) -> Any:
    from deepep.nn import Router

    router = Router(16, experts, 2, gate=gate, seed=1)
    router.bias.copy_(torch.linspace(-0.1, 0.1, experts))
    return router


def test_a_router_chooses_and_balances_among_those_who_are_left() -> None:
    router, x = router_of(), torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    router(x)  # counts entries of experts that are gone before the balance
    router.choose_among({0, 2, 3, 4})
    chosen = router(x).topk_idx
    assert set(chosen.flatten().tolist()) <= {0, 2, 3, 4}
    assert int(router.load[[1, 5]].sum()) > 0
    before, load = router.bias.clone(), router.load.clone()
    load[[1, 5]] = 0
    assert torch.equal(router.rebalance(0.5), load)
    signs = [
        0 if e in (1, 5) else (load.sum() / 4 > load[e]) * 1 - (load.sum() / 4 < load[e]) * 1
        for e in range(6)
    ]
    assert torch.equal(router.bias, before + 0.5 * torch.tensor(signs))
    router.choose_among(range(6))
    assert router.alive is None


def test_a_router_refuses_what_its_gate_cannot_choose_from() -> None:
    with pytest.raises(RangeError, match="alive: got 1 experts; allowed: at least 2"):
        router_of().choose_among({3})
    grouped = router_of(partial(group_limited_topk, num_groups=3, num_kept_groups=1))
    grouped.choose_among({0, 1, 2, 3})
    with pytest.raises(RangeError, match="alive: got 1 experts in the 1 groups that have the fewest"):
        grouped.choose_among({0, 1, 2, 3, 4})
    assert grouped.alive.tolist() == [True] * 4 + [False] * 2  # as before
    with pytest.raises(ArgumentTypeError, match="gate"):
        router_of(lambda logits, k, bias=None: softmax_topk(logits, k, bias=bias)).choose_among({0, 1})
