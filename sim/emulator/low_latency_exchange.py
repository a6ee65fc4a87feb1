"""The low-latency operations of the emulator backend: the kernels run on the CPU, on one rank for all.

As deepep.sim.emulator.all_to_all: the lowest rank carries every operation out on an emulated machine of its
own. A hooked call launches both halves, as its kernels would be launched, when it sends; the hook hands out
what they made. What a dispatch leaves for its combine stays with the rank, and goes along with the combine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep import _emulator
from deepep.backends.reference.low_latency import KeptFromDispatch, LowLatencyExchange, LowLatencyUnderway
from deepep.errors import MismatchError
from deepep.reference.all_to_all_low_latency import LowLatencyTensors
from deepep.reference.wire import Wire
from deepep.runtime.control.lines import LineRecorder
from deepep.runtime.control.waits import WaitRecorder
from deepep.runtime.engine import Reduction
from deepep.runtime.requests import LowLatencyCombineRequest, LowLatencyDispatchRequest
from deepep.sim.emulator import shapes
from deepep.sim.emulator.calls import DISAGREEMENT
from deepep.sim.emulator.leader import EmulatedFailure, at_leader
from deepep.sim.emulator.lines import add_lines, asks_for
from deepep.sim.emulator.low_latency import (
    BOTH,
    RECEIVE,
    SEND,
    EmulatedLowLatency,
    KeptHandle,
    LowLatencyCall,
    LowLatencyGpu,
    LowLatencySizes,
    RowCast,
)
from deepep.sim.emulator.low_latency_far import EmulatedFarLowLatency, far_network

#: Shapes of launches, which take turns with the operations.
LOW_LATENCY_GPUS = (
    LowLatencyGpu(num_blocks=2, num_threads=64),
    LowLatencyGpu(num_blocks=1, num_threads=128, calls_before=7),
    LowLatencyGpu(num_blocks=3, num_threads=64, calls_before=0xFFFFFFFE),
)


@dataclass(frozen=True)
class _DispatchShare:
    """One rank's share of a dispatch. measures: its kernels add up how long they wait for each rank; records:
    their warps write time lines.
    """

    x: Tensor
    call: LowLatencyCall
    cast: RowCast
    members: tuple[int, ...]
    hooked: bool
    measures: bool
    records: bool


@dataclass(frozen=True)
class _CombineShare:
    """One rank's share of a combine. kept: None if its handle is of no dispatch on kernels."""

    x: Tensor
    call: LowLatencyCall | None
    kept: KeptHandle | None
    members: tuple[int, ...]
    hooked: bool
    measures: bool
    records: bool


@dataclass(frozen=True)
class _Disagreement:
    """The finding of a rank's kernel."""

    waited_on: tuple[int, ...]


@dataclass(frozen=True)
class EmulatedUnderway:
    """An operation that has run already; its results are handed out when they are asked for."""

    wire: Wire
    made: Any

    def wait(self) -> None:
        """There is nothing to wait for."""

    def finish(self, out: Any) -> None:
        """Hands out a dispatch's tensors, or a combine's sums."""
        if isinstance(out, Tensor):
            out.copy_(self.made)
            return
        assert isinstance(out, LowLatencyTensors)
        x, scales, count, source, ranges = self.made
        out.recv_x.view(torch.uint8).copy_(x.view(torch.uint8))
        if out.recv_scales is not None:
            out.recv_scales.copy_(scales)
        for to, made in ((out.recv_count, count), (out.recv_src_info, source), (out.layout_range, ranges)):
            to.copy_(made)


class EmulatedLowLatencyExchange(LowLatencyExchange):
    """See the module. One per engine; `seed`: DEEPEP_EMULATOR_SEED. recorder: where kernels' waits for each
    rank are added up while it asks for them, in nanoseconds of the emulated machine. ranks_per_domain: where
    there are several domains, which share no memory; 0: one has all ranks. lines: where time lines of warps
    are added while it asks for them, if anywhere. has_gateways: between domains calls go in two levels.
    """

    def __init__(
        self,
        seed: int,
        recorder: WaitRecorder,
        ranks_per_domain: int,
        lines: LineRecorder | None = None,
        has_gateways: bool = False,
    ) -> None:
        super().__init__(ranks_per_domain)
        self._seed, self._recorder, self._has_gateways = seed, recorder, has_gateways
        self._lines = lines
        self._operations = 0

    def start_dispatch(
        self, wire: Wire, request: LowLatencyDispatchRequest, kept: KeptFromDispatch, hooked: bool
    ) -> LowLatencyUnderway:
        self._operations += 1
        carries_weights = request.topk_weights is not None
        weights = request.topk_weights
        if weights is None:
            weights = torch.zeros(request.topk_idx.shape, dtype=torch.float32, device="cpu")
        call = LowLatencyCall(
            topk_idx=request.topk_idx,
            topk_weights=weights,
            num_max_tokens=request.num_max_tokens,
            num_local_experts=request.num_experts // wire.num_ranks,
            hidden=request.x.shape[1],
            carries_weights=carries_weights,
        )
        cast = RowCast(request.use_fp8, request.round_scale, request.use_ue8m0)
        asks = self._recorder.asks, asks_for(self._lines)
        share = _DispatchShare(request.x, call, cast, wire.members, hooked, *asks)
        made, handle, waits, lines = _agreed(
            at_leader(wire, share, self._run_dispatch), wire, "low_latency_dispatch"
        )
        self._note("low_latency_dispatch", waits)
        add_lines(self._lines, lines)
        kept.by_kernels = (handle, carries_weights)
        return EmulatedUnderway(wire, made)

    def start_combine(
        self, wire: Wire, request: LowLatencyCombineRequest, reduction: Reduction, hooked: bool
    ) -> LowLatencyUnderway:
        self._operations += 1
        route, call, kept = request.route, None, None
        plan = route.plan.by_kernels if isinstance(route.plan, KeptFromDispatch) else None
        if plan is not None and request.topk_idx.shape[1] == plan[0].num_topk:
            kept, carries_weights = plan
            call = LowLatencyCall(
                topk_idx=request.topk_idx,
                topk_weights=request.topk_weights,
                num_max_tokens=route.num_max_tokens,
                num_local_experts=route.num_experts // wire.num_ranks,
                hidden=route.hidden,
                carries_weights=carries_weights,
                exact=reduction == "exact",
                logfmt=request.use_logfmt,
            )
        asks = self._recorder.asks, asks_for(self._lines)
        share = _CombineShare(request.x, call, kept, wire.members, hooked, *asks)
        made = at_leader(wire, share, self._run_combine)
        if made is None:  # some rank's handle was put together of other tensors than a dispatch's
            return super().start_combine(wire, request, reduction, hooked)
        sums, waits, lines = _agreed(made, wire, "low_latency_combine")
        self._note("low_latency_combine", waits)
        add_lines(self._lines, lines)
        return EmulatedUnderway(wire, sums)

    def _note(self, operation: str, waits: list[int] | None) -> None:
        if waits is not None:
            self._recorder.add(operation, "kernels", dict(enumerate(waits)))

    # ---- on the leader -------------------------------------------------------------------------------------

    def _run_dispatch(self, given: dict[int, _DispatchShare], num_ranks: int) -> dict[int, Any]:
        some = next(iter(given.values()))
        domain = self._new_domain(num_ranks, some.call)
        at = {}
        for rank, mine in given.items():
            domain.set_live(rank, mine.members)
            if mine.measures:
                domain.measure_waits(rank)
            if mine.records:
                domain.record_lines(rank)
            handle = domain.new_handle(rank, mine.call)
            args, results = domain.dispatch(rank, mine.call, mine.cast, mine.x, handle)
            for halves in (SEND, RECEIVE) if mine.hooked else (BOTH,):
                domain.launch_dispatch(rank, args, halves)
            at[rank] = handle, results
        disagreements = _run_to_the_end(domain)
        if disagreements:
            return dict.fromkeys(given, disagreements[0])
        return {
            rank: (
                domain.read_results(rank, mine.call, mine.cast, at[rank][1]),
                domain.read_handle(rank, mine.call, at[rank][0]),
                domain.read_waits(rank) if mine.measures else None,
                domain.read_lines(rank) if mine.records else None,
            )
            for rank, mine in given.items()
        }

    def _run_combine(self, given: dict[int, _CombineShare], num_ranks: int) -> dict[int, Any]:
        calls = {rank: mine.call for rank, mine in given.items() if mine.call is not None}
        if len(calls) != len(given):
            return dict.fromkeys(given, None)
        domain = self._new_domain(num_ranks, next(iter(calls.values())))
        at = {}
        for rank, mine in given.items():
            assert mine.kept is not None
            domain.set_live(rank, mine.members)
            if mine.measures:
                domain.measure_waits(rank)
            if mine.records:
                domain.record_lines(rank)
            handle = domain.given_handle(rank, calls[rank], mine.kept)
            args, at[rank] = domain.combine(rank, calls[rank], mine.x, handle)
            for halves in (SEND, RECEIVE) if mine.hooked else (BOTH,):
                domain.launch_combine(rank, args, halves)
        disagreements = _run_to_the_end(domain)
        if disagreements:
            return dict.fromkeys(given, disagreements[0])
        return {
            rank: (
                domain.read(rank, at[rank], torch.bfloat16, (call.topk_idx.shape[0], call.hidden)),
                domain.read_waits(rank) if given[rank].measures else None,
                domain.read_lines(rank) if given[rank].records else None,
            )
            for rank, call in calls.items()
        }

    def _new_domain(self, num_ranks: int, call: LowLatencyCall) -> EmulatedLowLatency:
        number = self._seed * 1_000_003 + self._operations
        num_topk = call.topk_idx.shape[1]
        stretches = (1, num_ranks)[number % 2] if call.exact else 0
        sizes = LowLatencySizes(call.num_local_experts, call.num_max_tokens, num_topk, call.hidden, stretches)
        per_domain = self._per_domain
        gpu = LOW_LATENCY_GPUS[number % len(LOW_LATENCY_GPUS)]
        machine = _emulator.Machine(
            num_ranks=num_ranks,
            copy_engines=False,
            max_blocks=gpu.num_blocks,
            max_threads=gpu.num_threads,
            strategy=shapes.STRATEGIES[number % len(shapes.STRATEGIES)],
            seed=number,
            max_steps=10**9,
            **(far_network(num_ranks, per_domain, sizes, self._has_gateways) if per_domain else {}),
        )
        made_for = (machine, _emulator.own_kernels(), gpu, num_ranks, sizes)
        if per_domain:
            return EmulatedFarLowLatency(
                *made_for, ranks_per_domain=per_domain, has_gateways=self._has_gateways
            )
        return EmulatedLowLatency(*made_for)


def _run_to_the_end(domain: EmulatedLowLatency) -> list[_Disagreement]:
    """Runs all; the disagreements that ranks have found. Raises EmulatedFailure for anything else."""
    while (outcome := domain.machine.run()).status != "done":
        if outcome.status == "failed":
            raise EmulatedFailure(f"{outcome.kind}: {outcome.text}")
    found = []
    for rank in range(domain.num_ranks):
        fault = domain.take_fault(rank)
        if fault is not None and fault.phase != DISAGREEMENT:
            raise EmulatedFailure(f"rank {rank} gave up waiting: {fault}")
        if fault is not None:
            found.append(_Disagreement(fault.waited_on))
    return found


def _agreed(made: Any, wire: Wire, operation: str) -> Any:
    """Hands on what kernels have made. Raises MismatchError if they have found that ranks disagree."""
    if isinstance(made, _Disagreement):
        ranks = ", ".join(map(str, made.waited_on))
        got = f"other handles or top-k indices than elsewhere on ranks {ranks}"
        raise MismatchError(operation, got, "those of one dispatch", wire.rank)
    return made
