"""Low latency between domains that share no memory: the kernels on the emulator, the reference's bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from harness.side_by_side import explore_side_by_side

from deepep import _emulator
from deepep.sim import RankContext, World
from deepep.sim.cases.case import Case
from deepep.sim.cases.options import Options
from deepep.sim.emulator.low_latency import (
    BOTH,
    SEND,
    LowLatencyCall,
    LowLatencyGpu,
    LowLatencySizes,
    RowCast,
)
from deepep.sim.emulator.low_latency_far import EmulatedFarLowLatency, far_network, far_shape
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.low_latency import LowLatencyRun, LowLatencyScenario, run
from deepep.sim.explore.low_latency_explorer import draw_far_low_latency, explore_low_latency
from deepep.sim.explore.scenarios import Stop, ThreadSchedule


def test_drawn_calls_give_the_references_bits() -> None:
    tally = explore_low_latency(runs=16, schedules_per_scenario=1, scenarios=draw_far_low_latency)
    assert tally.failure is None, str(tally.failure)


@pytest.mark.slow
def test_many_drawn_calls_give_the_references_bits() -> None:
    how = {"first_seed": 1000, "runs": 600, "scenarios": draw_far_low_latency}
    for tally in explore_side_by_side(explore_low_latency, **how):
        assert tally.failure is None, str(tally.failure)


@pytest.mark.slow
def test_ranks_that_stop_leave_faults_and_nobody_waiting() -> None:
    how = {"first_seed": 5000, "runs": 400, "with_stops": True, "scenarios": draw_far_low_latency}
    for tally in explore_side_by_side(explore_low_latency, **how):
        assert tally.failure is None, str(tally.failure)
        assert tally.kinds["fault"] > 0


def between(num_ranks: int, per_domain: int, *, tokens: int = 3, **changes: object) -> LowLatencyScenario:
    """Two round trips; the last rank has no tokens. `changes` names options and the launch."""
    rng = np.random.default_rng(num_ranks)
    experts = 2 * num_ranks
    routing = [rng.integers(-1, experts, (tokens if r < num_ranks - 1 else 0, 3)) for r in range(num_ranks)]
    options = {k: v for k, v in changes.items() if k in Options.__dataclass_fields__}
    launch = {k: v for k, v in changes.items() if k in LowLatencyScenario.__dataclass_fields__}
    plain = Options(mode="ll", reduce="rank", combine_rows="other", values="normal")
    hidden = changes.get("hidden", 128)
    case = Case(experts, tuple(routing), hidden=hidden, options=replace(plain, **options)).legal()
    cases = (case, replace(case, seed=1))
    return LowLatencyScenario(cases, ranks_per_domain=per_domain, **launch)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 1), (4, 2), (8, 4), (5, 3)])
@pytest.mark.parametrize("hooked", [False, True])
def test_domains(shape: tuple[int, int], hooked: bool) -> None:
    report = run(between(*shape, hooked=hooked), draw_schedule(shape[0] + hooked))
    assert report.kind == "ok", report.text


@pytest.mark.parametrize("low_latency", ["fp8", "fp8+rounded", "fp8+ue8m0"])
@pytest.mark.parametrize("carries_weights", [False, True])
def test_formats(low_latency: str, carries_weights: bool) -> None:
    scenario = between(3, 2, low_latency=low_latency, carries_weights=carries_weights, values="nonfinite")
    report = run(scenario, draw_schedule(carries_weights))
    assert report.kind == "ok", report.text


@pytest.mark.parametrize("reduce", ["rank", "token"])
@pytest.mark.parametrize("logfmt", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_ways_for_rows_to_go_back(reduce: str, logfmt: bool, hooked: bool) -> None:
    """Chunks of two units, of one, and a last unit that is shorter; some can be encoded, some cannot."""
    for hidden, values in ((1024, "normal"), (640, "ids"), (128, "nonfinite")):
        how = {"reduce": reduce, "logfmt": logfmt, "hidden": hidden, "values": values}
        report = run(between(3, 1 + hooked, hooked=hooked, **how), draw_schedule(hidden + logfmt))
        assert report.kind == "ok", f"{how}: {report.text}"


@pytest.mark.parametrize("spoils", ["dispatch", "shape", "combine", "indices", "elsewhere", "meeting"])
def test_a_rank_that_spoils_a_call_stops_all_and_nothing_else(spoils: str) -> None:
    """A rank of another domain learns it from the same put as anything else."""
    for hooked in (False, True):
        scenario = between(3, 1, tokens=2, spoils=spoils, hooked=hooked)
        report = run(scenario, draw_schedule(hooked + 2))
        assert report.kind == "ok", report.text


def test_a_stop_is_a_fault_that_names_the_rank() -> None:
    report = run(between(3, 2), ThreadSchedule(), stops=(Stop(rank=2, at=1),))
    assert report.kind == "fault", report.text
    assert report.faults[0].waited_on == report.faults[1].waited_on == (2,)


@pytest.mark.parametrize("carries_weights", [False, True])
def test_a_token_crosses_once_a_rank_and_a_sum_comes_back(carries_weights: bool) -> None:
    """Counted where puts are made: nothing crosses but one put a call, and two of a combine."""
    scenario = between(4, 2, tokens=7, carries_weights=carries_weights)
    ran = LowLatencyRun(scenario, ThreadSchedule(), (), _emulator.own_kernels(), 5_000_000)
    report = ran.run()
    assert report.kind == "ok", report.text
    case = scenario.cases[0]
    local, num_topk = case.num_local_experts, case.num_topk
    words = -(-8 * (1 + -(-case.num_max_tokens // 32) + local) // 16) * 16
    message = -(-8 * num_topk // 16) * 16 + 2 * case.hidden
    # [source, destination]: tokens that have an expert there
    goes = [[(idx // local == d).any(axis=1).sum() for d in range(4)] for idx in map(np.array, case.topk_idx)]
    for rank in range(4):
        for peer in range(4):
            out, back = int(goes[rank][peer]), int(goes[peer][rank])
            weights = 0 if carries_weights else 4 * num_topk * out
            once = words + out * message + 16 + weights + 16 + back * 2 * case.hidden
            is_far = rank // 2 != peer // 2
            assert ran.machine.put_bytes(rank, peer) == (2 * once if is_far else 0)


@pytest.mark.parametrize("values", ["normal", "zeros"])
def test_rows_in_logfmt_cross_in_fewer_bytes_where_they_can(values: str) -> None:
    """Of zeros nothing is encoded: a row crosses with its metadata and words, but without gaps."""
    put = []
    for logfmt in (False, True):
        scenario = between(2, 1, tokens=5, logfmt=logfmt, hidden=1024, values=values, carries_weights=True)
        ran = LowLatencyRun(scenario, ThreadSchedule(), (), _emulator.own_kernels(), 5_000_000)
        assert ran.run().kind == "ok"
        put.append(ran.machine.put_bytes(1, 0))
    case = scenario.cases[0]
    rows = int((np.array(case.topk_idx[0]) // case.num_local_experts == 1).any(axis=1).sum())
    plain, encoded = 2 * 1024, 4 * (8 + 2) + 2 * 1024 * 10 // 16
    more = (put[1] - put[0]) / (2 * rows)  # a row, of two combines
    assert more == 4 * (8 + 2) if values == "zeros" else encoded - plain <= more < 0


@pytest.mark.parametrize("shape", [(64, 8, 4, 128, 8, 7168), (5, 3, 2, 33, 31, 136), (2, 1, 7, 1, 1, 8)])
def test_memory_is_what_the_page_says(shape: tuple[int, ...]) -> None:
    """docs/low_latency.md has the rule, and the first of these shapes."""
    num_ranks, per_domain, local, most, num_topk, hidden = shape
    made = far_shape(num_ranks, per_domain, LowLatencySizes(local, most, num_topk, hidden))
    far = num_ranks - (num_ranks % per_domain or per_domain)
    in_logfmt = hidden // 32 + 4 * -(-hidden // 512) if hidden % 128 == 0 else 0
    each = 8 * (1 + -(-most // 32) + local) + most * (12 * num_topk + 4 * hidden + in_logfmt) + 32
    assert 0 <= made.remote_bytes - 4 * far * each <= 4 * far * (3 * 128 + 32 * most)
    assert shape[0] != 64 or round(made.remote_bytes / 1e6) == 833
    offsets = [offset for offset, _ in made.signals(0)]
    assert len(set(offsets)) == 6 * far
    assert max(offsets) < made.control_bytes


def far_pair(
    gpu: LowLatencyGpu, carries_weights: bool, **machine: object
) -> tuple[EmulatedFarLowLatency, list]:
    """Two ranks, each a domain, behind a dispatch of a token to each; and their handles."""
    sizes = LowLatencySizes(1, 2, 1, 128)
    made = _emulator.Machine(
        num_ranks=2,
        max_blocks=gpu.num_blocks,
        max_threads=gpu.num_threads,
        strategy="random",
        seed=1,
        max_steps=10**9,
        **(far_network(2, 1, sizes) | machine),
    )
    domain = EmulatedFarLowLatency(made, _emulator.own_kernels(), gpu, 2, sizes, ranks_per_domain=1)
    handles = []
    for rank in range(2):
        call = pair_call(carries_weights)
        handles.append(domain.new_handle(rank, call))
        domain.measure_waits(rank)
        args, _ = domain.dispatch(rank, call, RowCast(), torch.ones(2, 128).bfloat16(), handles[rank])
        domain.launch_dispatch(rank, args, BOTH)
    return domain, handles


def pair_call(carries_weights: bool) -> LowLatencyCall:
    return LowLatencyCall(torch.tensor([[0], [1]]), torch.ones(2, 1), 2, 1, 128, carries_weights)


def test_a_hooked_combine_sends_alone_if_its_dispatch_carried_the_weights() -> None:
    for carries_weights in (True, False):
        domain, handles = far_pair(LowLatencyGpu(), carries_weights)
        assert domain.machine.run().status == "done"
        call = pair_call(carries_weights)
        args, _ = domain.combine(0, call, torch.ones(1, 4, 128).bfloat16(), handles[0])
        domain.launch_combine(0, args, SEND)
        assert (domain.machine.run().status == "done") == carries_weights


def test_waits_are_of_the_rank_that_comes_late() -> None:
    """Simulated time: rank 1 is late by a fifth of a second."""
    late = 200_000_000
    fault = _emulator.MachineFault(rank=1, at=1, counts_writes=False, pause_ns=late, loses_writes=False)
    domain, _ = far_pair(LowLatencyGpu(), True, faults=[fault])
    assert domain.machine.run().status == "done"
    assert domain.read_waits(0)[1] > 0.9 * late
    assert domain.read_waits(1)[0] < 0.1 * late


def test_halves_that_overlap_open_no_more_puts_than_the_protocol_may() -> None:
    """A machine that allows fewer says so: rank 0 sends a combine while its dispatch's put is under way."""
    kinds = set()
    for seed in range(4):
        scenario = between(2, 1, hooked=True, carries_weights=True, num_combines=3)
        assert run(scenario, draw_schedule(seed)).kind == "ok"
        ran = LowLatencyRun(
            scenario, draw_schedule(seed), (), _emulator.own_kernels(), 5_000_000, max_open_puts=1
        )
        kinds.add(ran.run().kind)
    assert "too many open puts" in kinds


def decode_steps(ctx: RankContext, backend: str) -> list[bytes]:
    """The bits of dispatches and combines: BF16 and FP8, hooked or not, then without rank 3."""
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
    num_tokens = 5 - ctx.rank
    x = torch.randn(num_tokens, 128, generator=generator).to(torch.bfloat16)
    idx = torch.randint(-1, 8, (num_tokens, 3), generator=generator)
    weights = torch.rand(num_tokens, 3, generator=generator)
    made = []
    for step in range(3):
        if step == 2:
            if ctx.rank == 3:
                break
            buffer.low_latency_update_mask_buffer(3, True)
        hooked = step == 0
        rows, count, handle, _, hook = buffer.low_latency_dispatch(
            *(x, idx, 6, 8),
            use_fp8=step == 1,
            return_recv_hook=hooked,
            topk_weights=weights if step == 0 else None,
        )
        if hook is not None:
            hook()
        values = rows if step != 1 else rows[0].float().mul(0.5).to(torch.bfloat16)
        made += [count, handle.recv_src_info]
        made += [values[expert, :number] for expert, number in enumerate(count.tolist())]
        for logfmt in (False, True):
            sums, _, hook = buffer.low_latency_combine(
                *(values.clone(), idx, weights, handle), return_recv_hook=hooked, use_logfmt=logfmt
            )
            if hook is not None:
                hook()
            made.append(sums)
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in made]


def test_the_same_bits_as_the_reference_backend(world_of: Callable[[int], World]) -> None:
    world = world_of(4)
    assert world.run(decode_steps, "emulator") == world.run(decode_steps, "reference")
