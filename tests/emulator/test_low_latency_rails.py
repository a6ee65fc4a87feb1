"""Low latency between domains in two levels: the kernels on the emulator, the reference's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness.side_by_side import explore_side_by_side

from deepep import Buffer, ModeError, _emulator
from deepep.sim import RankContext, World
from deepep.sim.cases.case import Case
from deepep.sim.cases.options import Options
from deepep.sim.emulator.low_latency import LowLatencySizes
from deepep.sim.emulator.low_latency_far import far_shape
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.low_latency import LowLatencyRun, LowLatencyScenario, run
from deepep.sim.explore.low_latency_explorer import draw_rail_low_latency, explore_low_latency
from deepep.sim.explore.scenarios import Stop, ThreadSchedule


def test_drawn_calls_give_the_references_bits() -> None:
    tally = explore_low_latency(runs=12, schedules_per_scenario=1, scenarios=draw_rail_low_latency)
    assert tally.failure is None, str(tally.failure)


@pytest.mark.slow
def test_many_drawn_calls_give_the_references_bits() -> None:
    how = {"first_seed": 1000, "runs": 600, "scenarios": draw_rail_low_latency}
    for tally in explore_side_by_side(explore_low_latency, **how):
        assert tally.failure is None, str(tally.failure)


@pytest.mark.slow
def test_ranks_that_stop_leave_faults_and_nobody_waiting() -> None:
    how = {"first_seed": 5000, "runs": 400, "with_stops": True, "scenarios": draw_rail_low_latency}
    for tally in explore_side_by_side(explore_low_latency, **how):
        assert tally.failure is None, str(tally.failure)
        assert tally.kinds["fault"] > 0


def between(num_ranks: int, per_domain: int, *, tokens: int = 3, **changes: object) -> LowLatencyScenario:
    """Two round trips; the last rank has no tokens. `changes` names options and the launch."""
    rng = np.random.default_rng(num_ranks)
    experts = 2 * num_ranks
    routing = [rng.integers(-1, experts, (tokens if r < num_ranks - 1 else 0, 4)) for r in range(num_ranks)]
    options = {k: v for k, v in changes.items() if k in Options.__dataclass_fields__}
    launch = {k: v for k, v in changes.items() if k in LowLatencyScenario.__dataclass_fields__}
    plain = Options(mode="ll", reduce="rank", combine_rows="other", values="normal")
    case = Case(experts, tuple(routing), hidden=136, options=replace(plain, **options)).legal()
    cases = (case, replace(case, seed=1))
    return LowLatencyScenario(cases, ranks_per_domain=per_domain, has_gateways=True, **launch)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 1), (4, 2), (6, 2), (6, 3), (8, 4)])
@pytest.mark.parametrize("carries_weights", [False, True])
def test_domains(shape: tuple[int, int], carries_weights: bool) -> None:
    scenario = between(*shape, carries_weights=carries_weights, num_combines=2)
    report = run(scenario, draw_schedule(shape[0] + carries_weights))
    assert report.kind == "ok", report.text


@pytest.mark.parametrize("low_latency", ["fp8", "fp8+rounded", "fp8+ue8m0"])
def test_formats(low_latency: str) -> None:
    report = run(between(4, 2, low_latency=low_latency, values="nonfinite"), draw_schedule(1))
    assert report.kind == "ok", report.text


@pytest.mark.parametrize("spoils", ["dispatch", "shape", "combine", "indices", "elsewhere", "meeting"])
def test_a_rank_that_spoils_a_call_stops_all_and_nothing_else(spoils: str) -> None:
    """Of a rank of another domain a rank learns it by a gateway."""
    report = run(between(4, 2, tokens=2, spoils=spoils), draw_schedule(3))
    assert report.kind == "ok", report.text


@pytest.mark.parametrize("at", [1, 4000, 12000])
def test_a_gateway_that_stops_is_a_fault_of_all(at: int) -> None:
    report = run(between(4, 2), ThreadSchedule(), stops=(Stop(rank=3, at=at),))
    assert report.kind in ("fault", "ok"), report.text
    assert at > 1 or set(report.faults) == {0, 1, 2}


@pytest.mark.parametrize("carries_weights", [False, True])
def test_a_token_crosses_to_a_domain_once_and_a_sum_comes_back(carries_weights: bool) -> None:
    """Counted where puts are made, and along rails alone."""
    scenario = between(6, 2, tokens=7, carries_weights=carries_weights)
    ran = LowLatencyRun(scenario, ThreadSchedule(), (), _emulator.own_kernels(), 5_000_000)
    report = ran.run()
    assert report.kind == "ok", report.text
    case = scenario.cases[0]
    of_domain, num_topk = 2 * case.num_local_experts, case.num_topk
    words = -(-8 * 2 * (1 + -(-case.num_max_tokens // 32) + case.num_local_experts) // 16) * 16
    message = -(-8 * num_topk // 16) * 16 + 2 * case.hidden
    # [source, domain]: tokens that have an expert there
    goes = [
        [(idx // of_domain == d).any(axis=1).sum() for d in range(3)] for idx in map(np.array, case.topk_idx)
    ]
    for rank in range(6):
        for peer in range(6):
            out, back = int(goes[rank][peer // 2]), int(goes[peer][rank // 2])
            weights = 0 if carries_weights else 4 * num_topk * out
            once = words + out * message + 16 + weights + 16 + back * 2 * case.hidden
            is_rail = rank != peer and rank % 2 == peer % 2
            assert ran.machine.put_bytes(rank, peer) == (2 * once if is_rail else 0)


def test_memory_is_of_domains_instead_of_ranks() -> None:
    sizes = LowLatencySizes(4, 128, 8, 7168)
    flat, rails = (far_shape(64, 8, sizes, has_gateways) for has_gateways in (False, True))
    assert 7.9 < flat.remote_bytes / rails.remote_bytes < 8.1


def decode_steps(ctx: RankContext, backend: str) -> list[bytes]:
    """The bits of dispatches and combines: BF16 and FP8."""
    buffer = Buffer(
        ctx.group,
        backend=backend,
        ranks_per_domain=2,
        low_latency_mode=True,
        reduction="domain",
        explicitly_destroy=True,
        timeout=120.0,
    )
    generator = torch.Generator().manual_seed(ctx.rank)
    num_tokens = 5 - ctx.rank
    x = torch.randn(num_tokens, 128, generator=generator).to(torch.bfloat16)
    idx = torch.randint(-1, 8, (num_tokens, 4), generator=generator)
    weights = torch.rand(num_tokens, 4, generator=generator)
    made = []
    for step in range(2):
        rows, count, handle, _, _ = buffer.low_latency_dispatch(
            *(x, idx, 6, 8), use_fp8=step == 1, topk_weights=weights if step == 0 else None
        )
        values = rows if step != 1 else rows[0].float().mul(0.5).to(torch.bfloat16)
        made += [count, handle.recv_src_info]
        made += [values[expert, :number] for expert, number in enumerate(count.tolist())]
        made.append(buffer.low_latency_combine(values.clone(), idx, weights, handle)[0])
    for refused in ({"return_recv_hook": True}, {"use_logfmt": True}):
        with pytest.raises(ModeError, match="reduction='domain'"):
            buffer.low_latency_combine(values, idx, weights, handle, **refused)
    with pytest.raises(ModeError, match="return_recv_hook"):
        buffer.low_latency_dispatch(x, idx, 6, 8, return_recv_hook=True)
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in made]


def test_the_same_bits_as_the_reference_backend(world_of: Callable[[int], World]) -> None:
    world = world_of(4)
    assert world.run(decode_steps, "emulator") == world.run(decode_steps, "reference")


def refuse_constructions(ctx: RankContext) -> None:
    """Domains and options that two levels are not made for."""
    for how in ({"enable_shrink": True, "ranks_per_domain": 2}, {"ranks_per_domain": 3}):
        with pytest.raises(ModeError, match="reduction='domain'"):
            Buffer(
                ctx.group, backend="reference", low_latency_mode=True, reduction="domain", timeout=60.0, **how
            )


def test_refused_constructions(world_of: Callable[[int], World]) -> None:
    world_of(4).run(refuse_constructions)
