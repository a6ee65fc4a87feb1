"""Every parameter of every public callable of deepep.nn, given odd values: the library's own error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from harness import bad_arguments as bad

import deepep
from deepep import nn
from deepep.placement import contiguous
from deepep.sim import World

#: Buffer's names of what deepep.nn hands on
BUFFERS_NAMES = ("x", "is_token_in_rank")


def public_callables() -> set[str]:
    """Functions of deepep.nn, its modules, and those of their methods that take arguments."""
    found = set()
    for thing in (getattr(nn, name) for name in nn.__all__):
        if inspect.isfunction(thing):
            found.add(thing.__qualname__)
        elif inspect.isclass(thing) and issubclass(thing, torch.nn.Module):
            methods = [m for n, m in vars(thing).items() if inspect.isfunction(m) and not n.startswith("_")]
            found |= {thing.__qualname__, *(m.__qualname__ for m in methods if bad.parameters(m))}
    return found


def layers(ctx: Any) -> list[str]:
    """Complaints about deepep.nn's callables, on one rank."""
    with deepep.Buffer(ctx.group, timeout=20.0) as buffer:
        x, idx = torch.randn(3, 16), torch.tensor([[0, 1], [1, -1], [3, 2]])
        weights = torch.rand(3, 2)
        sizes = {"hidden": 16, "num_experts": 4, "num_topk": 2}
        experts = nn.GroupedSwiGLU(4, 16, 8)
        received = nn.dispatch(buffer, x, idx, weights, 4)
        moe, placement = nn.ExpertParallelMoE(buffer, expert_hidden=8, **sizes), contiguous(4, 1)
        cases: list[tuple[Callable[..., Any], dict[str, Any]]] = [
            (nn.SwiGLU, {"hidden": 16, "expert_hidden": 8}),
            (nn.GroupedSwiGLU, {"num_local_experts": 4, "hidden": 16, "expert_hidden": 8}),
            (nn.Router, sizes),
            (nn.ExpertParallelMoE, {"buffer": buffer, "expert_hidden": 8, **sizes}),
            (nn.Router(**sizes).forward, {"x": x}),
            (nn.Router(**sizes).rebalance, {"rate": 0.1}),
            (nn.Router(**sizes).reset_parameters, {"seed": 1}),
            (nn.Router(**sizes).choose_among, {"alive": [0, 1, 3]}),
            (nn.SwiGLU(16, 8).forward, {"x": x}),
            (nn.SwiGLU(16, 8).reset_parameters, {"seed": 1}),
            (experts.forward, {"x": x, "counts": torch.tensor([1, 0, 1, 1])}),
            (experts.reset_parameters, {"seed": 1, "first_expert": 0}),
            (moe.forward, {"x": x}),
            (moe.rebalance, {"rate": 0.1}),
            (moe.leave_out, {"ranks": []}),
            (moe.sum_replica_gradients_by, {"add_up": print}),
            (moe.move_to, {"placement": placement}),
            (moe.go_by, {"placement": placement}),
            (
                nn.move_experts,
                {
                    "tensors": [torch.ones(4, 2)],
                    "old": placement,
                    "new": placement,
                    "rank": 0,
                    "group": buffer.group,
                },
            ),
            (nn.buffer_number, {"buffer": buffer}),
            (observe, {"observer": print}),
            (
                nn.dispatch,
                {"buffer": buffer, "x": x, "topk_idx": idx, "topk_weights": weights, "num_experts": 4},
            ),
            (nn.combine, {"y": received.x, "route": received.route}),
            (
                nn.apply_experts,
                {
                    "experts": experts,
                    "x": received.x,
                    "topk_idx": received.topk_idx,
                    "topk_weights": received.topk_weights,
                },
            ),
        ]
        tried = {function.__qualname__ for function, _ in cases}
        return [f"{name} is not tried" for name in sorted(public_callables() - tried)] + [
            wrong
            for function, good in cases
            for wrong in bad.complaints_of(function, good, True, BUFFERS_NAMES)
        ]


def observe(observer: Callable[[Any], None]) -> None:
    """nn.observe, entered and left."""
    with nn.observe(observer):
        pass


def test_layers() -> None:
    with World(1) as world:
        (found,) = world.run(layers)
    assert not found, "\n".join(found)
