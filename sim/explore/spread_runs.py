"""Dispatches that spread rows as they come, on the emulated machine: drawn calls, each under one schedule.

Judged against the oracle, two calls one after the other into other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepep import _emulator
from deepep.reference import elastic as oracle
from deepep.reference.layout import align_up
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.emulator import expanded
from deepep.sim.emulator.calls import DispatchCall, Expansion, Gpu
from deepep.sim.emulator.domain import EmulatedDomain
from deepep.sim.emulator.expanded import places_bytes
from deepep.sim.emulator.shapes import GPUS
from deepep.sim.explore.case_runs import CaseTally, explore_cases
from deepep.sim.explore.scenarios import RunReport, Stop, ThreadSchedule

#: One block or two that push, one or two that spread, more blocks than SMs.
SHAPES = (GPUS[0], GPUS[3], GPUS[4], GPUS[5])


@dataclass(frozen=True)
class SpreadCase:
    """Two dispatches. tokens: of each rank. worst: rows that a host hands out without a wait; 0: it waits.

    short: so many expanded rows fewer than there are. spreads: by rank, all if empty. is_again: as a dispatch
    along an earlier one's route: no host waits, and there is memory for just what comes.
    """

    tokens: tuple[int, ...] = (5, 9)
    hidden: int = 16
    topk: int = 3
    local_experts: int = 3
    alignment: int = 4
    num_scales: int = 0
    column_major: bool = False
    zero_padding: bool = True
    worst: int = 0
    short: int = 0
    spreads: tuple[bool, ...] = ()
    is_again: bool = False
    index_bytes: int = 8
    has_duplicates: bool = False
    num_calls: int = 2
    gpu: Gpu = SHAPES[0]
    seed: int = 0

    @property
    def num_experts(self) -> int:
        """E."""
        return self.local_experts * len(self.tokens)


def draw_spread(seed: int) -> SpreadCase:
    """Few tokens mostly; every fifth, several groups that are numbered together. Of its argument alone."""
    choices = RandomChoices(seed)
    ranks = choices.pick((1, 2, 2, 2, 3))
    most = 140 if seed % 5 == 4 else 7
    gpu = SHAPES[seed % len(SHAPES)]
    if ranks == 1:
        gpu = replace(gpu, push_blocks=0, local_blocks=gpu.num_blocks)
    tokens = tuple(choices.integer(0, most) for _ in range(ranks))
    local, topk = choices.pick((1, 2, 3, 4, 40)), choices.integer(1, 4)
    has_duplicates = topk > local * ranks or choices.pick((True, False))
    return SpreadCase(
        tokens=tokens,
        hidden=8 * choices.pick((1, 2, 17)) if most == 7 else 8,
        topk=topk,
        local_experts=local,
        alignment=choices.pick((1, 3, 4)),
        num_scales=choices.pick((0, 1, 4)),
        column_major=choices.pick((True, False)),
        zero_padding=choices.pick((True, False)),
        worst=choices.pick((0, 0, max(1, sum(tokens)))),
        short=choices.pick((0, 0, 1, 9)),
        spreads=tuple(choices.pick((True, True, True, False)) for _ in tokens),
        index_bytes=choices.pick((4, 8)),
        has_duplicates=has_duplicates,
        gpu=gpu,
        seed=seed,
    )


def draw_inputs(case: SpreadCase, number: int) -> list[oracle.ElasticInput]:
    """The arguments of all ranks in the case's call of that number; some entries name no expert."""
    made, random = [], torch.Generator(device="cpu").manual_seed(1000 * case.seed + number)
    for tokens in case.tokens:
        shape = (tokens, case.topk)
        if case.has_duplicates:
            idx = torch.randint(0, case.num_experts, shape, generator=random, device="cpu")
        else:
            idx = (
                torch.rand(tokens, case.num_experts, generator=random, device="cpu")
                .topk(case.topk, 1)
                .indices
            )
        idx = idx.masked_fill(torch.rand(shape, generator=random, device="cpu") < 0.2, -1)
        bits = torch.randint(-(2**15), 2**15, (tokens, case.hidden), generator=random, device="cpu")
        scales = (
            torch.rand(tokens, case.num_scales, generator=random, device="cpu") if case.num_scales else None
        )
        made.append(
            oracle.ElasticInput(
                bits.to(torch.int16).view(torch.bfloat16),
                idx.to(torch.int32 if case.index_bytes == 4 else torch.int64),
                torch.rand(shape, generator=random, device="cpu"),
                scales,
            )
        )
    return made


def run_spread(case: SpreadCase, schedule: ThreadSchedule, kernels: Any = None) -> RunReport:
    """The case's calls, and a look at what each leaves."""
    machine, report, domain = _machine(case, schedule), RunReport(), None
    for number in range(case.num_calls):
        calls, wanted = _calls(case, number)
        try:
            domain = domain or _domain(case, machine, calls, kernels)
            watched = _launch(machine, domain, calls, report)
            if watched is None:
                return report
            for rank, (call, want) in enumerate(zip(calls, wanted, strict=True)):
                problem = _problem(domain, rank, call, want, watched)
                if problem:
                    report.kind, report.text = (
                        "wrong result",
                        f"{case}, call {number}, rank {rank}: {problem}",
                    )
                    return report
            machine.meet()
        except _emulator.HostFailure as error:
            report.kind, _, report.text = str(error).partition("\n")
            return report
    return report


def run_stopped(case: SpreadCase, schedule: ThreadSchedule, stop: Stop, kernels: Any = None) -> RunReport:
    """One call without host wait in which a rank stops. The others end: who has a fault missed that one only,
    and none has a slot that is no row, which a combine behind would read.
    """
    machine, report = _machine(case, schedule, stop), RunReport()
    calls, _ = _calls(case, 0)
    assert case.worst
    try:
        domain = _domain(case, machine, calls, kernels)
        for rank, call in enumerate(calls):
            marks, plan = domain.layout_inside(rank, len(call.x)), domain.new_plan(rank, len(call.x))
            domain.dispatch(rank, call, marks, plan)
        outcome = machine.run()
        if outcome.status == "failed":
            report.kind, report.text = outcome.kind, outcome.text
            return report
        for rank, call in enumerate(calls):
            fault = None if rank == stop.rank else domain.take_fault(rank)
            if fault is None:
                continue
            report.kind, report.faults[rank] = "fault", fault
            shape = (case.worst, case.topk)
            slots = domain.read(rank, domain.expanded[rank].slots, torch.int64, shape)
            assert call.expansion is not None
            if set(fault.waited_on) != {stop.rank}:
                report.kind, report.text = "wrong result", f"rank {rank} missed {fault.waited_on}"
            elif bool(((slots < -1) | (slots >= call.expansion.capacity)).any()):
                report.kind, report.text = "wrong result", f"rank {rank}: slots {slots.tolist()}"
            if report.failed:
                return report
    except _emulator.HostFailure as error:
        report.kind, _, report.text = str(error).partition("\n")
    return report


def _machine(case: SpreadCase, schedule: ThreadSchedule, *stops: Stop) -> Any:
    return _emulator.Machine(
        num_ranks=len(case.tokens),
        max_blocks=case.gpu.num_blocks,
        max_threads=case.gpu.num_threads,
        num_sms=case.gpu.num_sms,
        strategy=schedule.strategy,
        seed=schedule.seed,
        expected_steps=schedule.expected_steps,
        max_steps=20_000_000,
        faults=[
            _emulator.MachineFault(rank=stop.rank, at=stop.at, counts_writes=stop.counts_writes)
            for stop in stops
        ],
    )


def _calls(case: SpreadCase, number: int) -> tuple[list[DispatchCall], list[oracle.ElasticOutput]]:
    """The call of that number of every rank, and what the oracle gives for it."""
    given = draw_inputs(case, number)
    most = max(1, *case.tokens)
    wanted = oracle.dispatch(
        given, case.num_experts, num_max_tokens=most, alignment=case.alignment, expand=True
    )
    return [_call(case, rank, *both) for rank, both in enumerate(zip(given, wanted, strict=True))], wanted


def _domain(case: SpreadCase, machine: Any, calls: list[DispatchCall], kernels: Any) -> EmulatedDomain:
    slot_bytes = max(call.slot.num_bytes + places_bytes(call) for call in calls)
    return EmulatedDomain(
        machine,
        kernels or _emulator.own_kernels(),
        case.gpu,
        num_ranks=len(case.tokens),
        max_local_experts=case.local_experts,
        staging_rows=0,
        row_bytes=2 * case.hidden,
        slot_bytes=align_up(slot_bytes, 128),
    )


def _call(
    case: SpreadCase, rank: int, given: oracle.ElasticInput, want: oracle.ElasticOutput
) -> DispatchCall:
    room = max(1, case.worst or sum(case.tokens))
    rows = want.num_rows
    if case.worst:
        rows = align_up(room * case.topk + (case.alignment - 1) * case.local_experts, case.alignment)
    worst = case.worst
    if case.is_again:
        room = worst = max(1, want.rank_ends[-1])
        rows = max(1, want.num_rows)
    if case.short:
        rows = max(0, want.num_rows - case.short)
    return DispatchCall(
        x=given.x,
        num_local_experts=case.local_experts,
        capacity=room,
        live=tuple(range(len(case.tokens))),
        scales=given.scales,
        topk_idx=given.topk_idx,
        topk_weights=given.topk_weights,
        num_worst_tokens=worst,
        by_topk=True,
        expansion=Expansion(
            rows,
            case.alignment,
            case.column_major,
            case.zero_padding,
            spreads=not case.spreads or case.spreads[rank],
        ),
    )


def _launch(
    machine: Any, domain: EmulatedDomain, calls: list[DispatchCall], report: RunReport
) -> dict[int, tuple[int, list[int]]] | None:
    """By rank, the slot it received in and the words that its host has seen; None where it failed."""
    slots = [
        domain.dispatch(
            rank, call, domain.layout_inside(rank, len(call.x)), domain.new_plan(rank, len(call.x))
        )
        for rank, call in enumerate(calls)
    ]
    words: dict[int, list[int]] = {}
    while (outcome := machine.run()).status != "done":
        if outcome.status == "failed":
            report.kind, report.text = outcome.kind, outcome.text
            return None
        words[outcome.rank] = outcome.words
    report.steps, report.switches = outcome.steps, outcome.switches
    for rank in range(len(calls)):
        fault = domain.take_fault(rank)
        if fault is not None:
            report.kind, report.text = "needless fault", f"rank {rank}: {fault}"
            return None
    return {rank: (slot, words.get(rank, [])) for rank, slot in enumerate(slots)}


def _problem(
    domain: EmulatedDomain,
    rank: int,
    call: DispatchCall,
    want: oracle.ElasticOutput,
    watched: dict[int, tuple[int, list[int]]],
) -> str:
    """Names of what differs from what is wanted; empty where nothing does."""
    slot, words = watched[rank]
    received, expansion = want.rank_ends[-1], call.expansion
    assert expansion is not None
    assert want.recv_topk_weights is not None
    if call.posts_counts:
        posted = domain.host_counts(words)
        if (posted.phase, posted.num_rows, posted.per_expert) != (0, received, want.expert_counts):
            return f"posted {posted}, not {want.expert_counts} of {received} rows"
    is_spread = expansion.spreads and (not call.posts_counts or want.num_rows <= expansion.capacity)
    if not is_spread:
        return _problem_of_rows(domain, rank, call, slot, want)
    rows = want.is_real.nonzero().squeeze(1)
    if expansion.zero_padding:
        rows = torch.arange(want.num_rows, device="cpu")
    rows = rows[rows < expansion.capacity]
    got = expanded.read(domain, rank, call, call.num_worst_tokens or received, rows, want.num_rows)
    slots = want.metadata[:, 2:].long()
    is_out = slots >= expansion.capacity
    checks = {
        "rows": torch.equal(got.x[rows].view(torch.int16), want.recv_x[rows].view(torch.int16)),
        "weights": torch.equal(got.weights[rows], want.recv_topk_weights[rows]),
        "scales": _same(got.scales, want.recv_scales, rows),
        "slots": torch.equal(got.slots[:received], slots.masked_fill(is_out, -1)),
        "slots behind": bool((got.slots[received:] == -1).all()),
        "entries": got.counts.tolist() == want.expert_counts,
        "overflow": got.overflow == bool(is_out.any()),
    }
    return ", ".join(name for name, is_right in checks.items() if not is_right)


def _same(got: Tensor | None, want: Tensor | None, rows: Tensor) -> bool:
    if got is None or want is None:
        return got is want
    return torch.equal(got[rows], want[rows])


def _problem_of_rows(
    domain: EmulatedDomain, rank: int, call: DispatchCall, slot: int, want: oracle.ElasticOutput
) -> str:
    """The same of rows that stay as they come: the wanted ones, found by their slots."""
    got = domain.read_slot(rank, slot, call, want.rank_ends[-1])
    slots = want.metadata[:, 2:].long()
    row, lane = (slots >= 0).nonzero(as_tuple=True)
    at = slots[row, lane]
    is_right = torch.equal(got.x[row].view(torch.int16), want.recv_x[at].view(torch.int16))
    if want.recv_scales is not None and got.scales is not None:
        is_right = is_right and torch.equal(got.scales[row], want.recv_scales[at])
    return "" if is_right else "received rows"


def explore_spreads(
    *,
    runs: int | None = None,
    seconds: float | None = None,
    kernels: Any = None,
    progress: Callable[[int], None] = lambda run: None,
) -> CaseTally[SpreadCase]:
    """Drawn calls; in half of those without host wait a rank stops. `explore_cases`."""

    def run(case: SpreadCase, schedule: ThreadSchedule) -> RunReport:
        if case.worst == 0 or len(case.tokens) == 1 or case.seed % 2:
            return run_spread(case, schedule, kernels)
        choices = RandomChoices(case.seed)
        stop = Stop(choices.integer(0, len(case.tokens) - 1), choices.integer(0, 300), counts_writes=True)
        return run_stopped(replace(case, spreads=()), schedule, stop, kernels)

    return explore_cases(draw_spread, run, runs=runs, seconds=seconds, progress=progress)
