"""Fixtures for all folders: worlds of rank processes, shared by every test of a session."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from deepep.sim import World
from deepep.sim.worlds import rank_handle

# Plans by the fixed rule, unless a test is about measuring them: times here are the machine's mood.
os.environ.setdefault("DEEPEP_PROBE_SECONDS", "0")

# One thread a process, as in ranks, commands included: others mostly wait in a loop for the next small
# operation, and took half of a core's time. tests/reference/test_threads.py shows that the bits are the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has the fork server import torch's compiler where many ranks of many worlds would: its DDP needs it."""
    if sum(item.path.parent.name == "parallel" for item in items) > 1:
        rank_handle.PRELOADED += ["torch._dynamo", "torch.distributed.tensor"]


def pytest_collection_finish() -> None:
    """Spares the collector what is loaded by now, torch and all tests: to walk it again and again took
    a twentieth of the drawn runs' time.
    """
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def dist() -> ModuleType:
    """release/dist.py, which is no module of the package."""
    path = Path(__file__).parents[1] / "release" / "dist.py"
    spec = importlib.util.spec_from_file_location("release_dist", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module
