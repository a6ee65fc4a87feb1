"""Experts under DistributedDataParallel: a rank's own, left out of the reducer, and scaled as the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

LONG = 300.0  # the first wrapper of a process imports the compiler of torch


def with_experts(context: Any, gradient: str) -> dict[str, torch.Tensor]:
    """Gradients by name, of the mean loss over all tokens; experts' by their first expert's number."""
    import deepep
    from deepep.nn import ExpertParallelMoE

    torch.set_default_dtype(torch.float64)
    try:
        with deepep.Buffer(context.group, device="cpu", timeout=60.0) as buffer:
            moe = ExpertParallelMoE(
                buffer, hidden=16, expert_hidden=8, num_experts=4, num_topk=2, shared_hidden=8, seed=3
            )
            model = deepep.DistributedDataParallel(moe, process_group=context.group, gradient=gradient)
            tokens = torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).tensor_split(
                context.num_ranks
            )
            share = 1.0 if gradient == "mean" else 1.0 / context.num_ranks
            for _ in range(2):  # the second is added to the first
                (model(tokens[context.rank]).square().mean() * share).backward()
            own = {id(p) for p in moe.expert_parameters()}
            found = {
                f"experts {context.rank}" * (id(p) in own) + name: p.grad.detach().clone()
                for name, p in moe.named_parameters()
                if p.grad is not None
            }
            model.close()
    finally:
        torch.set_default_dtype(torch.float32)
    return found


class WithExpert(torch.nn.Module):
    """A weight that all ranks have, and one that is a rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))

    def expert_parameters(self) -> list[torch.nn.Parameter]:
        return [self.own]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((self.shared + self.own) * x).sum()


def wrapped_again(context: Any) -> tuple[list[list[float]], str]:
    """Gradients of both weights under one wrapper after the other, of rank + 1 on each rank; and an error."""
    import deepep
    from deepep.errors import ModeError

    module, found = WithExpert(), []
    for gradient in ("sum", "mean", "mean", "sum"):
        module.zero_grad()
        model = deepep.DistributedDataParallel(module, process_group=context.group, gradient=gradient)
        model(torch.full((4,), 1.0 + context.rank)).backward()
        model.close()
        found.append([float(weight.grad[0]) for weight in (module.shared, module.own)])
    averaging = torch.nn.parallel.DistributedDataParallel(WithExpert(), process_group=context.group)
    try:
        deepep.optimize(averaging)
    except ModeError as error:
        return found, str(error)
    return found, ""


def test_a_module_that_is_wrapped_again_is_scaled_once(world_of: Callable[[int], Any]) -> None:
    for rank, (found, refusal) in enumerate(world_of(2).run(wrapped_again, timeout=LONG)):
        of_sums, of_means = [3.0, 1.0 + rank], [1.5, (1.0 + rank) / 2]
        assert found == [of_sums, of_means, of_means, of_sums]
        assert "with experts" in refusal


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_experts_and_the_rest_have_one_process_gradients(
    world_of: Callable[[int], Any], gradient: str
) -> None:
    (alone,) = world_of(1).run(with_experts, gradient, timeout=LONG)
    outcomes = world_of(2).run(with_experts, gradient, timeout=LONG)
    seen = 0
    for name, wanted in alone.items():
        if name.startswith("experts 0"):
            parts = [found[f"experts {rank}" + name[9:]] for rank, found in enumerate(outcomes)]
            assert torch.allclose(torch.cat(parts), wanted, rtol=1e-12, atol=1e-15), name
            seen += 1
        else:
            for found in outcomes:
                # In fixed point no more than 2^-28 of the block's largest would be kept: float64 is not.
                assert torch.allclose(found[name], wanted, rtol=1e-12, atol=1e-15), name
    assert seen >= 2
