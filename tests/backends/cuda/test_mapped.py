"""All-gather sessions and Engram storage on two GPUs: pytest -m gpu tests/backends/cuda/test_mapped.py"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import side_primitive_cases as cases
from harness.refusals import raised

from deepep.sim import World

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=240) as world:
        yield world


def buffer_of(ctx: Any) -> Any:
    """This rank's buffer, kept until its world is rebuilt."""
    import deepep

    if "mapped" not in ctx.scratch:
        how = {"num_bytes": 1 << 30, "num_cpu_bytes": 256 << 20, "num_gpu_timeout_secs": 20}
        ctx.scratch["mapped"] = deepep.ElasticBuffer(ctx.group, **how)
    assert ctx.scratch["mapped"].info.backend == "cuda"
    return ctx.scratch["mapped"]


@pytest.mark.parametrize("seed", range(8))
def test_gathers_of_sessions(pair: World, seed: int) -> None:
    def run(ctx: Any) -> None:
        cases.run_sessions(buffer_of(ctx), ctx.device, cases.draw_sessions(random.Random(seed)), seed)

    pair.run(run)


@pytest.mark.parametrize("seed", range(8))
def test_entries_of_all_ranks(pair: World, seed: int) -> None:
    def run(ctx: Any) -> None:
        tables = [cases.draw_table(random.Random(8 * seed + i)) for i in range(4)]
        cases.run_tables(buffer_of(ctx), ctx.device, tables)

    pair.run(run)


def test_many_large_gathers_of_late_ranks(pair: World) -> None:
    """Streams that are late by turns: nobody reads what is not there, nor what the next session brings."""

    def run(ctx: Any) -> None:
        buffer, elements = buffer_of(ctx), 8 << 20
        size = buffer.get_agrs_num_max_session_bytes(ctx.group, [(elements,)] * 3, torch.int32)
        buffer.agrs_set_config(size, 3)
        sums = []
        for session in range(12):
            if session % 2 == ctx.rank:
                torch.cuda._sleep(20_000_000)
            with buffer.agrs_new_session():
                pending = [
                    buffer.all_gather(
                        torch.full((elements,), 100 * session + 10 * i + ctx.rank, device=ctx.device).int()
                    )
                    for i in range(3)
                ]
                for i, (got, handle) in enumerate(pending):
                    handle()
                    low, high = got.amin(1), got.amax(1)
                    sums.append((100 * session + 10 * i, low, high))
        for base, low, high in sums:
            assert low.tolist() == high.tolist() == [base, base + 1]

    pair.run(run)


def test_what_differs_is_found_when_the_session_ends(pair: World) -> None:
    def run(ctx: Any) -> None:
        buffer = buffer_of(ctx)
        buffer.agrs_set_config(4096, 1)
        buffer.create_agrs_session()
        buffer.all_gather(torch.ones(4 + ctx.rank, device=ctx.device))[1]()
        assert raised(buffer.destroy_agrs_session)[0] == "MismatchError"
        with buffer.agrs_new_session():
            got, handle = buffer.all_gather(torch.full((4,), ctx.rank, device=ctx.device))
            handle()
            assert got.tolist() == [[0] * 4, [1] * 4]

    pair.run(run)


def test_sends_are_not_there(pair: World) -> None:
    def run(ctx: Any) -> None:
        t = torch.ones(1, device=ctx.device)
        assert raised(lambda: buffer_of(ctx).pp_send(t, 1 - ctx.rank))[0] == "ModeError"

    pair.run(run)
