"""The low-latency kernels on the emulated machine: drawn cases, launches and schedules, against the oracle.

A scenario is dispatches and combines of one or more cases, one after the other, on all ranks. Every rank is a
program of its own: nothing but the kernels' own protocol keeps the ranks in step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from deepep import _emulator
from deepep.sim.cases.case import Case
from deepep.sim.cases.values import RankInputs, inputs
from deepep.sim.emulator.calls import DISAGREEMENT, KernelFault
from deepep.sim.emulator.low_latency import (
    BOTH,
    RECEIVE,
    SEND,
    EmulatedLowLatency,
    LowLatencyCall,
    LowLatencyGpu,
    LowLatencyHandleAt,
    LowLatencySizes,
    RowCast,
)
from deepep.sim.emulator.low_latency_far import EmulatedFarLowLatency, far_network
from deepep.sim.explore.scenarios import RunReport, Stop, ThreadSchedule
from deepep.sim.rules import oracle
from deepep.sim.rules.observed import RankView, bits, fill_low_latency, first_difference

#: Ways in which a rank spoils an operation for all: its host refuses it, it has another number of experts, it
#: combines along other indices, or along the dispatch before ("older"), it makes the dispatch by other means
#: than kernels, it alone has rows travel in LogFMT, or as they are. "meeting" spoils nothing: all ranks make
#: an operation of each kind by other means, before each real one.
SPOILS = ("", "dispatch", "shape", "combine", "indices", "older", "elsewhere", "logfmt", "meeting")


@dataclass(frozen=True)
class LowLatencyScenario:
    """Cases to run, of equally many ranks, in order.

    hooked: sends and receives are launches of their own. carries_weights: with the dispatch. num_combines:
    along each handle. spoils: one of SPOILS; one rank, in turn, does that before each real operation.
    own_stretches: rows of entries, where they return, have a stretch for each source. All cases sum alike.
    ranks_per_domain: ranks of a domain, where there are several; 0: one has all. has_gateways: between those,
    which are of one size, calls go in two levels, and sums of a domain are rounded.
    """

    cases: tuple[Case, ...]
    gpu: LowLatencyGpu = field(default_factory=LowLatencyGpu)
    hooked: bool = False
    carries_weights: bool = False
    num_combines: int = 1
    spoils: str = ""
    own_stretches: bool = False
    ranks_per_domain: int = 0
    has_gateways: bool = False

    @cached_property
    def expected(self) -> list[list[RankView]]:
        """The oracle's results, by case and rank."""
        size = self.ranks_per_domain if self.has_gateways else 0
        return [oracle.observe(case, ranks_per_domain=size) for case in self.cases]


def is_exact(case: Case) -> bool:
    """True if every row of a token returns, and its owner sums."""
    return case.options.reduce == "token"


class WrongBits(Exception):
    """An operation finished with other bits than the oracle's."""


class _RankGaveUp(Exception):
    """A rank found a fault record after an operation."""


Program = Generator[str, None, None]


def run(
    scenario: LowLatencyScenario,
    schedule: ThreadSchedule,
    *,
    stops: Sequence[Stop] = (),
    kernels: Any = None,
    max_steps: int = 5_000_000,
) -> RunReport:
    """Runs the scenario and judges every rank's results. kernels: default the product's own."""
    return LowLatencyRun(scenario, schedule, stops, kernels or _emulator.own_kernels(), max_steps).run()


class LowLatencyRun:
    """All ranks' programs on one machine. network: arguments of that, in place of what the protocol needs."""

    def __init__(
        self,
        scenario: LowLatencyScenario,
        schedule: ThreadSchedule,
        stops: Sequence[Stop],
        kernels: Any,
        max_steps: int,
        **network: Any,
    ) -> None:
        self.scenario = scenario
        self.stops = stops
        cases, gpu = scenario.cases, scenario.gpu
        self.num_ranks = cases[0].num_ranks
        sizes = LowLatencySizes(
            num_local_experts=max(case.num_local_experts for case in cases),
            num_max_tokens=max(case.num_max_tokens for case in cases),
            num_topk=max(case.num_topk for case in cases),
            hidden=max(case.hidden for case in cases),
            entry_stretches=(1, self.num_ranks)[scenario.own_stretches] if is_exact(cases[0]) else 0,
        )
        per_domain = scenario.ranks_per_domain
        self.machine = _emulator.Machine(
            num_ranks=self.num_ranks,
            max_blocks=gpu.num_blocks,
            max_threads=gpu.num_threads,
            num_sms=gpu.num_sms,
            strategy=schedule.strategy,
            seed=schedule.seed,
            expected_steps=schedule.expected_steps,
            max_steps=max_steps,
            faults=[
                _emulator.MachineFault(
                    rank=stop.rank,
                    at=stop.at,
                    counts_writes=stop.counts_writes,
                    pause_ns=int(stop.pause_seconds * 1e9),
                    loses_writes=stop.loses_writes,
                )
                for stop in stops
            ],
            **(far_network(self.num_ranks, per_domain, sizes, scenario.has_gateways) if per_domain else {})
            | network,
        )
        made_for = (self.machine, kernels, gpu, self.num_ranks, sizes)
        self.domain = (
            EmulatedFarLowLatency(*made_for, ranks_per_domain=per_domain, has_gateways=scenario.has_gateways)
            if per_domain
            else EmulatedLowLatency(*made_for)
        )
        self.watched: Any = None
        self.report = RunReport()
        self.programs: dict[int, Program] = {}

    def run(self) -> RunReport:
        report = self.report
        self.programs = {rank: self._program(rank) for rank in range(self.num_ranks)}
        try:
            for rank in range(self.num_ranks):
                self._advance(rank)
            while True:
                outcome = self.machine.run()
                report.steps, report.switches = outcome.steps, outcome.switches
                report.now = outcome.now_ns * 1e-9
                if outcome.status == "failed":
                    report.kind, report.text = outcome.kind, outcome.text
                    return report
                if outcome.status == "done":
                    break
                self.watched = outcome
                self._advance(outcome.rank)
        except WrongBits as error:
            report.kind, report.text = "wrong result", str(error)
        except _emulator.HostFailure as error:
            report.kind, _, report.text = str(error).partition("\n")
        else:
            self._judge_faults()
        return report

    def _advance(self, rank: int) -> None:
        """Runs a rank's program to its next wait, or to its end."""
        try:
            waits_for = next(self.programs[rank])
        except (StopIteration, _RankGaveUp):
            del self.programs[rank]
        else:
            if waits_for == "stream":
                self.machine.host_step(rank)

    def _judge_faults(self) -> None:
        """Whoever gave up must have had a stopped rank to wait for; all others must have finished."""
        report = self.report
        gone = {stop.rank for stop in self.stops if stop.pause_seconds == 0}
        unfinished = set(self.programs) - gone
        if unfinished:
            report.kind = "unfinished"
            report.text = f"ranks {sorted(unfinished)} neither finished nor gave up"
        elif report.faults and not self.stops:
            report.kind, report.text = "needless fault", str(report.faults)
        elif report.faults:
            report.kind = "fault"

    # ---- one rank's program --------------------------------------------------------------------------------

    def _program(self, rank: int) -> Program:
        for index, case in enumerate(self.scenario.cases):
            if rank in case.masked_at_dispatch:
                continue
            yield from self._round_trip(rank, index, case)

    def _round_trip(self, rank: int, index: int, case: Case) -> Program:
        domain, spoils = self.domain, self.scenario.spoils
        members = case.members
        spoiler = members[index % len(members)]
        given = inputs(case, rank)
        call, cast = call_of(case, given, carries_weights=self.scenario.carries_weights), cast_of(case)
        # Of one that refuses; a rank alone would agree with itself.
        call = replace(call, elsewhere=spoils == "elsewhere" and len(case.dispatch_members) > 1)
        domain.set_live(rank, case.dispatch_members)
        if spoils == "meeting":
            yield from self._meet(rank, call, given.tokens)
        if spoils in ("dispatch", "shape", "elsewhere"):
            rows = rows_of(case, rank, self.scenario.expected[index][rank])
            yield from self._spoil_dispatch(rank, call, cast, given.tokens, rows, is_spoiler=rank == spoiler)
        older = None
        if spoils == "older":
            older = domain.new_handle(rank, call)
            older_args, _ = domain.dispatch(rank, call, cast, given.tokens, older)
            yield from self._carry_out(rank, lambda halves: domain.launch_dispatch(rank, older_args, halves))
        handle = domain.new_handle(rank, call)
        dispatch_args, received = domain.dispatch(rank, call, cast, given.tokens, handle)
        yield from self._carry_out(rank, lambda halves: domain.launch_dispatch(rank, dispatch_args, halves))
        view = RankView()
        fill_low_latency(view, *domain.read_results(rank, call, cast, received))
        self._judge(rank, index, view)
        if rank in case.masked:
            return
        domain.set_live(rank, members)
        rows = rows_of(case, rank, self.scenario.expected[index][rank])
        for number in range(self.scenario.num_combines):
            if spoils in ("combine", "indices", "older", "logfmt"):
                # A rank alone agrees with itself along any dispatch: it refuses.
                along = older if rank == spoiler and older is not None and len(members) > 1 else handle
                yield from self._spoil_combine(
                    rank, call, rows, along, is_spoiler=rank == spoiler and along is handle
                )
            args, out = domain.combine(rank, call, rows, handle)
            yield from self._combine(rank, args)
            x = domain.read(rank, out, torch.bfloat16, (call.topk_idx.shape[0], case.hidden))
            self._judge(rank, index, RankView(combined_x=bits(x)))
            del number

    def _spoil_dispatch(
        self,
        rank: int,
        call: LowLatencyCall,
        cast: RowCast,
        x: torch.Tensor,
        rows: torch.Tensor,
        *,
        is_spoiler: bool,
    ) -> Program:
        """A dispatch that all ranks find spoilt; a combine along it is refused, by whoever makes it."""
        domain = self.domain
        several = self.num_ranks > 1 and call.num_local_experts > 1
        if is_spoiler and self.scenario.spoils == "shape" and several:
            call = replace(call, num_local_experts=1)
        elif is_spoiler:
            call = replace(call, refused=True)
        handle = domain.new_handle(rank, call)
        args, _ = domain.dispatch(rank, call, cast, x, handle)
        yield from self._refuse(rank, lambda halves: domain.launch_dispatch(rank, args, halves))
        combine_args, _ = domain.combine(rank, call, rows, handle)
        yield from self._refuse(rank, lambda halves: domain.launch_combine(rank, combine_args, halves))

    def _meet(self, rank: int, call: LowLatencyCall, x: torch.Tensor) -> Program:
        """Operations that no rank takes part in."""
        domain, call = self.domain, replace(call, refused=True, elsewhere=True)
        rows = torch.empty(0, dtype=torch.bfloat16)
        handle = domain.new_handle(rank, call)
        args, _ = domain.dispatch(rank, call, RowCast(), x, handle)
        yield from self._carry_out(rank, lambda halves: domain.launch_dispatch(rank, args, halves))
        combine_args, _ = domain.combine(rank, call, rows, handle)
        yield from self._carry_out(rank, lambda halves: domain.launch_combine(rank, combine_args, halves))

    def _combine(self, rank: int, args: dict[str, Any]) -> Program:
        yield from self._carry_out(rank, lambda halves: self.domain.launch_combine(rank, args, halves))

    def _spoil_combine(
        self,
        rank: int,
        call: LowLatencyCall,
        rows: torch.Tensor,
        handle: LowLatencyHandleAt,
        *,
        is_spoiler: bool,
    ) -> Program:
        if is_spoiler and self.scenario.spoils == "logfmt" and self.num_ranks > 1:
            call = replace(call, logfmt=not call.logfmt)
        elif is_spoiler and self.scenario.spoils != "indices":
            call = replace(call, refused=True)
        elif is_spoiler:
            other = call.topk_idx.clone()
            if other.numel():
                other[-1, -1] = -1 if int(other[-1, -1]) != -1 else 0
            else:  # without tokens there are no indices to be wrong
                call = replace(call, refused=True)
            call = replace(call, topk_idx=other)
        args, _ = self.domain.combine(rank, call, rows, handle)
        yield from self._refuse(rank, lambda halves: self.domain.launch_combine(rank, args, halves))

    def _carry_out(self, rank: int, launch: Callable[[int], None]) -> Program:
        for halves in (SEND, RECEIVE) if self.scenario.hooked else (BOTH,):
            launch(halves)
            yield from self._settle(rank)

    def _refuse(self, rank: int, launch: Callable[[int], None]) -> Program:
        """The operation must find a disagreement and nothing else, or the rank gives up."""
        fault: KernelFault | None = None
        for halves in (SEND, RECEIVE) if self.scenario.hooked else (BOTH,):
            launch(halves)
            yield "stream"
            fault = self.domain.take_fault(rank) or fault
        if fault is None or fault.phase != DISAGREEMENT:
            if fault is not None and self.stops:
                self.report.faults[rank] = fault
                raise _RankGaveUp
            raise WrongBits(f"rank {rank}: of a refusal the kernel reported {fault}")

    def _settle(self, rank: int) -> Program:
        """Waits for the stream; where faults are to be expected, looks for one while the kernel runs, too."""
        early = None
        if self.stops:
            self.domain.watch_fault(rank)
            yield "watch"
            if self.watched.in_time:
                early = self.domain.take_fault(rank, watched=True)
        yield "stream"
        fault = self.domain.take_fault(rank)
        if fault != early and early is not None:
            raise WrongBits(f"rank {rank}: a fault record that changed: {early}, then {fault}")
        if fault is not None:
            self.report.faults[rank] = fault
            raise _RankGaveUp

    def _judge(self, rank: int, index: int, view: RankView) -> None:
        views = [view if r == rank else RankView() for r in range(self.num_ranks)]
        difference = first_difference(self.scenario.expected[index], views)
        if difference is not None:
            raise WrongBits(f"case {index}: {difference}")


def call_of(case: Case, given: RankInputs, *, carries_weights: bool) -> LowLatencyCall:
    """A rank's call with what it is given."""
    return LowLatencyCall(
        topk_idx=given.topk_idx,
        topk_weights=given.topk_weights,
        num_max_tokens=case.num_max_tokens,
        num_local_experts=case.num_local_experts,
        hidden=case.hidden,
        carries_weights=carries_weights,
        exact=is_exact(case),
        logfmt=case.options.logfmt,
    )


def cast_of(case: Case) -> RowCast:
    """The format of a case's rows."""
    return RowCast(
        fp8=case.options.low_latency != "bf16",
        round_scale=case.options.low_latency in ("fp8+rounded", "fp8+ue8m0"),
        ue8m0=case.options.low_latency == "fp8+ue8m0",
    )


def rows_of(case: Case, rank: int, view: RankView) -> torch.Tensor:
    """Rows that the rank hands to combine: those it received, by the oracle's `view`, or others."""
    assert view.recv_count is not None
    assert view.recv_rows is not None
    count = torch.from_numpy(view.recv_count)
    room = case.num_ranks * case.num_max_tokens
    received = torch.zeros(len(count), room, case.hidden, dtype=torch.bfloat16)
    if case.options.combine_rows == "same":
        rows = torch.from_numpy(view.recv_rows.copy()).view(torch.bfloat16).split(count.tolist())
        for expert, of_expert in enumerate(rows):
            received[expert, : len(of_expert)] = of_expert
    return oracle.expert_rows(case, rank, received, count)
