"""Fixtures for all folders: worlds of rank processes, shared by every test of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from deepep.sim import World


@pytest.fixture(scope="session")
def world_of() -> Iterator[Callable[[int], World]]:
    """`world_of(n)`: the session's world of n ranks, on gloo, started anew after a failure."""
    worlds: dict[int, World] = {}

    def get(num_ranks: int) -> World:
        if num_ranks not in worlds:
            worlds[num_ranks] = World(num_ranks)
        world = worlds[num_ranks]
        world.ensure_started()
        return world

    yield get
    for world in worlds.values():
        world.close()
