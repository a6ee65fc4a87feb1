"""All-gathers in sessions, sends around a ring, Engram storage: drawn calls against the oracle."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import side_primitive_cases as cases
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from deepep.sim import World

pytestmark = pytest.mark.own_backend

CPU = torch.device("cpu")
DRAWN = settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate], database=None)


def buffer_of(ctx: Any, backend: str | None, **options: Any) -> Any:
    """This rank's buffer with these options, kept until its world is rebuilt."""
    from deepep import ElasticBuffer

    key = ("beside", backend, tuple(sorted(options.items())))
    if key not in ctx.scratch:
        how = {"num_bytes": 4 << 20, "num_cpu_bytes": 2 << 20, "num_gpu_timeout_secs": 30, **options}
        ctx.scratch[key] = ElasticBuffer(ctx.group, backend=backend, **how)
    return ctx.scratch[key]


def of_backend(name: str | None) -> str | None:
    if name == "emulator":
        pytest.importorskip("deepep._emulator")
    return name


@pytest.mark.parametrize("backend", ["reference", "emulator"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_gathers_of_sessions(world_of: Callable[[int], World], backend: str, ranks: int) -> None:
    def run(ctx: Any, seeds: list[int]) -> None:
        for seed in seeds:
            sessions = cases.draw_sessions(random.Random(seed))
            cases.run_sessions(buffer_of(ctx, backend), CPU, sessions, seed)

    of_backend(backend)

    @DRAWN
    @given(st.lists(st.integers(0, 1 << 30), min_size=3, max_size=3))
    def check(seeds: list[int]) -> None:
        world_of(ranks).run(run, seeds)

    check()


@pytest.mark.parametrize("backend", ["reference", "emulator"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensors_around_a_ring(world_of: Callable[[int], World], backend: str, ranks: int) -> None:
    def run(ctx: Any, inflight: int, seeds: list[int]) -> None:
        buffer = buffer_of(ctx, backend)
        buffer.pp_set_config(1024, inflight)
        for seed in seeds:
            steps = cases.draw_ring(random.Random(seed), ctx.num_ranks, inflight)
            cases.run_ring(buffer, CPU, steps, seed)

    of_backend(backend)

    @DRAWN
    @given(st.integers(1, 3), st.lists(st.integers(0, 1 << 30), min_size=3, max_size=3))
    def check(inflight: int, seeds: list[int]) -> None:
        world_of(ranks).run(run, inflight, seeds)

    check()


@pytest.mark.parametrize("backend", ["reference", "emulator"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_entries_of_all_ranks(world_of: Callable[[int], World], backend: str, ranks: int) -> None:
    def run(ctx: Any, seeds: list[int]) -> None:
        tables = [cases.draw_table(random.Random(seed)) for seed in seeds]
        cases.run_tables(buffer_of(ctx, backend), CPU, tables)

    of_backend(backend)

    @DRAWN
    @given(st.lists(st.integers(0, 1 << 30), min_size=4, max_size=4))
    def check(seeds: list[int]) -> None:
        world_of(ranks).run(run, seeds)

    check()
