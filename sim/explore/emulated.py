"""The kernels on the CPU: whole operations on an emulated machine, under one schedule, against the oracle.

`run` executes a scenario: layout, dispatch, combine and barrier of one or more cases, one after the other,
on all ranks. Every rank is a program of its own: nothing but the kernels' own protocol keeps the ranks in
step, so one may be an operation ahead of another, as on hardware. docs/emulator.md says what is modelled.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepep import _emulator
from deepep.sim.cases.case import Case
from deepep.sim.cases.values import RankInputs, inputs
from deepep.sim.emulator import two_level
from deepep.sim.emulator.calls import CombineCall, DispatchCall, HostCounts, LayoutAt, PlanAt
from deepep.sim.emulator.domain import EmulatedDomain
from deepep.sim.explore import expanded_rows
from deepep.sim.explore.expanded_rows import EntryRows
from deepep.sim.explore.scenarios import RunReport, Scenario, Stop, ThreadSchedule
from deepep.sim.rules import oracle
from deepep.sim.rules.observed import Array, RankView, bits, first_difference


class _WrongResult(Exception):
    """An operation finished with other bits than the oracle's."""


class _GaveUp(Exception):
    """A rank found a fault record after an operation."""


#: What a rank's host does; it yields what it waits for: its stream to be empty, or its watch to end.
Program = Generator[str, None, None]


def run(
    scenario: Scenario,
    schedule: ThreadSchedule,
    *,
    stops: Sequence[Stop] = (),
    kernels: Any = None,
    max_steps: int = 5_000_000,
) -> RunReport:
    """Runs the scenario and judges every rank's results.

    kernels: what `_emulator.load_kernels` gave; default the product's own. max_steps: more is a livelock.
    """
    return ScenarioRun(scenario, schedule, stops, kernels or _emulator.own_kernels(), max_steps).run()


class ScenarioRun:
    """A scenario on a machine of its own. max_open_puts: between domains; 0: what the protocol needs."""

    def __init__(
        self,
        scenario: Scenario,
        schedule: ThreadSchedule,
        stops: Sequence[Stop],
        kernels: Any,
        max_steps: int,
        *,
        max_open_puts: int = 0,
    ) -> None:
        self.scenario = scenario
        self.stops = stops
        self.num_ranks = scenario.cases[0].num_ranks
        gpu = scenario.gpu
        cases = scenario.cases
        calls = [_call(case, inputs(case, 0)) for case in cases]
        local_experts = max(case.num_local_experts for case in cases)
        network: dict[str, Any] = {}
        if scenario.between_domains:
            shape = two_level.shape_of(
                gpu,
                num_ranks=self.num_ranks,
                ranks_per_domain=scenario.ranks_per_domain,
                live=cases[0].dispatch_members,
                max_local_experts=local_experts,
                row_bytes=max(2 * case.hidden for case in cases),
                num_scales=max(0 if call.scales is None else call.scales.shape[1] for call in calls),
                num_topk=max(case.num_topk for case in cases),
            )
            network = two_level.network(shape, scenario.ranks_per_domain)
            network["max_open_puts"] = max_open_puts or network["max_open_puts"]
        machine = _emulator.Machine(
            **network,
            num_ranks=self.num_ranks,
            copy_engines=gpu.ce_chunks > 0 and not scenario.between_domains,
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
        )
        self.machine = machine
        slot_bytes = max(call.slot.num_bytes for call in calls)
        if scenario.between_domains:
            self.domain: EmulatedDomain = two_level.EmulatedDomains(
                machine,
                kernels,
                gpu,
                num_ranks=self.num_ranks,
                ranks_per_domain=scenario.ranks_per_domain,
                shape=shape,
                live=cases[0].dispatch_members,
                max_local_experts=local_experts,
                max_tokens=max(max(case.num_tokens) for case in cases),
                slot_bytes=slot_bytes,
            )
            self._begin()
            return
        # Every token may come back from every rank; rows travel with K weights.
        self.domain = EmulatedDomain(
            machine,
            kernels,
            gpu,
            num_ranks=self.num_ranks,
            max_local_experts=local_experts,
            staging_rows=self.num_ranks * max(max(case.num_tokens) for case in cases),
            row_bytes=max(2 * case.hidden + 16 * case.num_topk for case in cases),
            slot_bytes=slot_bytes,
        )
        self._begin()

    def _begin(self) -> None:
        self.watched: Any = None  # outcome of the watch that ended last
        self.report = RunReport()
        self.programs: dict[int, Program] = {}
        self.handles: dict[int, tuple[CombineCall, PlanAt]] = {}  # of each rank's case before

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
        except _WrongResult as error:
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
        except (StopIteration, _GaveUp):
            del self.programs[rank]
        else:
            if waits_for == "stream":
                self.machine.host_step(rank)

    def _judge_faults(self) -> None:
        """Whoever gave up must have had a stopped rank to wait for; all others must have finished."""
        report = self.report
        gone = {stop.rank for stop in self.stops if stop.pause_seconds == 0}
        unfinished = set(self.programs) - gone
        held = [r for r in set(range(self.num_ranks)) - gone if not self.domain.ce_doorbell_rung(r)]
        if unfinished:
            report.kind = "unfinished"
            report.text = f"ranks {sorted(unfinished)} neither finished nor gave up"
        elif held:
            report.kind = "stream that waits indefinitely"
            report.text = f"the copy engines of ranks {held} were not let go"
        elif report.faults and not self.stops:
            report.kind, report.text = "needless fault", str(report.faults)
        elif report.faults:
            report.kind = "fault"

    # ---- one rank's program --------------------------------------------------------------------------------

    def _program(self, rank: int) -> Program:
        for index, case in enumerate(self.scenario.cases):
            if rank in case.masked_at_dispatch:
                continue
            if self.scenario.use_layout == "only":
                yield from self._lay_out(rank, index, case)
            else:
                yield from self._round_trip(rank, index, case)
            if self.scenario.use_barrier and not case.masked:
                self.domain.barrier(rank, index)
                yield from self._settle(rank)
                if self.domain.read_marks(rank, index) != [index] * self.num_ranks:
                    raise _WrongResult(f"rank {rank}: marks of barrier {index}")

    def _round_trip(self, rank: int, index: int, case: Case) -> Program:
        domain = self.domain
        given = inputs(case, rank)
        if self.scenario.use_layout == "yes":
            layout = yield from self._lay_out(rank, index, case)
        elif self._lays_out_inside(case):
            layout = domain.layout_inside(rank, case.num_tokens[rank])
        else:
            expected = self.scenario.expected[index][rank]
            layout = domain.given_layout(
                rank,
                torch.from_numpy(expected.num_tokens_per_rank),
                torch.from_numpy(expected.num_tokens_per_expert),
                torch.from_numpy(expected.is_token_in_rank),
            )
        plan = domain.new_plan(rank, case.num_tokens[rank])
        slot, rows = yield from self._dispatch(rank, index, case, layout, plan)
        if case.options.cached:
            call = _call(case, inputs(case, rank, again=True), cached=True)
            slot_again = domain.dispatch(rank, call, layout, plan)
            yield from self._settle(rank)
            received = domain.read_slot(rank, slot_again, call, rows)
            view = RankView(again_x=bits(received.x))
            if received.scales is not None:
                view.again_scales = bits(received.scales)
            self._judge(rank, index, view)
        if rank in case.masked:
            return
        if self.scenario.expands:
            made = expanded_rows.draw(case, rank, rows, weighted=self.scenario.expands == "weighted")
            combine = _combine_call(case, rank, given, slot, rows, made)
        else:
            combine = _combine_call(case, rank, given, slot, rows)
        if self.scenario.between_domains:
            combine = replace(combine, source_token=slot + _call(case, given).slot.source)
        for number in range(self.scenario.num_combines):
            if self.scenario.refuses == "combine":
                refuser = case.members[(index + number) % len(case.members)]
                # Of the case before, if there is one: its rows are staged elsewhere than those that follow.
                earlier, earlier_plan = self.handles.get(rank, (combine, plan))
                refused = replace(earlier, refused=rank == refuser, live=case.members)
                domain.combine(rank, refused, earlier_plan)
                yield from self._wait_refusal(rank)
            outputs = domain.combine(rank, combine, plan)
            yield from self._settle(rank)
            x, weights = domain.read_sums(rank, combine, outputs)
            view = RankView(combined_x=bits(x))
            if weights is not None:
                view.combined_weights = bits(weights)
            self._judge(rank, index, view)
        # The slot will be used anew: who combines with this handle later brings rows of its own.
        own = torch.zeros(rows, case.hidden, dtype=torch.bfloat16)
        own_weights = torch.zeros(rows, combine.num_topk) if combine.num_topk else 0
        plain = replace(combine, x=own, topk_weights=own_weights, slots=None, factors=None)
        self.handles[rank] = (plain, plan)

    def _lays_out_inside(self, case: Case) -> bool:
        return self.scenario.use_layout == "inside" and case.options.topk

    def _lay_out(self, rank: int, index: int, case: Case) -> Generator[str, None, LayoutAt]:
        topk_idx, nodes = inputs(case, rank).topk_idx, case.options.ranks_per_node
        at = self.domain.layout(rank, topk_idx, case.num_experts, nodes)
        yield "stream"
        tokens = case.num_tokens[rank]
        per_rank, per_node, per_expert, in_rank = self.domain.read_layout(
            rank, at, tokens, case.num_experts, nodes
        )
        view = RankView(
            num_tokens_per_rank=per_rank.numpy(),
            num_tokens_per_node=None if per_node is None else per_node.numpy(),
            num_tokens_per_expert=per_expert.numpy(),
            is_token_in_rank=in_rank.numpy(),
        )
        self._judge(rank, index, view)
        return at

    def _dispatch(
        self, rank: int, index: int, case: Case, layout: LayoutAt, plan: PlanAt
    ) -> Generator[str, None, tuple[int, int]]:
        """Returns the slot's address and the number of rows in it."""
        domain = self.domain
        expected = [view.recv_x for view in self.scenario.expected[index]]
        rows = len(_given(expected[rank]))
        most_rows = max(len(x) for x in expected if x is not None)
        call = replace(_call(case, inputs(case, rank)), by_topk=self._lays_out_inside(case))
        view = RankView()
        if call.posts_counts and self.scenario.short_slots and most_rows > 1:
            domain.dispatch(rank, replace(call, capacity=most_rows - 1), layout, plan)
            got = yield from self._wait_counts(rank)
            yield from self._settle(rank)
            if (got.phase, got.max_rows) != (_emulator.TOO_MANY_ROWS, most_rows):
                raise _WrongResult(f"rank {rank}: short slots: the host got {got}")
        if self.scenario.refuses == "dispatch":
            refuser = case.dispatch_members[index % len(case.dispatch_members)]
            given_up = domain.new_plan(rank, case.num_tokens[rank])
            if rank == refuser:
                nothing = DispatchCall(call.x[:0], call.num_local_experts, 0, call.live, refused=True)
                domain.dispatch(rank, nothing, layout, given_up)
            else:
                domain.dispatch(rank, call, layout, given_up)
            if rank != refuser and call.posts_counts:
                got = yield from self._wait_counts(rank)
                if got.phase == 0:
                    raise _WrongResult(f"rank {rank}: the host got {got} of a refused dispatch")
            yield from self._wait_refusal(rank)
        slot = domain.dispatch(rank, call, layout, plan)
        if call.posts_counts:
            # The host allocates by what it hears while the kernel runs.
            got = yield from self._wait_counts(rank)
            if got.phase == 0:
                unit = case.options.expert_alignment
                view.num_rows = got.num_rows
                members = list(case.dispatch_members)
                sent = np.zeros((self.num_ranks, self.num_ranks), dtype=np.int64)
                for source in members:
                    tokens = self.scenario.expected[index][source].num_tokens_per_rank
                    sent[source, members] = _given(tokens)[members]
                if got.table != sent.ravel().tolist():
                    raise _WrongResult(f"rank {rank}: the host got {got}, of {sent.tolist()}")
                view.expert_counts = np.array([-(-n // unit) * unit for n in got.per_expert])
        else:
            view.num_rows = call.num_worst_tokens
            view.expert_counts = np.zeros(0, dtype=np.int64)
        yield from self._settle(rank)
        if view.num_rows is None:
            raise _WrongResult(f"rank {rank}: the host got {got}, and there is no fault record")
        if call.by_topk:
            view.is_token_in_rank = domain.read_marks_of(rank, layout, case.num_tokens[rank]).numpy()
        received = domain.read_slot(rank, slot, call, rows)
        assert received.source is not None
        view.recv_x, view.src_token = bits(received.x), received.source.numpy()
        if received.scales is not None:
            view.recv_scales = bits(received.scales)
        if received.topk_idx is not None and received.topk_weights is not None:
            view.recv_topk_idx = received.topk_idx.numpy()
            view.recv_topk_weights = bits(received.topk_weights)
        self._judge(rank, index, view)
        return slot, rows

    def _wait_counts(self, rank: int) -> Generator[str, None, HostCounts]:
        """Waits for what a dispatch tells the host."""
        yield "watch"
        if not self.watched.in_time:
            raise _WrongResult(f"rank {rank}: no counts came to the host")
        return self.domain.host_counts(self.watched.words)

    def _wait_refusal(self, rank: int) -> Program:
        """Waits for the stream: the kernel must have found a disagreement and
        nothing else, or the rank gives up.
        """
        yield "stream"
        fault = self.domain.take_fault(rank)
        if fault is None or fault.phase != _emulator.DISAGREEMENT:
            if fault is not None and self.stops:
                self.report.faults[rank] = fault
                raise _GaveUp
            raise _WrongResult(f"rank {rank}: of a refusal the kernel reported {fault}")

    def _settle(self, rank: int) -> Program:
        """Waits for the stream; where faults are to be expected, looks for one while the kernel runs, too."""
        got = None
        if self.stops:
            self.domain.watch_fault(rank)
            yield "watch"
            if self.watched.in_time:
                got = self.domain.take_fault(rank, watched=True)
        yield "stream"
        fault = self.domain.take_fault(rank, watched=False)
        if fault != got and got is not None:
            raise _WrongResult(f"rank {rank}: a fault record that changed: {got}, then {fault}")
        if fault is not None:
            self.report.faults[rank] = fault
            raise _GaveUp

    def _judge(self, rank: int, index: int, view: RankView) -> None:
        views = [view if r == rank else RankView() for r in range(self.num_ranks)]
        difference = first_difference(self.scenario.expected[index], views)
        if difference is not None:
            raise _WrongResult(f"case {index}: {difference}")


def _call(case: Case, given: RankInputs, *, cached: bool = False) -> DispatchCall:
    """A rank's dispatch, with a slot for whatever may come."""
    topk = case.options.topk and not cached
    worst = oracle.worst_tokens(case)
    return DispatchCall(
        x=given.x,
        num_local_experts=case.num_local_experts,
        capacity=max(1, sum(case.num_tokens), worst),
        live=case.dispatch_members,
        scales=given.scales,
        topk_idx=given.topk_idx if topk else None,
        topk_weights=given.topk_weights if topk else None,
        num_worst_tokens=0 if cached else worst,
        cached=cached,
    )


def _combine_call(
    case: Case, rank: int, given: RankInputs, slot: int, rows: int, expanded: EntryRows | None = None
) -> CombineCall:
    """A rank's combine of the slot's rows, or of others, or of expanded ones."""
    options = case.options
    if expanded is not None:
        return CombineCall(
            x=expanded.x,
            hidden=case.hidden,
            num_tokens=case.num_tokens[rank],
            live=case.members,
            num_topk=case.num_topk if options.combine_weights else 0,
            topk_weights=expanded.weights if options.combine_weights else 0,
            biases=given.biases,
            slots=expanded.slots,
            factors=expanded.factors,
        )
    x: Tensor | int = slot
    if options.combine_rows != "same":
        # Their values depend on how many there are, the rows past the last received included.
        x = oracle.returned_rows(case, rank, torch.empty(oracle.worst_tokens(case) or rows, 0))
    weights_at = slot + _call(case, given).slot.topk_weights
    return CombineCall(
        x=x,
        hidden=case.hidden,
        num_tokens=case.num_tokens[rank],
        live=case.members,
        num_topk=case.num_topk if options.combine_weights else 0,
        topk_weights=weights_at if options.combine_weights else 0,
        biases=given.biases,
    )


def _given(array: Array | None) -> Array:
    assert array is not None
    return array
