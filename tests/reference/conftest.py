"""Routing decisions for the reference's tests: every edge case of the interface by name, values by seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepep.reference.wire import Wire

Routing = tuple[int, list[Tensor]]  # E, and [T, K] int64 by rank

PATTERNS = (
    "distinct experts",
    "some -1",
    "duplicates",
    "all -1",
    "all -1 on one rank",
    "no token",
    "no token on one rank",
    "one token per rank",
    "everything to one rank",
    "everything to one expert",
    "nothing leaves its rank",
    "K = 1",
    "K = 32",
    "K > R",
    "E = R",
)


def _draw_routing(seed: int, num_ranks: int, pattern: str) -> Routing:
    rng = np.random.default_rng([seed, num_ranks, PATTERNS.index(pattern)])
    num_local = 1 if pattern == "E = R" else int(rng.integers(1, 4))
    num_experts = num_ranks * num_local
    num_topk = {"K = 1": 1, "K = 32": 32, "K > R": num_ranks + 1}.get(pattern, int(rng.integers(1, 6)))
    num_tokens = rng.integers(0, 9, size=num_ranks)
    if pattern == "no token":
        num_tokens[:] = 0
    elif pattern == "no token on one rank":
        num_tokens[:] += 1
        num_tokens[rng.integers(num_ranks)] = 0
    elif pattern == "one token per rank":
        num_tokens[:] = 1
    special = int(rng.integers(num_ranks))
    tables = []
    for rank in range(num_ranks):
        shape = (int(num_tokens[rank]), num_topk)
        # Experts in random order, as often as K needs, -1 in between.
        order = np.argsort(rng.random((shape[0], num_experts)), axis=1)
        idx = np.tile(order, (1, -(-num_topk // num_experts)))[:, :num_topk]
        if pattern == "some -1":
            idx[rng.random(shape) < 0.4] = -1
        elif pattern in ("duplicates", "K = 32"):
            idx = rng.integers(-1, num_experts, size=shape)
        elif pattern == "all -1" or (pattern == "all -1 on one rank" and rank == special):
            idx[:] = -1
        elif pattern == "everything to one rank":
            idx = special * num_local + idx % num_local
        elif pattern == "everything to one expert":
            idx[:] = special * num_local
        elif pattern == "nothing leaves its rank":
            idx = rank * num_local + idx % num_local
        tables.append(torch.from_numpy(np.ascontiguousarray(idx, dtype=np.int64)))
    return num_experts, tables


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(scope="session")
def patterns() -> tuple[str, ...]:
    """The names of the routing patterns."""
    return PATTERNS


@pytest.fixture(scope="session")
def draw_routing() -> Callable[[int, int, str], Routing]:
    """`draw_routing(seed, num_ranks, pattern)`: E and each rank's top-k indices."""
    return _draw_routing


def _same_bits(got: Tensor, want: Tensor) -> bool:
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    return torch.equal(_bytes(got), _bytes(want))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """`same_bits(got, want)`: same dtype, same shape, same bits; NaNs and signed zeros told apart."""
    return _same_bits


def _wire_of(ctx: Any, members: tuple[int, ...]) -> Wire | None:
    if len(members) == ctx.num_ranks:
        return Wire.whole(ctx.group)
    if members not in ctx.scratch:
        ctx.scratch[members] = dist.new_group(list(members))
    if ctx.rank not in members:
        return None
    return Wire(ctx.scratch[members], ctx.rank, ctx.num_ranks, members)


@pytest.fixture(scope="session")
def wire_of() -> Callable[[Any, tuple[int, ...]], Wire | None]:
    """`wire_of(ctx, members)`, called in all rank processes: a wire of these ranks, None on the others."""
    return _wire_of
