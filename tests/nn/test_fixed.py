"""A layer in fixed shapes gives what the layer that waits gives, gradients too, and asks for no counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.layers import HIDDEN, layer_on, tokens
from torch.utils.checkpoint import checkpoint

from deepep.errors import ArgumentError, ArgumentTypeError, CapacityError, RangeError
from deepep.placement import ExpertPlacement

MOST = 9
OPTIONS: dict[str, dict[str, Any]] = {
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "fp8": {"dtype": torch.bfloat16, "shared_hidden": 0, "fp8_dispatch": True, "hidden": 128},
    "recomputed": {"dtype": torch.float64, "recompute": True},
    "replicas": {
        "dtype": torch.float64,
        "num_experts": 8,
        "placement": ExpertPlacement(8, 3, (0, 1, 2, 3, 4, 5, 6, 7, 0)),
    },
}


def inputs(buffer: Any, options: dict[str, Any]) -> torch.Tensor:
    """[T, H], of no tokens on rank 1."""
    x = tokens(buffer.rank, count=-1 if buffer.rank == 1 else 5)
    return x.repeat(1, options.get("hidden", HIDDEN) // HIDDEN).to(options["dtype"])


def run(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of a step and all gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.arange(1, y.numel() + 1).view(y.shape).to(y.dtype).cos()).sum().backward()
    made = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return made


def both(buffer: Any, options: dict[str, Any]) -> tuple[Any, Any, list[Any], list[torch.Tensor]]:
    """Steps of the layer as it is and in fixed shapes, the latter's dispatches, and forwards in either."""
    layer, x = layer_on(buffer, **options), inputs(buffer, options)
    usual, asked, engine = run(layer, x), list[Any](), type(buffer.runtime)
    forwards = [layer(x).detach()]
    layer.num_max_tokens, dispatch = MOST, engine.dispatch

    def watched(self: Any, request: Any, schedule: Any) -> Any:
        done = dispatch(self, request, schedule)
        if request.route is None:
            asked.append((request.num_worst_tokens, done.num_tokens_per_expert, done.x.shape[0]))
        return done

    engine.dispatch = watched
    try:
        fixed = run(layer, x)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                forwards.append(layer(x).clone())
    finally:
        engine.dispatch = dispatch
    return usual, fixed, asked, forwards


@pytest.mark.parametrize("name", OPTIONS)
def test_the_results_are_those_of_the_layer_that_waits(on_ranks: Any, name: str) -> None:
    for usual, fixed, asked, forwards in on_ranks(3, both, {"num_experts": 9} | OPTIONS[name]):
        assert len(usual) == len(fixed)
        for one, other in zip(usual, fixed, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        assert all(torch.equal(forward, usual[0]) for forward in forwards)
        assert asked == [(3 * MOST, [], 3 * MOST)] * 3


def without_gradients(buffer: Any) -> list[bool]:
    """True for outputs that require gradients: where nothing does, and where rows do on rank 0 alone."""
    layer = layer_on(buffer, num_max_tokens=MOST).requires_grad_(False)
    told = []
    for wanted in (False, buffer.rank == 0):
        y = layer(tokens(buffer.rank).requires_grad_(wanted))
        told.append(y.requires_grad)
        y.sum().backward()
    return told


def test_backwards_take_part_on_all_ranks_or_on_none(on_ranks: Any) -> None:
    assert on_ranks(2, without_gradients) == [[True, True]] * 2


def refused(buffer: Any) -> list[str]:
    """Refusals: too many tokens on one rank, experts whose counts the host must know, second derivatives."""
    layer, said = layer_on(buffer, num_max_tokens=MOST), []

    def attempt(call: Any) -> None:
        try:
            call()
        except ArgumentError as error:
            said.append(f"{type(error).__name__}: {error}")

    for many in (MOST + 1, MOST):
        attempt(lambda many=many: layer(torch.zeros(many if buffer.rank else 2, HIDDEN)))
    x = tokens(buffer.rank).requires_grad_()
    attempt(lambda: torch.autograd.grad(layer(x).sum(), x, create_graph=True))
    layer.experts = type("Others", (torch.nn.Identity,), {"num_local_experts": 4})()
    attempt(lambda: layer(torch.zeros(2, HIDDEN)))
    return said


def test_a_checkpoint_that_has_enough_is_no_error(on_ranks: Any) -> None:
    """It ends the repetition by an exception, inside the experts: nothing behind them is saved."""

    def body(buffer: Any) -> None:
        layer, x = layer_on(buffer, num_max_tokens=MOST), tokens(buffer.rank).requires_grad_()
        buffer.runtime.refuse = lambda operation, problem, schedule: refused.append(problem)
        refused: list[ArgumentError] = []
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        del buffer.runtime.refuse
        assert not refused

    on_ranks(2, body)


def test_repeated_experts_ask_no_generator(on_ranks: Any) -> None:
    """They draw nothing, and torch up to 2.9 cannot read one's state while a graph is captured."""

    def body(buffer: Any) -> None:
        layer = layer_on(buffer, num_max_tokens=MOST, recompute=True)
        x, asked = tokens(buffer.rank), list[bool]()
        state = torch.get_rng_state
        torch.get_rng_state = lambda: asked.append(True) or state()
        try:
            layer(x).sum().backward()
        finally:
            torch.get_rng_state = state
        assert not asked

    on_ranks(2, body)


def test_what_does_not_fit_is_refused_on_all_ranks(on_ranks: Any) -> None:
    for said in on_ranks(2, refused):
        many, twice, experts = said
        assert many.startswith(CapacityError.__name__)
        assert f"at most {MOST}" in many
        assert "create_graph" in twice
        assert "GroupedSwiGLU" in experts


def refuses_numbers(buffer: Any) -> None:
    for wrong, error in ((-1, RangeError), (2.5, ArgumentTypeError), (True, ArgumentTypeError)):
        with pytest.raises(error, match="num_max_tokens"):
            layer_on(buffer, num_max_tokens=wrong)


def test_the_most_tokens_are_a_number(on_ranks: Any) -> None:
    on_ranks(1, refuses_numbers)
