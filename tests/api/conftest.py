"""Fixtures of Buffer's tests. Functions handed to tests here travel to the ranks by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deepep.sim import World


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # A fresh tensor: contiguous() keeps odd strides of dimensions of size 1, which view(dtype) refuses.
    raw_a, raw_b = (t.new_empty(t.numel()).copy_(t.flatten()).view(torch.uint8) for t in (a, b))
    return torch.equal(raw_a, raw_b)


@pytest.fixture(scope="session")
def same_bits() -> Callable[[torch.Tensor | None, torch.Tensor | None], bool]:
    """Same dtype, shape and bits; None only equals None."""
    return _same_bits


def _buffer_of(ctx: Any, **options: Any) -> Any:
    from deepep import Buffer

    key = ("tests/deepep", tuple(sorted(options.items())))
    if key not in ctx.scratch:
        ctx.scratch[key] = Buffer(ctx.group, **{"timeout": 30.0, "low_latency_mode": True, **options})
    return ctx.scratch[key]


@pytest.fixture(scope="session")
def buffer_of() -> Callable[..., Any]:
    """`buffer_of(ctx, **options)`: this rank's buffer with these options, kept until its world is rebuilt."""
    return _buffer_of


def _routing(rank: int, num_ranks: int, num_experts: int, num_topk: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * num_ranks + rank)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return scores.topk(num_topk, dim=1).indices


@pytest.fixture(scope="session")
def routing() -> Callable[..., torch.Tensor]:
    """`routing(rank, R, E, K, T)`: distinct experts per token, [T, K] int64; every rank its own."""
    return _routing


@pytest.fixture
def fresh_world() -> Iterator[Callable[[int], World]]:
    """`fresh_world(n)`: a world for one test, which may end badly."""
    worlds = []

    def make(num_ranks: int) -> World:
        worlds.append(World(num_ranks))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
