"""Two-level dispatch and combine: the kernels on the emulator, over domains that share no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepep import _emulator
from deepep.sim import RankContext, World
from deepep.sim.cases.case import Case, Limits
from deepep.sim.cases.options import Options
from deepep.sim.emulator.calls import Gpu
from deepep.sim.explore.emulated import ScenarioRun, run
from deepep.sim.explore.explorer import (
    TWO_LEVEL_LIMITS,
    draw_schedule,
    draw_two_level_scenario,
    explore,
)
from deepep.sim.explore.failures import Failure
from deepep.sim.explore.scenarios import Scenario, ThreadSchedule
from deepep.sim.fuzz import subjects
from deepep.sim.fuzz.fuzzer import Fuzzer
from deepep.sim.rules.crossings import crossing_tokens


def test_drawn_cases_give_what_the_global_view_says() -> None:
    tally = explore(runs=24, schedules_per_scenario=1, scenarios=draw_two_level_scenario)
    assert tally.failure is None, tally.failure.report.text


@pytest.mark.slow
def test_more_of_them() -> None:
    tally = explore(first_seed=1000, runs=400, schedules_per_scenario=2, scenarios=draw_two_level_scenario)
    assert tally.failure is None, tally.failure.report.text


def test_two_domains_of_four_ranks() -> None:
    limits = replace(TWO_LEVEL_LIMITS, ranks=(8,), max_tokens=24)
    for seed in range(3):
        scenario = draw_two_level_scenario(seed, limits=limits)
        cases = tuple(case.with_options(ranks_per_node=4) for case in scenario.cases)
        report = run(replace(scenario, cases=cases), draw_schedule(seed))
        assert not report.failed, report.text


def test_whoever_waits_for_a_rank_that_stops_gives_up() -> None:
    """Once a gateway that had given up raised its flags all the same: the 12th run read rows not there."""
    tally = explore(
        first_seed=300, runs=24, schedules_per_scenario=3, with_stops=True, scenarios=draw_two_level_scenario
    )
    assert tally.failure is None, tally.failure.report.text
    assert tally.kinds["fault"] > 0


def between(tokens: int, *, num_ranks: int = 4, per_domain: int = 2, **options: object) -> Case:
    """Every rank's tokens go to two ranks, of one domain or of two."""
    idx = np.array([[t % num_ranks, (t // 3 + 1) % num_ranks] for t in range(tokens)]).reshape(-1, 2)
    chosen = Options(mode="ht", reduce="domain", ranks_per_node=per_domain, **options)
    return Case(num_ranks, (idx,) * num_ranks, 64, options=chosen, seed=3)


def test_a_token_and_a_sum_cross_once() -> None:
    """Counted where puts are made: records of the tokens that go to a domain, and what is posted."""
    tokens, window, chunk_header = 40, 16, 16
    for topk in (False, True):
        case = between(tokens, topk=topk, values="normal")
        scenario = Scenario((case,), Gpu(num_threads=64, window=window), between_domains=True)
        ran = ScenarioRun(scenario, ThreadSchedule(), (), _emulator.own_kernels(), 5_000_000)
        report = ran.run()
        assert report.kind == "ok", report.text
        counts = crossing_tokens(case, masked_out=False)
        windows = -(-tokens // window)
        num_topk = case.num_topk if topk else 0
        record = -(-(2 * case.hidden + 4 + 4 * 2 + 8 * num_topk) // 16) * 16
        mailbox = 8 * (4 + 10 + 2 * case.num_local_experts)  # counts, what all get, the domain's experts
        for rank in range(4):
            rail = (rank + 2) % 4
            sent = counts[rank, 1 - rank // 2] * record + windows * chunk_header + mailbox
            sums = counts[rail, rank // 2] * 2 * case.hidden + windows * chunk_header
            asked = 8 + windows * 4 * window  # digest and T, and which ranks have a row
            assert ran.machine.put_bytes(rank, rail) == sent + sums + asked
            assert [ran.machine.put_bytes(rank, r) for r in range(4) if r != rail] == [0, 0, 0]


def test_windows_of_both_halves_are_read_in_any_order() -> None:
    """One credit for both once let a window be written over one that was not read."""
    scenario = draw_two_level_scenario(127)
    assert any(max(case.num_tokens) > 2 * scenario.gpu.window for case in scenario.cases)
    for seed in range(127, 131):
        report = run(scenario, draw_schedule(seed))
        assert report.kind == "ok", report.text


def test_a_window_is_counted_before_its_last_chunk_leaves() -> None:
    """Else the window two later may be counted meanwhile: its counter was set to zero late."""
    for seed in (68, 71, 74):
        report = run(draw_two_level_scenario(68), draw_schedule(seed))
        assert report.kind == "ok", report.text


def test_puts_within_the_limit_of_the_protocol_and_no_more() -> None:
    """The machine fails a put beyond RailLayout::max_open_puts; with a limit of two it fails."""
    case = between(64)
    scenario = Scenario((case,), Gpu(num_threads=64, window=32), between_domains=True)
    kinds = set()
    for seed in range(12):
        ran = ScenarioRun(
            scenario, draw_schedule(seed), (), _emulator.own_kernels(), 5_000_000, max_open_puts=2
        )
        kinds.add(ran.run().kind)
        assert run(scenario, draw_schedule(seed)).kind == "ok"
    assert "too many open puts" in kinds


def test_a_failure_between_domains_is_saved_and_replayed(tmp_path) -> None:
    scenario = draw_two_level_scenario(5)
    schedule = draw_schedule(5)
    path = tmp_path / "failure.json"
    Failure(scenario, schedule, (), run(scenario, schedule)).save(path)
    loaded = Failure.load(path)
    assert loaded.scenario.between_domains
    assert loaded.scenario.gpu == scenario.gpu
    assert loaded.replay().steps == run(scenario, schedule).steps


def on_buffer(ctx: RankContext, backend: str) -> list[bytes]:
    """The bits of fresh and cached dispatches and combines, BF16 and FP8, with and without a masked rank."""
    from deepep import Buffer

    buffer = Buffer(
        ctx.group,
        backend=backend,
        ranks_per_domain=2,
        low_latency_mode=True,
        enable_shrink=True,
        explicitly_destroy=True,
        timeout=120.0,
    )
    generator = torch.Generator().manual_seed(ctx.rank)
    tokens, experts = 37 - 9 * ctx.rank, 8
    x = torch.randn(tokens, 64, generator=generator).to(torch.bfloat16)
    bias = torch.randn(tokens, 64, generator=generator).to(torch.bfloat16)
    idx = torch.stack([torch.randperm(experts, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator)
    per_rank, per_domain, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, experts)
    how = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank}
    how["num_tokens_per_expert"] = per_expert
    made = [per_domain]
    rows, _, got_weights, counts, handle, _ = buffer.dispatch(
        x, topk_idx=idx, topk_weights=weights, expert_alignment=4, num_tokens_per_rdma_rank=per_domain, **how
    )
    made += [rows, got_weights, torch.tensor(counts)]
    made += buffer.combine(rows, handle, topk_weights=got_weights, bias=(bias, bias))[:2]
    again = buffer.dispatch(x.flip(0), handle=handle)[0]
    made += [again, buffer.combine(again, handle)[0]]
    fp8 = x.to(torch.float8_e4m3fn), torch.rand(tokens, 2, generator=generator)
    (rows8, scales), idx8, *_ = buffer.dispatch(
        fp8, topk_idx=idx, topk_weights=weights, num_worst_tokens=120, **how
    )
    came = int((idx8 >= 0).any(1).sum())
    made += [rows8[:came].view(torch.uint8), scales[:came], idx8]
    if ctx.rank != 2:  # the others go on without it: rank 3 is the gateway of ranks 0 and 1
        buffer.low_latency_update_mask_buffer(2, True)
        made.append(buffer.combine(rows, handle)[0])
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in made]


def test_the_same_bits_as_the_reference_backend(world_of: Callable[[int], World]) -> None:
    world = world_of(4)
    assert world.run(on_buffer, "emulator") == world.run(on_buffer, "reference")


@pytest.mark.slow
def test_drawn_calls_of_a_buffer_agree_with_the_oracle(world_of: Callable[[int], World]) -> None:
    subject = subjects.buffer(world_of, backend="emulator")
    fixed = {"mode": "ht", "reduce": "domain"}
    limits = Limits(ranks=(3, 4, 8), hidden=(16, 128), masks=0.3, fixed=fixed)
    report = Fuzzer([subject], seed=11, limits=limits).run(examples=60, shrink=False)
    assert report.finding is None, report.finding
