"""ExpertParallelMoE under placements: the same layer, equal replicas in training, moves between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepep.nn as dnn
from deepep.errors import ArgumentTypeError, RangeError, ShapeError
from deepep.nn.placing import _parts
from deepep.placement import ExpertPlacement, contiguous, place, with_spare

HIDDEN, EXPERT_HIDDEN, EXPERTS, TOPK = 16, 8, 6, 2
LOADS = [9, 1, 1, 5, 1, 1]
OTHER = [1, 1, 9, 1, 1, 5]


def layer_on(buffer: Any, placement: ExpertPlacement | None, **options: Any) -> dnn.ExpertParallelMoE:
    sizes = {"hidden": HIDDEN, "expert_hidden": EXPERT_HIDDEN, "num_experts": EXPERTS, "num_topk": TOPK}
    return dnn.ExpertParallelMoE(
        buffer, placement=placement, **{**sizes, "seed": 3, "dtype": torch.float64, **options}
    )


def tokens_of(rank: int, step: int = 0) -> torch.Tensor:
    """[T, H] float64; rank 1 has fewer."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(9 - 4 * rank, HIDDEN, generator=generator, dtype=torch.float64)


def train(
    buffer: Any, placement: ExpertPlacement | None, moves: dict[int, ExpertPlacement]
) -> dict[str, Any]:
    """Three steps, moved before some of them; the outputs, and the experts by their numbers in the end."""
    layer = layer_on(buffer, placement)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    outputs, moved = [], []
    for step in range(3):
        if step in moves:
            moved.append(layer.move_to(moves[step]))
        y = layer(tokens_of(buffer.rank, step))
        outputs.append(y.detach())
        optimizer.zero_grad()
        (y * torch.cos(y.detach())).sum().backward()
        layer.sum_replica_gradients()
        for parameter in layer.replicated_parameters():
            torch.distributed.all_reduce(parameter.grad, group=buffer.group)
        optimizer.step()
    numbers = [*range(3 * buffer.rank, 3 * buffer.rank + 3)] if layer.placement is None else None
    numbers = numbers or layer.placement.of_rank(buffer.rank)
    experts = list(zip(numbers, layer.experts.gate_up.detach(), layer.experts.down.detach(), strict=True))
    assert all(number >= 0 or not (up.any() or down.any()) for number, up, down in experts)
    experts = [each for each in experts if each[0] >= 0]  # others: empty places
    load = layer.router.load.tolist()
    return {"outputs": outputs, "experts": experts, "moved": moved, "load": load, "repr": repr(layer)}


def check_same(placed: list[Any], plain: list[Any]) -> None:
    """Replicas have the same bits everywhere, and all is as without a placement.

    Sums over an expert's tokens are split differently: float64, some 2^8 operations on values of order 1 to
    2^5, three steps: 2^-53 * 2^8 * 2^5 * 3 < 2^-38.
    """
    weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for of_rank in placed:
        for number, *parts in of_rank["experts"]:
            known = weights.setdefault(number, tuple(parts))
            assert all(torch.equal(a, b) for a, b in zip(known, parts, strict=True)), number
    wanted = {number: parts for of_rank in plain for number, *parts in of_rank["experts"]}
    assert weights.keys() == wanted.keys()
    pairs = [(a, b) for number in wanted for a, b in zip(weights[number], wanted[number], strict=True)]
    for mine, theirs in zip(placed, plain, strict=True):
        pairs += zip(mine["outputs"], theirs["outputs"], strict=True)
        assert mine["load"] == theirs["load"]  # the router knows of logical experts alone
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=2.0**-38, atol=2.0**-38)


def test_training_with_empty_places_is_training_without(on_ranks: Any) -> None:
    """Experts may be moved into them, and others become empty."""
    first = with_spare(contiguous(EXPERTS, 2), 2)
    second = ExpertPlacement(EXPERTS, 2, (-1, 1, 2, 3, -1, 5, 4, -1, -1, 0))
    placed = on_ranks(2, train, first, {1: second})
    plain = on_ranks(2, train, None, {})
    assert [of_rank["moved"] for of_rank in placed] == [[1], [1]]
    check_same(placed, plain)


def test_training_under_placements_is_training_without(on_ranks: Any) -> None:
    first, second = place(LOADS, 2, 4), place(OTHER, 2, 4)
    assert any(len({p // first.num_local for p in r}) == 2 for r in first.replicas_of)
    plain = on_ranks(2, train, None, {})
    check_same(on_ranks(2, train, first, {}), plain)
    placed = on_ranks(2, train, first, {1: second, 2: first})
    check_same(placed, plain)
    counted = sum(r["moved"][0] for r in placed)
    assert counted == second.num_moved(first) > 0
    assert str(list(first.of_rank(1))) in placed[1]["repr"]
    packed = place(LOADS, 2)
    check_same(on_ranks(2, train, None, {1: packed}), plain)  # from contiguous blocks, without replicas


def diverging(buffer: Any, placement: ExpertPlacement) -> list[torch.Tensor]:
    layer = layer_on(buffer, placement)
    layer(tokens_of(buffer.rank)).sum().backward()
    return [layer.experts.down.grad[local] for local in range(placement.num_local)]


def test_without_the_sum_replicas_would_part(on_ranks: Any) -> None:
    """The control of the test above: it can fail."""
    placement = place(LOADS, 2, 4)
    found = [g for of_rank in on_ranks(2, diverging, placement) for g in of_rank]
    shared = [r for r in placement.replicas_of if len(r) > 1]
    assert any(not torch.equal(found[r[0]], found[r[1]]) for r in shared)


def stepping(buffer: Any) -> list[Any]:
    """Steps without a sum, of experts that have no replicas; and the gradients of frozen ones that have."""
    once, twice = layer_on(buffer, place(LOADS, 2)), layer_on(buffer, place(LOADS, 2, 4))
    once(tokens_of(buffer.rank)).sum().backward()
    torch.optim.SGD(once.parameters(), lr=0.05).step()
    twice.experts.down.requires_grad_(False)
    twice(tokens_of(buffer.rank)).sum().backward()
    twice.sum_replica_gradients()
    return [weight.grad is None for weight in twice.experts.parameters()]


def test_what_has_no_gradient_or_no_replicas_is_left_alone(on_ranks: Any) -> None:
    """A gradient of zeros would have an optimizer's weight decay change what is frozen."""
    assert on_ranks(2, stepping) == [[False, True]] * 2


def moved(buffer: Any) -> bool:
    layer = layer_on(buffer, place(LOADS, 2, 4))
    new = place(OTHER, 2, 4)
    made = dnn.move_experts(list(layer.experts.parameters()), layer.placement, new, buffer.rank, buffer.group)
    return any(tensor.requires_grad for tensor in made)


def test_weights_that_moved_are_constants(on_ranks: Any) -> None:
    """Those that another rank sent have no gradient here, so none has."""
    assert on_ranks(2, moved) == [False, False]


def disagreeing(buffer: Any, mine: list[Any]) -> list[str]:
    layer = layer_on(buffer, place(LOADS, 2, 4))
    found = []
    for placements in mine:
        try:
            layer.move_to(placements[buffer.rank])
        except Exception as error:
            found.append(type(error).__name__)
    return found


def test_ranks_that_move_to_different_placements_all_raise(on_ranks: Any) -> None:
    good, other = place(OTHER, 2, 4), place(LOADS, 2, 4)
    asked = [(good, other), (good, None), (place(LOADS, 2, 2), good)]
    first, second = on_ranks(2, disagreeing, asked)
    assert first == ["MismatchError", "MismatchError", "RangeError"]
    assert second == ["MismatchError", "ArgumentTypeError", "MismatchError"]


class Lone:
    """Stands for the buffer of a world of one rank, for its weights alone."""

    rank, group_size, group = 0, 1, None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentTypeError):
        layer_on(Lone(), [0, 1, 2, 3, 4, 5])
    for placement in (place(LOADS, 2), place([1] * 5, 1)):
        with pytest.raises(RangeError):
            layer_on(Lone(), placement)
    with pytest.raises(ShapeError):
        dnn.move_experts([torch.ones(5, 2)], place(LOADS, 2), place(LOADS, 2), 0, None)


def test_experts_that_do_not_divide_among_ranks_can_be_placed() -> None:
    """Five experts are no multiple of two ranks; six places are."""
    layer = layer_on(Lone(), place([1] * 5, 1), num_experts=5)
    assert layer.num_local_experts == 5
    whole = layer_on(Lone(), None, num_experts=5)
    assert torch.equal(layer.experts.down, whole.experts.down)
    layer.reset_parameters()
    assert torch.equal(layer.experts.down, whole.experts.down)
    assert layer.state_dict().keys() == whole.state_dict().keys()


def test_parts_of_a_sum_are_no_larger_than_allowed() -> None:
    shared = [(0, 1), (2, 3, 4), (5, 6), (7, 8)]
    assert _parts(shared, 4) == [[(0, 1)], [(2, 3, 4)], [(5, 6), (7, 8)]]
    assert _parts(shared, 0) == [[replicas] for replicas in shared]
    assert _parts([], 4) == []
