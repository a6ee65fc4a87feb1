"""The emulator in the place of all_to_all: the kernels run on the CPU, on one rank for all.

Same functions as deepep.reference.all_to_all. The lowest rank is the leader: the others bring it their
arguments and it carries the operation out on an emulated machine (docs/emulator.md), of which there is a new
one for each operation, under a schedule that follows from the seed and the number of the operation.
"""

from __future__ import annotations

import os
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from deepep import _emulator
from deepep.reference import all_to_all
from deepep.reference.all_to_all import CombineTensors, DispatchPlan, DispatchTensors
from deepep.reference.layout import dispatch_layout
from deepep.reference.wire import Wire
from deepep.runtime.control.lines import LineRecorder
from deepep.runtime.control.waits import KERNEL_WAITS, WaitRecorder
from deepep.sim.emulator import shapes, two_level
from deepep.sim.emulator.calls import CombineCall, DispatchCall, Gpu, PlanAt
from deepep.sim.emulator.domain import EmulatedDomain
from deepep.sim.emulator.leader import EmulatedFailure, at_leader
from deepep.sim.emulator.lines import add_lines, asks_for

#: Shapes of launches, which take turns with the operations.
GPUS = (shapes.GPUS[0], shapes.GPUS[2], shapes.GPUS[3], shapes.GPUS[7])


@dataclass(frozen=True)
class EmulatedPlan(DispatchPlan):
    """A plan, with what the kernels are given besides, and with the handle that they made.

    send_row: one int32 [T, R] once a dispatch has made it.
    """

    num_tokens_per_expert: Tensor | None = None
    send_row: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _DispatchPart:
    """One rank's share of a dispatch."""

    call: DispatchCall
    rows_out: int  # of its output: the worst case, if one is given
    counts: Tensor
    num_rows: int
    in_rank: Tensor
    per_expert: Tensor
    send_row: Tensor | None
    measures: bool
    records: bool


@dataclass(frozen=True)
class _CombinePart:
    """One rank's share of a combine."""

    call: CombineCall
    counts: Tensor
    send_row: Tensor
    measures: bool
    records: bool


class EmulatedAllToAll:
    """See the module. One per engine; `seed`: DEEPEP_EMULATOR_SEED.

    ranks_per_domain: so many consecutive ranks share an NVLink domain, and rows cross to others by the
    two-level kernels; 0: all ranks share one. recorder: where kernels' waits for each rank are added up
    while it asks for them, in nanoseconds of the emulated machine; those between domains measure none.
    lines: where time lines of warps are added while it asks for them, if anywhere.
    """

    def __init__(
        self, recorder: WaitRecorder, ranks_per_domain: int = 0, lines: LineRecorder | None = None
    ) -> None:
        self._recorder, self._lines = recorder, lines
        self._ranks_per_domain = ranks_per_domain
        self._seed = int(os.environ.get("DEEPEP_EMULATOR_SEED", "0"))
        self._operations = 0
        self._slots: Tensor | None = None
        self._factors: Tensor | None = None

    def summing(self, slots: Tensor, factors: Tensor | None) -> EmulatedAllToAll:
        """The same for one combine, of expanded rows (CombineRequest)."""
        self._operations += 1
        other = copy(self)
        other._slots, other._factors = slots, factors
        return other

    def exchange_counts(
        self, wire: Wire, is_token_in_rank: Tensor, num_tokens_per_expert: Tensor | None = None
    ) -> EmulatedPlan:
        """See all_to_all.exchange_counts. The kernels will exchange them again."""
        plan = all_to_all.exchange_counts(wire, is_token_in_rank, num_tokens_per_expert)
        known = {f.name: getattr(plan, f.name) for f in fields(plan)}
        return EmulatedPlan(**known, num_tokens_per_expert=num_tokens_per_expert)

    def dispatch(
        self,
        wire: Wire,
        plan: DispatchPlan,
        x: Tensor,
        *,
        scales: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int = 0,
        out: DispatchTensors,
    ) -> None:
        """See all_to_all.dispatch. The first of a plan finds its routes anew; later ones are cached."""
        self._operations += 1
        send_row = _send_row(plan, wire.rank)
        is_cached = not isinstance(plan, EmulatedPlan) or bool(plan.send_row)
        in_rank, per_expert = send_row >= 0, None
        if isinstance(plan, EmulatedPlan):
            per_expert = plan.num_tokens_per_expert
        if per_expert is None:
            per_expert = torch.zeros(max(num_experts, wire.num_ranks), dtype=torch.int32, device="cpu")
        rows = len(out.x)
        num_local_experts = per_expert.numel() // wire.num_ranks
        # Every other dispatch finds out itself where tokens go; ranks may do either.
        by_topk = (
            not is_cached
            and not self._ranks_per_domain
            and topk_idx is not None
            and (self._operations + wire.rank) % 2 == 0
            and _is_layout_of(topk_idx, num_local_experts, wire, in_rank, per_expert)
        )
        mine = _DispatchPart(
            DispatchCall(
                x=x,
                num_local_experts=num_local_experts,
                capacity=max(1, rows, plan.num_recv_tokens),
                live=wire.members,
                scales=scales,
                topk_idx=None if is_cached else topk_idx,
                topk_weights=None if is_cached else topk_weights,
                cached=is_cached,
                by_topk=by_topk,
            ),
            rows,
            torch.tensor(plan.counts, dtype=torch.int32, device="cpu"),
            plan.num_recv_tokens,
            in_rank,
            per_expert.to(torch.int32),
            send_row if is_cached else None,
            self._measures,
            asks_for(self._lines),
        )
        made, source, kept, waits, lines = at_leader(wire, mine, self._run_dispatch)
        self._note("dispatch", waits)
        add_lines(self._lines, lines)
        for target, got in zip((out.x, out.scales, out.topk_idx, out.topk_weights), made, strict=True):
            if target is not None and got is not None:
                target[: len(got)].copy_(got)
        if source is not None:  # a handle has it already
            plan.src_token.copy_(source)
        if isinstance(plan, EmulatedPlan) and kept is not None:
            plan.send_row.append(kept)

    def combine(
        self,
        wire: Wire,
        plan: DispatchPlan,
        x: Tensor,
        *,
        topk_weights: Tensor | None = None,
        biases: tuple[Tensor, ...] = (),
    ) -> CombineTensors:
        """See all_to_all.combine."""
        slots, factors = self._slots, self._factors
        self._operations += 1
        kept = plan.send_row if isinstance(plan, EmulatedPlan) else []
        call = CombineCall(
            x=x,
            hidden=x.shape[1],
            num_tokens=plan.num_tokens,
            live=wire.members,
            num_topk=0 if topk_weights is None else (topk_weights if slots is None else slots).shape[1],
            topk_weights=0 if topk_weights is None else topk_weights,
            biases=biases,
            source_token=plan.src_token if self._ranks_per_domain else 0,
            slots=slots,
            factors=factors,
        )
        send_row = kept[0] if kept else _send_row(plan, wire.rank)
        mine = _CombinePart(
            call,
            torch.tensor(plan.counts, dtype=torch.int32, device="cpu"),
            send_row,
            self._measures,
            asks_for(self._lines),
        )
        made, weights, waits, lines = at_leader(wire, mine, self._run_combine)
        self._note("combine", waits)
        add_lines(self._lines, lines)
        return CombineTensors(made, weights)

    @property
    def _measures(self) -> bool:
        return self._recorder.asks and not self._ranks_per_domain

    def _note(self, operation: str, waits: list[list[int]] | None) -> None:
        if waits is None:
            return
        for (name, phase), waited in zip(KERNEL_WAITS, waits, strict=True):
            if name == operation:
                self._recorder.add(operation, phase, dict(enumerate(waited)))

    def layout(
        self, topk_idx: Tensor, num_experts: int, num_ranks: int, ranks_per_domain: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(per rank [R], per domain [D] or None, per expert [E], token-in-rank [T, R] bool), one rank's."""
        sizes = _Sizes(num_experts // num_ranks, row_bytes=16, slot_bytes=16)
        run = self._run_in_one_domain(num_ranks, sizes)
        at = run.domain.layout(0, topk_idx, num_experts, ranks_per_domain)
        run.to_the_end()
        return run.domain.read_layout(0, at, topk_idx.shape[0], num_experts, ranks_per_domain)

    # ---- on the leader -------------------------------------------------------------------------------------

    def _run_dispatch(self, given: dict[int, _DispatchPart], num_ranks: int) -> dict[int, Any]:
        # With a worst case, the same on all ranks, some rank may get exactly as many rows.
        has_worst = any(mine.rows_out > mine.num_rows and not mine.call.cached for mine in given.values())
        calls = {
            rank: replace(mine.call, num_worst_tokens=mine.rows_out if has_worst else 0)
            for rank, mine in given.items()
        }
        scales = [call.scales for call in calls.values() if call.scales is not None]
        indices = [call.topk_idx for call in calls.values() if call.topk_idx is not None]
        run = self._new_run(
            num_ranks,
            tuple(given),
            _Sizes(
                max(call.num_local_experts for call in calls.values()),
                row_bytes=max(call.x.shape[1] * call.x.element_size() for call in calls.values()),
                slot_bytes=max(call.slot.num_bytes for call in calls.values()),
                max_tokens=max(len(call.x) for call in calls.values()),
                num_scales=max((each.shape[1] for each in scales), default=0),
                num_topk=max((each.shape[1] for each in indices), default=0),
            ),
        )
        domain, slots, plans, layouts = run.domain, {}, {}, {}
        for rank, mine in given.items():
            if mine.measures:
                domain.measure_waits(rank)
            if mine.records:
                domain.record_lines(rank)
            per_rank = mine.in_rank.sum(0, dtype=torch.int32)
            if mine.call.by_topk:
                layout = domain.layout_inside(rank, len(mine.in_rank))
            else:
                layout = domain.given_layout(rank, per_rank, mine.per_expert, mine.in_rank)
            layouts[rank] = layout
            if mine.send_row is None:
                plans[rank] = domain.new_plan(rank, mine.call.x.shape[0])
            else:
                plans[rank] = domain.given_plan(rank, mine.counts, mine.send_row)
            slots[rank] = domain.dispatch(rank, calls[rank], layout, plans[rank])
        watched = run.to_the_end()
        made = {}
        for rank, mine in given.items():
            if calls[rank].posts_counts:
                posted = domain.host_counts(watched[rank])
                if (posted.phase, posted.num_rows) != (0, mine.num_rows):
                    raise EmulatedFailure(
                        f"rank {rank}: {mine.num_rows} rows expected, the host got {posted}"
                    )
            if mine.call.by_topk:
                marks = domain.read_marks_of(rank, layouts[rank], len(mine.in_rank))
                live = list(mine.call.live)
                if not torch.equal(marks[:, live], mine.in_rank[:, live]):
                    raise EmulatedFailure(f"rank {rank}: tokens marked for other ranks than theirs")
            rows = domain.read_slot(rank, slots[rank], calls[rank], mine.num_rows)
            kept = self._read_handle(domain, rank, plans[rank], mine)
            waits = domain.read_waits(rank) if mine.measures else None
            lines = domain.read_lines(rank) if mine.records else None
            arrays = (rows.x, rows.scales, rows.topk_idx, rows.topk_weights)
            made[rank] = (arrays, rows.source, kept, waits, lines)
        return made

    def _read_handle(
        self, domain: EmulatedDomain, rank: int, at: PlanAt, mine: _DispatchPart
    ) -> Tensor | None:
        if mine.call.cached:
            return None
        counts, send_row = domain.read_plan(rank, at, mine.call.x.shape[0])
        if not torch.equal(counts, mine.counts):
            raise EmulatedFailure(f"rank {rank}: the handle's counts are {counts.tolist()}")
        return send_row

    def _run_combine(self, given: dict[int, _CombinePart], num_ranks: int) -> dict[int, Any]:
        calls = {rank: mine.call for rank, mine in given.items()}
        max_tokens = max(call.num_tokens for call in calls.values())
        run = self._new_run(
            num_ranks,
            tuple(given),
            _Sizes(
                1,
                row_bytes=max(2 * call.hidden for call in calls.values()),
                slot_bytes=16,
                max_tokens=max_tokens,
                num_topk=max(call.num_topk for call in calls.values()),
                staging_rows=num_ranks * max_tokens,
            ),
        )
        domain = run.domain
        for rank, mine in given.items():
            if mine.measures:
                domain.measure_waits(rank)
            if mine.records:
                domain.record_lines(rank)
        at = {
            rank: domain.combine(rank, mine.call, domain.given_plan(rank, mine.counts, mine.send_row))
            for rank, mine in given.items()
        }
        run.to_the_end()
        return {
            rank: (
                *domain.read_sums(rank, calls[rank], at[rank]),
                domain.read_waits(rank) if mine.measures else None,
                domain.read_lines(rank) if mine.records else None,
            )
            for rank, mine in given.items()
        }

    def _new_run(self, num_ranks: int, members: tuple[int, ...], sizes: _Sizes) -> _Run:
        if 0 < self._ranks_per_domain < num_ranks:
            return self._run_between_domains(num_ranks, members, sizes)
        return self._run_in_one_domain(num_ranks, sizes)

    def _run_in_one_domain(self, num_ranks: int, sizes: _Sizes) -> _Run:
        gpu = GPUS[self._number % len(GPUS)]
        machine = self._machine(num_ranks, gpu)
        domain = EmulatedDomain(
            machine,
            _emulator.own_kernels(),
            gpu,
            num_ranks=num_ranks,
            max_local_experts=sizes.local_experts,
            staging_rows=sizes.staging_rows,
            row_bytes=sizes.row_bytes + 4 * sizes.num_topk + 16,
            slot_bytes=sizes.slot_bytes,
        )
        return _Run(machine, domain)

    def _run_between_domains(self, num_ranks: int, members: tuple[int, ...], sizes: _Sizes) -> _Run:
        gpu = shapes.TWO_LEVEL_GPUS[self._number % len(shapes.TWO_LEVEL_GPUS)]
        shape = two_level.shape_of(
            gpu,
            num_ranks=num_ranks,
            ranks_per_domain=self._ranks_per_domain,
            live=members,
            max_local_experts=sizes.local_experts,
            row_bytes=sizes.row_bytes,
            num_scales=sizes.num_scales,
            num_topk=sizes.num_topk,
        )
        machine = self._machine(num_ranks, gpu, **two_level.network(shape, self._ranks_per_domain))
        domain = two_level.EmulatedDomains(
            machine,
            _emulator.own_kernels(),
            gpu,
            num_ranks=num_ranks,
            ranks_per_domain=self._ranks_per_domain,
            shape=shape,
            live=members,
            max_local_experts=sizes.local_experts,
            max_tokens=sizes.max_tokens,
            slot_bytes=sizes.slot_bytes,
        )
        return _Run(machine, domain)

    @property
    def _number(self) -> int:
        """The number of this operation's schedule."""
        return self._seed * 1_000_003 + self._operations

    def _machine(self, num_ranks: int, gpu: Gpu, **network: Any) -> _emulator.Machine:
        return _emulator.Machine(
            **network,
            num_ranks=num_ranks,
            copy_engines=gpu.ce_chunks > 0,
            max_blocks=gpu.num_blocks,
            max_threads=gpu.num_threads,
            num_sms=gpu.num_sms,
            strategy=shapes.STRATEGIES[self._number % len(shapes.STRATEGIES)],
            seed=self._number,
            max_steps=10**9,
        )


@dataclass(frozen=True)
class _Sizes:
    """The most of any rank: L, bytes of rows without weights, of receive slots, T, scales, K; staged rows."""

    local_experts: int
    row_bytes: int
    slot_bytes: int
    max_tokens: int = 0
    num_scales: int = 0
    num_topk: int = 0
    staging_rows: int = 0


@dataclass(frozen=True)
class _Run:
    """One operation's machine."""

    machine: Any
    domain: EmulatedDomain

    def to_the_end(self) -> dict[int, list[int]]:
        """Runs until all is done; returns the words that each rank's host watched for."""
        watched = {}
        while (outcome := self.machine.run()).status != "done":
            if outcome.status == "failed":
                raise EmulatedFailure(f"{outcome.kind}: {outcome.text}")
            watched[outcome.rank] = outcome.words
        for rank in range(self.domain.num_ranks):
            fault = self.domain.take_fault(rank)
            if fault is not None:
                raise EmulatedFailure(f"rank {rank} gave up waiting: {fault}")
        return watched


def _is_layout_of(
    topk_idx: Tensor, num_local_experts: int, wire: Wire, in_rank: Tensor, per_expert: Tensor
) -> bool:
    """True if a layout is that of these indices, as far as ranks take part."""
    made = dispatch_layout(topk_idx, num_local_experts * wire.num_ranks, wire.num_ranks)
    live = list(wire.members)
    return torch.equal(made.is_token_in_rank[:, live], in_rank[:, live]) and torch.equal(
        made.num_tokens_per_expert, per_expert.to(made.num_tokens_per_expert.dtype)
    )


def _send_row(plan: DispatchPlan, rank: int) -> Tensor:
    """[T, R] int32: the row of each token at each rank it is sent to, or -1."""
    num_ranks = len(plan.send_counts)
    table = torch.full((plan.num_tokens, num_ranks), -1, dtype=torch.int32, device="cpu")
    begin = 0
    for destination, count in enumerate(plan.send_counts):
        first = sum(plan.counts[source][destination] for source in range(rank))
        tokens = plan.send_token[begin : begin + count]
        table[tokens, destination] = torch.arange(first, first + count, dtype=torch.int32, device="cpu")
        begin += count
    return table
