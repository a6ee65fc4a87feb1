"""A layer's forward in fixed shapes gives what the forward that waits gives, and asks for no counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.layers import HIDDEN, layer_on, tokens

from deepep.errors import ArgumentTypeError, CapacityError, RangeError
from deepep.placement import ExpertPlacement

MOST = 9


def both(buffer: Any, options: dict[str, Any], inference: bool) -> Any:
    """The outputs of the usual forward and of the one in fixed shapes, and the latter's dispatches."""
    hidden = options.get("hidden", HIDDEN)
    layer = layer_on(buffer, num_max_tokens=MOST, **options)
    x = tokens(buffer.rank, count=-1 if buffer.rank == 1 else 5).repeat(1, hidden // HIDDEN)
    x = x.to(layer.router.weight.dtype)
    usual = layer(x).detach()
    asked: list[Any] = []
    dispatch = type(buffer.runtime).dispatch

    def watched(self: Any, request: Any, schedule: Any) -> Any:
        done = dispatch(self, request, schedule)
        asked.append((request.num_worst_tokens, done.num_tokens_per_expert, done.x.shape[0]))
        return done

    type(buffer.runtime).dispatch = watched
    try:
        with torch.inference_mode() if inference else torch.no_grad():
            fixed = layer(x).clone()
    finally:
        type(buffer.runtime).dispatch = dispatch
    return usual, fixed, asked


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "shared_hidden": 0, "fp8_dispatch": True, "hidden": 128},
        {"dtype": torch.float64, "placement": ExpertPlacement(8, 3, (0, 1, 2, 3, 4, 5, 6, 7, 0))},
    ],
    ids=["float64", "bfloat16", "fp8", "replicas"],
)
def test_the_results_are_those_of_the_forward_that_waits(
    on_ranks: Any, options: dict[str, Any], inference: bool
) -> None:
    if "placement" not in options:
        options = options | {"num_experts": 9}
    for usual, fixed, asked in on_ranks(3, both, options, inference):
        assert usual.dtype == fixed.dtype
        assert torch.equal(usual, fixed)
        assert asked == [(3 * MOST, [], 3 * MOST)]


def refused(buffer: Any) -> list[str]:
    """Refusals of the forward: too many tokens on one rank, experts whose counts the host must know."""
    layer, said = layer_on(buffer, num_max_tokens=MOST), []
    for many in (MOST + 1, MOST):
        with torch.no_grad():
            try:
                layer(torch.zeros(many if buffer.rank else 2, HIDDEN))
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
    layer.experts = type("Others", (torch.nn.Identity,), {"num_local_experts": 4})()
    try:
        with torch.no_grad():
            layer(torch.zeros(2, HIDDEN))
    except ArgumentTypeError as error:
        said.append(str(error))
    layer_on(buffer, num_max_tokens=MOST)(torch.zeros(MOST + 1, HIDDEN))  # with gradients: any number
    return said


def test_what_does_not_fit_is_refused_on_all_ranks(on_ranks: Any) -> None:
    for said in on_ranks(2, refused):
        assert len(said) == 2
        assert said[0].startswith(CapacityError.__name__)
        assert f"at most {MOST}" in said[0]
        assert "GroupedSwiGLU" in said[1]


def test_the_most_tokens_are_a_number(on_ranks: Any) -> None:
    on_ranks(1, refuses_numbers)


def refuses_numbers(buffer: Any) -> None:
    for wrong, error in ((-1, RangeError), (2.5, ArgumentTypeError), (True, ArgumentTypeError)):
        with pytest.raises(error, match="num_max_tokens"):
            layer_on(buffer, num_max_tokens=wrong)
