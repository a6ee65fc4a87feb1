"""The low-latency kernels on the emulated machine: the reference's bits, under every schedule tried."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from harness.side_by_side import explore_side_by_side

from deepep import Buffer, _emulator
from deepep.reference import formats, logfmt
from deepep.sim.cases.case import Case
from deepep.sim.cases.options import Options
from deepep.sim.emulator.low_latency import (
    BOTH,
    RECEIVE,
    SEND,
    EmulatedLowLatency,
    LowLatencyCall,
    LowLatencyGpu,
    LowLatencySizes,
    RowCast,
)
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.low_latency import LowLatencyScenario, run
from deepep.sim.explore.low_latency_explorer import LOW_LATENCY_LIMITS, draw_low_latency, explore_low_latency
from deepep.sim.explore.scenarios import Stop, ThreadSchedule

PLAIN = Options(mode="ll", reduce="rank", combine_rows="other")


def scenario_of(topk_idx: list[np.ndarray], num_experts: int, **changes: object) -> LowLatencyScenario:
    """Two round trips of one routing, whose options and launch `changes` names."""
    options = {k: v for k, v in changes.items() if k in Options.__dataclass_fields__}
    launch = {k: v for k, v in changes.items() if k in LowLatencyScenario.__dataclass_fields__}
    case = Case(num_experts, tuple(topk_idx), hidden=128, options=replace(PLAIN, **options)).legal()
    return LowLatencyScenario((case, replace(case, seed=1)), **launch)  # type: ignore[arg-type]


def run_all(scenario: LowLatencyScenario, *, schedules: int = 3, stops: tuple[Stop, ...] = ()) -> None:
    """The scenario under schedules of every strategy."""
    for seed in range(schedules):
        report = run(scenario, draw_schedule(seed), stops=stops)
        assert report.kind == "ok", report.text


def test_drawn_calls_give_the_references_bits() -> None:
    tally = explore_low_latency(runs=60)
    assert tally.failure is None, str(tally.failure)


@pytest.mark.slow
def test_many_drawn_calls_give_the_references_bits() -> None:
    for tally in explore_side_by_side(explore_low_latency, first_seed=1000, runs=600):
        assert tally.failure is None, str(tally.failure)


@pytest.mark.slow
def test_ranks_that_stop_leave_faults_and_nobody_waiting() -> None:
    for tally in explore_side_by_side(explore_low_latency, first_seed=5000, runs=400, with_stops=True):
        assert tally.failure is None, str(tally.failure)
        assert tally.kinds["fault"] > 0


def test_a_stop_is_a_fault_that_names_the_rank() -> None:
    routing = [np.array([[0, 1], [2, 3]]), np.array([[3, 0]])]
    scenario = replace(scenario_of(routing, 4), gpu=LowLatencyGpu(num_blocks=2))
    report = run(scenario, ThreadSchedule(), stops=(Stop(rank=1, at=1),))
    assert report.kind == "fault", report.text
    assert report.faults[0].waited_on == (1,)


def random_routing(
    num_ranks: int, num_experts: int, num_topk: int, tokens: int, seed: int
) -> list[np.ndarray]:
    """Entries from -1 on, with duplicates; the last rank has no tokens if there are several."""
    rng = np.random.default_rng(seed)
    counts = [tokens] * num_ranks
    if num_ranks > 1:
        counts[-1] = 0
    return [rng.integers(-1, num_experts, (count, num_topk)) for count in counts]


@pytest.mark.parametrize("low_latency", ["bf16", "fp8", "fp8+rounded", "fp8+ue8m0"])
@pytest.mark.parametrize("values", ["normal", "nonfinite", "zeros"])
def test_formats_and_values(low_latency: str, values: str) -> None:
    routing = random_routing(2, 4, 3, 4, seed=2)
    run_all(scenario_of(routing, 4, low_latency=low_latency, values=values, carries_weights=True))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("values", ["normal", "nonfinite", "zeros"])
def test_values_where_every_row_returns(values: str, hooked: bool) -> None:
    routing = random_routing(3, 6, 5, 4, seed=3)
    for carries_weights in (False, True):
        how = {"hooked": hooked, "carries_weights": carries_weights, "own_stretches": hooked}
        run_all(scenario_of(routing, 6, reduce="token", values=values, **how))


#: Where a combine sums: at experts' ranks first, without and with weights that travel; at the token alone.
SUMS = (
    {"reduce": "rank", "carries_weights": False},
    {"reduce": "rank", "carries_weights": True},
    {"reduce": "token", "carries_weights": False},
)


@pytest.mark.parametrize("num_topk", [1, 31, 32])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("sums", SUMS)
def test_widths_of_topk(num_topk: int, hooked: bool, sums: dict[str, object]) -> None:
    routing = random_routing(2, 64, num_topk, 3, seed=num_topk)
    run_all(scenario_of(routing, 64, values="normal", hooked=hooked, **sums))


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8])
@pytest.mark.parametrize("reduce", ["rank", "token"])
def test_numbers_of_ranks(num_ranks: int, reduce: str) -> None:
    routing = random_routing(num_ranks, 2 * num_ranks, 4, 3, seed=num_ranks)
    run_all(scenario_of(routing, 2 * num_ranks, values="normal", spare_slots=2, reduce=reduce), schedules=2)


@pytest.mark.parametrize("spoils", ["dispatch", "shape", "combine", "indices", "elsewhere", "logfmt"])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("sums", SUMS)
def test_a_rank_that_spoils_a_call_stops_all_and_nothing_else(
    spoils: str, hooked: bool, sums: dict[str, object]
) -> None:
    routing = random_routing(3, 6, 2, 3, seed=5)
    run_all(scenario_of(routing, 6, spoils=spoils, hooked=hooked, **sums))


@pytest.mark.parametrize("hooked", [False, True])
def test_calls_that_all_ranks_make_by_other_means_are_no_fault(hooked: bool) -> None:
    routing = random_routing(3, 6, 2, 3, seed=6)
    run_all(scenario_of(routing, 6, spoils="meeting", hooked=hooked))


@pytest.mark.parametrize("carries_weights", [False, True])
def test_some_or_all_have_no_token(carries_weights: bool) -> None:
    """Arrays of nothing lie at address 0: that says nothing about the call."""
    none = np.zeros((0, 2), dtype=np.int64)
    run_all(scenario_of([none] * 3, 3, carries_weights=carries_weights))
    run_all(scenario_of([none, np.array([[0, 2]]), none], 3, carries_weights=carries_weights))


def combine_sent_by(ranks: tuple[int, ...], *, carries_weights: bool = False, exact: bool = False) -> str:
    """Outcome when these of two ranks launch the send half of a combine, each with rows of both."""
    gpu = LowLatencyGpu(num_blocks=2)
    machine = _emulator.Machine(
        num_ranks=2,
        copy_engines=False,
        max_blocks=gpu.num_blocks,
        max_threads=gpu.num_threads,
        strategy="random",
        seed=1,
        max_steps=10**9,
    )
    sizes = LowLatencySizes(1, 2, 1, 128, entry_stretches=1 if exact else 0)
    domain = EmulatedLowLatency(machine, _emulator.own_kernels(), gpu, 2, sizes)
    call = LowLatencyCall(torch.tensor([[0], [1]]), torch.ones(2, 1), 2, 1, 128, carries_weights, exact=exact)
    handles = [domain.new_handle(rank, call) for rank in range(2)]
    for rank, handle in enumerate(handles):
        args, _ = domain.dispatch(rank, call, RowCast(), torch.ones(2, 128).bfloat16(), handle)
        domain.launch_dispatch(rank, args, BOTH)
    assert machine.run().status == "done"
    for rank in ranks:
        args, _ = domain.combine(rank, call, torch.ones(1, 4, 128).bfloat16(), handles[rank])
        domain.launch_combine(rank, args, SEND)
    outcome = machine.run()
    return "done" if outcome.status == "done" else str(outcome.text)


def test_a_hooked_combine_sends_alone_if_its_dispatch_carried_the_weights() -> None:
    """Else its send half waits for the send halves of the other ranks, and for nothing more."""
    assert combine_sent_by((0,), carries_weights=True) == "done"
    assert "low_latency_combine_send" in combine_sent_by((0,), carries_weights=False)
    assert combine_sent_by((0, 1), carries_weights=False) == "done"


def test_a_hooked_combine_sends_alone_if_every_row_returns() -> None:
    """No weight travels then."""
    assert combine_sent_by((0,), exact=True) == "done"


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("carries_weights", [False, True])
def test_wait_statistics_are_of_the_ranks_that_come_late(
    hooked: bool, exact: bool, carries_weights: bool
) -> None:
    """Simulated time: rank 2 is late by a fifth of a second in the dispatch, and in time in the combine."""
    late = 200_000_000
    gpu = LowLatencyGpu(num_blocks=2)
    machine = _emulator.Machine(
        num_ranks=3,
        max_blocks=2,
        max_threads=gpu.num_threads,
        strategy="random",
        seed=3,
        max_steps=10**9,
        faults=[_emulator.MachineFault(rank=2, at=1, counts_writes=False, pause_ns=late, loses_writes=False)],
    )
    domain = EmulatedLowLatency(
        machine, _emulator.own_kernels(), gpu, 3, LowLatencySizes(1, 2, 2, 128, 1 if exact else 0)
    )
    call = LowLatencyCall(
        torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), 2, 1, 128, carries_weights, exact=exact
    )
    handles = [domain.new_handle(rank, call) for rank in range(3)]
    for rank, handle in enumerate(handles):
        domain.measure_waits(rank)
        args, _ = domain.dispatch(rank, call, RowCast(), torch.ones(2, 128).bfloat16(), handle)
        for halves in (SEND, RECEIVE) if hooked else (BOTH,):
            domain.launch_dispatch(rank, args, halves)
    assert machine.run().status == "done"
    after_dispatch = [domain.read_waits(rank) for rank in range(3)]
    for rank, waits in enumerate(after_dispatch):
        assert waits[rank] == 0
    for rank in (0, 1):
        # While all only look, time passes in jumps, each up to twice the one before.
        assert late * 0.9 < after_dispatch[rank][2] < late * 2
        assert after_dispatch[rank][1 - rank] < late * 0.1
    assert max(after_dispatch[2]) < late * 0.1  # the late one waits least
    for rank, handle in enumerate(handles):
        args, _ = domain.combine(rank, call, torch.ones(1, 6, 128).bfloat16(), handle)
        for halves in (SEND, RECEIVE) if hooked else (BOTH,):
            domain.launch_combine(rank, args, halves)
    assert machine.run().status == "done"
    for rank in range(3):
        more = [b - a for a, b in zip(after_dispatch[rank], domain.read_waits(rank), strict=True)]
        assert 0 < sum(more) < late * 0.2
        assert more[rank] == 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_domain_sums_as_its_memory_was_made_for(exact: bool) -> None:
    gpu = LowLatencyGpu(num_blocks=1)
    machine = _emulator.Machine(num_ranks=1, max_blocks=1, max_threads=64, strategy="random", seed=1)
    sizes = LowLatencySizes(1, 2, 1, 128, entry_stretches=1 if exact else 0)
    domain = EmulatedLowLatency(machine, _emulator.own_kernels(), gpu, 1, sizes)
    call = LowLatencyCall(torch.tensor([[0]]), torch.ones(1, 1), 2, 1, 128, exact=not exact)
    args, _ = domain.combine(0, call, torch.ones(1, 2, 128).bfloat16(), domain.new_handle(0, call))
    with pytest.raises(ValueError, match="a sum that the buffer was not made for"):
        domain.launch_combine(0, args, BOTH)


def test_many_operations_in_a_row() -> None:
    """More than there are epochs of slots, along one handle and along new ones."""
    limits = replace(LOW_LATENCY_LIMITS, max_tokens=3, max_topk=3, masks=0.0)
    for seed in range(3):
        scenario = replace(draw_low_latency(seed, limits=limits, num_cases=6), num_combines=4, spoils="")
        run_all(scenario, schedules=2)


def test_the_cast_to_e4m3_is_the_references() -> None:
    """Every bf16, and float32 around every boundary between two values of e4m3."""
    every_bf16 = torch.arange(0, 1 << 16, dtype=torch.int32) << 16
    values = torch.arange(0, 256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = values[values.isfinite()].sort().values
    edges = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.tensor([463.9, -463.9])])
    around = (edges.view(torch.int32).unsqueeze(1) + torch.arange(-3, 4, dtype=torch.int32)).flatten()
    floats = torch.cat([every_bf16, around]).view(torch.float32)
    floats = floats[floats.isnan() | (floats.abs() < 464)]  # torch's cast does not saturate
    expected = floats.to(torch.float8_e4m3fn).view(torch.uint8)
    expected[floats.isnan()] = formats.E4M3_NAN
    got = _emulator.cast_to_e4m3(floats.numpy().tobytes())
    assert list(got) == expected.tolist()


def test_logfmt_in_the_kernels_is_the_references() -> None:
    """Codes of every bf16 below 1 and values of every code, in float32, in groups of all sorts."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.randint(0, 0x3F80, (300, 2), generator=generator).sort(1, descending=True).values
    ends = torch.cat(
        [ends[ends[:, 0] > ends[:, 1]], ends.new_tensor([[1, 0], [2, 1], [0x3F7F, 0], [127, 3]])]
    )
    bits = torch.arange(0x3F80, dtype=torch.int32)
    both = torch.cat([bits, bits + 0x8000]).to(torch.int16)
    for largest, smallest in ends.tolist():
        inside = (bits[smallest : largest + 1] | 0).to(torch.int16)
        inside = torch.cat([inside, both[(both & 0x7FFF >= smallest) & (both & 0x7FFF <= largest)]])
        spare = -inside.numel() % (logfmt.GROUP - 2)
        rows = torch.cat([inside, inside[:1].expand(spare)]).unflatten(0, (-1, logfmt.GROUP - 2))
        rows = torch.cat([rows, rows.new_tensor([[largest, smallest]]).expand(len(rows), 2)], 1)
        codes, meta, qualifies = logfmt.logfmt_encode(rows.contiguous().view(torch.bfloat16))
        assert qualifies.all()
        word = smallest << 16 | largest
        got = _emulator.logfmt_codes(rows.contiguous().numpy().tobytes(), word)
        assert got == codes.contiguous().numpy().tobytes(), ends
        every = torch.arange(1024, dtype=torch.int16).view(8, 128)
        values = logfmt.logfmt_decode(every, meta[:1].expand(8, 1, 2))
        assert _emulator.logfmt_values(every.numpy().tobytes(), word) == values.numpy().tobytes(), ends


#: H and the channels of a chunk: whole and short ones, of one unit or two, and short units.
WIDTHS = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1536, 2048, 3072)


@pytest.mark.parametrize("reduce", ["rank", "token"])
@pytest.mark.parametrize("hidden", WIDTHS)
def test_logfmt_of_any_width(hidden: int, reduce: str) -> None:
    routing = random_routing(3, 6, 7, 3, seed=hidden)
    for hooked in (False, True):
        scenario = scenario_of(routing, 6, values="normal", reduce=reduce, logfmt=True, hooked=hooked)
        cases = tuple(replace(case, hidden=hidden) for case in scenario.cases)
        run_all(replace(scenario, cases=cases), schedules=1)


@pytest.mark.parametrize("reduce", ["rank", "token"])
@pytest.mark.parametrize("values", ["nonfinite", "zeros", "ids"])
def test_logfmt_of_values_that_do_not_qualify(values: str, reduce: str) -> None:
    routing = random_routing(3, 6, 3, 3, seed=8)
    run_all(scenario_of(routing, 6, values=values, reduce=reduce, logfmt=True))


@pytest.mark.parametrize("reduce", ["rank", "token"])
@pytest.mark.parametrize("num_ranks", [1, 2, 7])
def test_logfmt_between_ranks(num_ranks: int, reduce: str) -> None:
    """More ranks, and more entries of a token, than are read at once; -1 and duplicates among them."""
    routing = random_routing(num_ranks, 2 * num_ranks, 9, 3, seed=num_ranks)
    for carries_weights in (False, True):
        run_all(
            scenario_of(
                routing,
                2 * num_ranks,
                values="normal",
                reduce=reduce,
                logfmt=True,
                carries_weights=carries_weights,
                own_stretches=carries_weights,
            ),
            schedules=2,
        )


@pytest.mark.parametrize("spoils", ["combine", "indices", "elsewhere", "logfmt", "meeting"])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("sums", SUMS)
def test_a_rank_that_spoils_a_combine_in_logfmt(spoils: str, hooked: bool, sums: dict[str, object]) -> None:
    routing = random_routing(3, 6, 2, 3, seed=5)
    run_all(scenario_of(routing, 6, spoils=spoils, hooked=hooked, logfmt=True, **sums))


def test_logfmt_takes_whole_groups_alone() -> None:
    gpu = LowLatencyGpu(num_blocks=1)
    machine = _emulator.Machine(num_ranks=1, max_blocks=1, max_threads=64, strategy="random", seed=1)
    domain = EmulatedLowLatency(machine, _emulator.own_kernels(), gpu, 1, LowLatencySizes(1, 2, 1, 136))
    call = LowLatencyCall(torch.tensor([[0]]), torch.ones(1, 1), 2, 1, 136, logfmt=True)
    args, _ = domain.combine(0, call, torch.ones(1, 2, 136).bfloat16(), domain.new_handle(0, call))
    with pytest.raises(ValueError, match="whole groups of 128"):
        domain.launch_combine(0, args, BOTH)


@pytest.mark.parametrize("num_topk", [8, 32])
def test_memory_is_proportional_to_ranks_and_tokens(num_topk: int) -> None:
    """H = 7168, EP8: a message and a row that returns, for two epochs, of each token of each rank.

    Words, flags and headers take less than a twentieth more; the experts, next to nothing.
    """

    def num_bytes(ranks: int, experts: int, tokens: int) -> int:
        size, control = _emulator.low_latency_bytes(ranks, experts // ranks, tokens, num_topk, 2 * 7168)
        assert 0 < control < 0.05 * size
        return int(size)

    asked = num_bytes(8, 288, 128)
    rows = 4 * 8 * 128 * (2 * 7168)
    assert rows < asked <= min(64 * 10**6, 1.05 * rows)
    assert asked < 0.03 * Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288), "DeepEP's"
    for ranks, tokens in ((16, 128), (8, 256)):
        assert num_bytes(ranks, 288, tokens) == pytest.approx(2 * asked, rel=0.001)
    assert num_bytes(8, 1024, 128) == pytest.approx(asked, rel=0.001)


@pytest.mark.parametrize("stretches", [1, 8])
def test_rows_of_entries_take_memory_by_topk(stretches: int) -> None:
    """A message of each token of each rank, and a row of each entry, once or for each source; two epochs."""
    size, _ = _emulator.low_latency_bytes(8, 36, 128, 8, 2 * 7168, stretches)
    rows = 2 * 128 * (8 + 8 * stretches) * (2 * 7168)
    assert rows < size < 1.05 * rows


@pytest.mark.parametrize("plain", [(0,), (0, 1, 2)], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("hooked", [False, True])
def test_gpus_without_bulk_copies_give_the_same_bits(plain: tuple[int, ...], hooked: bool) -> None:
    """Groups of different compute capabilities, and of 8.0 alone."""
    routing = random_routing(3, 6, 4, 4, seed=8)
    gpu = LowLatencyGpu(plain_copies=plain)
    run_all(scenario_of(routing, 6, values="normal", low_latency="fp8", hooked=hooked, gpu=gpu))
