"""Fixtures that the tests of layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def with_buffer(ctx: Any, body: Callable[..., Any], *args: Any) -> Any:
    """Runs `body(buffer, *args)` on a rank of a world, with a Buffer that is destroyed afterwards."""
    from deepep import Buffer

    buffer = Buffer(ctx.group, timeout=30.0)
    try:
        return body(buffer, *args)
    finally:
        buffer.destroy()


@pytest.fixture
def on_ranks(world_of: Callable[[int], Any]) -> Callable[..., list[Any]]:
    """`on_ranks(n, body, *args, per_rank=None)`: `body(buffer, *args)` on every rank
    of a world of n; results by rank.
    """

    def run(num_ranks: int, body: Callable[..., Any], *args: Any, per_rank: Any = None) -> list[Any]:
        return world_of(num_ranks).run(with_buffer, body, *args, per_rank=per_rank)

    return run
