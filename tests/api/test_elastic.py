"""ElasticBuffer against the oracle of expanded layouts, case by case and to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.elastic_cases import CASES, ElasticCase, round_trip

from deepep.sim import World


def elastic_of(ctx: Any, **options: Any) -> Any:
    """This rank's buffer with these options, kept until its world is rebuilt."""
    from deepep import ElasticBuffer

    key = ("elastic", tuple(sorted(options.items())))
    if key not in ctx.scratch:
        how = {"num_bytes": 2 << 20, "num_gpu_timeout_secs": 30, **options}
        ctx.scratch[key] = ElasticBuffer(ctx.group, **how)
    return ctx.scratch[key]


def run_case(ctx: Any, case: ElasticCase, seed: int, backend: str | None) -> None:
    options = {"ranks_per_domain": case.ranks_per_domain} if case.ranks_per_domain else {}
    buffer = elastic_of(ctx, allow_multiple_reduction=not case.single_reduction, backend=backend, **options)
    round_trip(ctx, case, seed, buffer, torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_round_trip(world_of: Callable[[int], World], name: str) -> None:
    for seed in (0, 1):
        world_of(2).run(run_case, CASES[name], seed, None)


@pytest.mark.parametrize("name", ["plain", "expanded, zero padding, biases", "expanded, one sum"])
def test_round_trip_of_three_ranks(world_of: Callable[[int], World], name: str) -> None:
    case = replace(CASES[name], tokens=(4, 0, 7), pattern="holes")
    world_of(3).run(run_case, case, 3, None)


@pytest.mark.parametrize("name", ["plain", "expanded, zero padding, biases", "expanded, one sum"])
def test_round_trip_between_domains(world_of: Callable[[int], World], name: str) -> None:
    """Two levels, as the reference has them: a domain's rows are summed and rounded first."""
    case = replace(CASES[name], tokens=(4, 0, 7, 3), topk=5, ranks_per_domain=2)
    world_of(4).run(run_case, case, 3, "reference")


def test_hybrid_mode_is_one_of_domains(world_of: Callable[[int], World]) -> None:
    """Without it, or with one domain, rows travel directly, and the sums are others where domains round."""

    def sums(ctx: Any, hybrid: bool) -> Any:
        buffer = elastic_of(ctx, allow_hybrid_mode=hybrid, ranks_per_domain=2, backend="reference")
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(ctx.rank)).bfloat16()
        idx = torch.arange(4).expand(32, 4).contiguous()
        got = buffer.dispatch(x, idx, num_experts=4, num_max_tokens_per_rank=32)
        scale = 1 + 0.3 * ctx.rank
        out = buffer.combine((got.recv_x * scale).bfloat16(), got.handle).combined_x
        ranks = (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx, buffer.num_scaleup_ranks)
        return buffer.get_logical_domain_size(), ranks, out.view(torch.int16).tolist()

    hybrid, direct = (world_of(4).run(sums, on) for on in (True, False))
    assert [(size, ranks) for size, ranks, _ in hybrid] == [((2, 2), (r // 2, r % 2, 2)) for r in range(4)]
    assert [(size, ranks) for size, ranks, _ in direct] == [((1, 4), (0, r, 4)) for r in range(4)]
    assert all(one[2] != other[2] for one, other in zip(hybrid, direct, strict=True))
