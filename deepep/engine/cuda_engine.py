"""The CUDA backend: high-throughput operations by kernels over NVLink, inside one node.

What the kernels do not do yet (low-latency operations) goes through the reference engine underneath, over
NCCL, as do barriers and the exchange of refusals.

Streams: kernels run on the communication stream. Outputs belong to it and are recorded on the caller's
stream, so that torch's allocator knows both. Slots are lent in the communication stream's order
(deepep.engine.slots).
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepep.engine import checks
from deepep.engine.completion import Completion, CudaCompletion
from deepep.engine.fabric import share_heap
from deepep.engine.interface import (
    Combined,
    CombineRequest,
    Dispatched,
    DispatchRequest,
    EngineOptions,
    Layout,
    Operation,
    Route,
    Schedule,
)
from deepep.engine.lane import StreamLane
from deepep.engine.membership import Absent
from deepep.engine.nvlink import (
    MAX_LOCAL_EXPERTS,
    MAX_TOPK,
    Counts,
    Endpoint,
    Phase,
    Plan,
    Received,
    combine_split,
    dispatch_split,
)
from deepep.engine.reference_engine import RANKS_PER_DOMAIN, ReferenceEngine
from deepep.engine.slots import SlotPool
from deepep.errors import (
    ArgumentError,
    ArgumentTypeError,
    CapacityError,
    DeviceError,
    FaultRecord,
    HandleError,
    LayoutError,
    MismatchError,
    PeerTimeoutError,
    RangeError,
)

DEFAULT_SYMMETRIC_BYTES = 3 << 30
DEFAULT_NUM_SMS = 24


@dataclass
class NvlinkPlan(Plan):
    """A plan, and what the host knows of it if it waited: most_rows, the most that any rank receives;
    returning, the rows that combine brings back from other ranks.
    """

    most_rows: int | None = None
    returning: int | None = None


def symmetric_bytes() -> int:
    """Bytes of symmetric memory per rank: DEEPEP_SYMMETRIC_BYTES, else 3 GiB."""
    return int(os.environ.get("DEEPEP_SYMMETRIC_BYTES", DEFAULT_SYMMETRIC_BYTES))


class CudaEngine(ReferenceEngine):
    """See `Engine`."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        lane = self._conductor.lane
        assert isinstance(lane, StreamLane)
        self._lane = lane
        self.info = type(self.info)(
            "cuda", self.info.rank, self.info.num_ranks, self.info.device_type, options
        )
        self._sms = torch.cuda.get_device_properties(lane.stream.device).multi_processor_count
        self._rows_seen = 0
        self._fault: FaultRecord | None = None
        self._stale = False
        self._build()

    def _build(self) -> None:
        """Symmetric memory and an endpoint over the ranks that are not masked. Collective over them."""
        device, members = self._lane.stream.device, self._conductor.membership.members
        self._conductor.membership.begin("build")
        own = torch.empty(symmetric_bytes(), dtype=torch.uint8, device=device)
        self._heap = share_heap(own, self.info.rank, self._gather("share"))
        self._endpoint = Endpoint(
            self.info.rank,
            own,
            self._heap.addresses,
            staging_bytes=own.numel() // 4,
            timeout=self.info.options.timeout,
        )
        self._endpoint.set_live(sum(1 << r for r in members))
        self._slots = SlotPool(own, self._endpoint.slots_begin, self._lane.stream)
        self._captured: Tensor | None = None
        self._gather("ready")("")  # no rank sends before all heaps are zeroed

    def _gather(self, purpose: str) -> Callable[[Any], list[Any]]:
        """Brings every member's object to every member, by rank. Members only ever become fewer."""
        membership = self._conductor.membership
        members = tuple(membership.members)
        name = f"cuda/{'-'.join(map(str, members))}/{purpose}"

        def gather(mine: Any) -> list[Any]:
            try:
                met = membership.meet(name, pickle.dumps(mine).hex(), members)
            except Absent as absent:
                raise membership.blame(absent.missing, len(absent.seen), "they did not build") from None
            shared = {rank: pickle.loads(bytes.fromhex(value.decode())) for rank, value in met.items()}
            return [shared.get(rank) for rank in range(self.info.num_ranks)]

        return gather

    # layout

    def _layout(
        self, topk_idx: Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        checks.check_topk_idx(topk_idx, self.info.device_type)
        checks.check_num_experts(num_experts, self.info.num_ranks)
        topk_idx = topk_idx.detach()
        with self._on_lane(schedule):
            made = self._endpoint.layout(
                topk_idx, num_experts, RANKS_PER_DOMAIN, self._lane.stream.cuda_stream
            )
            layout = Layout(*made)
        completion = self._hand_out(schedule, (topk_idx,), made)
        return layout, completion

    # high throughput

    def _dispatch_fresh(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        layout = request.layout
        assert layout is not None
        self._get_ready()
        ranks, tokens = self.info.num_ranks, request.x.shape[0]
        experts = layout.num_tokens_per_expert.numel()
        worst = request.num_worst_tokens
        if worst == 0 and torch.cuda.is_current_stream_capturing():
            allowed = "more than 0 while a graph is captured: the host cannot wait for counts"
            raise ArgumentError("num_worst_tokens", "0", allowed, self.info.rank)
        capacity = worst or max(64, self._rows_seen * 5 // 4 or ranks * tokens)
        inputs = (request.x, request.scales, request.topk_idx, request.topk_weights)
        given = (*inputs, layout.num_tokens_per_rank, layout.num_tokens_per_expert, layout.is_token_in_rank)
        while True:
            slot = self._take_slot(request, capacity)
            with self._on_lane(schedule):
                received, plan = self._launch(request, slot, capacity, None, tell_host=worst == 0)
                if torch.cuda.is_current_stream_capturing():
                    received = _copied(received)
            # All that can be done before the counts are known is done now: small batches wait for the host.
            completion = self._hand_out(schedule, given, (*received.storages(), plan.counts, plan.send_row))
            if worst:
                known = NvlinkPlan(plan.counts, plan.send_row, plan.source, tokens, worst, plan.live)
                per_expert: list[int] = []
                break
            counts = self._learn_counts(experts // ranks)
            if counts.phase == Phase.TOO_MANY_ROWS:
                capacity = counts.most_rows  # all ranks learned the same, and lend anew
                continue
            self._rows_seen = max(counts.most_rows, self._rows_seen * 15 // 16)
            rows = counts.num_rows
            source = plan.source[:rows]
            most, returning = counts.most_rows, counts.returning
            known = NvlinkPlan(plan.counts, plan.send_row, source, tokens, rows, plan.live, most, returning)
            alignment = request.expert_alignment
            per_expert = counts.per_expert
            if alignment > 1:
                per_expert = [-(-n // alignment) * alignment for n in per_expert]
            break
        route = Route(self, tokens, experts, layout.is_token_in_rank, known.num_rows, known)
        out = _first_rows(received, known.num_rows)
        return Dispatched(out.x, out.scales, out.topk_idx, out.topk_weights, per_expert, route, completion)

    def _dispatch_cached(self, request: DispatchRequest, route: Route, schedule: Schedule) -> Dispatched:
        self._get_ready()
        plan = self._nvlink_plan(route)
        if plan.live != self._endpoint.live:
            stale = HandleError("handle", "one made before ranks were masked", "a new dispatch")
            self.refuse(Operation.DISPATCH, stale, schedule)
        assert route.num_rows is not None
        capacity = max(64, route.num_rows if plan.most_rows is None else plan.most_rows)
        slot = self._take_slot(request, capacity)
        with self._on_lane(schedule):
            received, _ = self._launch(request, slot, capacity, plan, tell_host=False)
            if torch.cuda.is_current_stream_capturing():
                received = _copied(received)
        out = _first_rows(received, route.num_rows)
        given = (request.x, request.scales, plan.counts, plan.send_row)
        completion = self._hand_out(schedule, given, received.storages())
        return Dispatched(out.x, out.scales, None, None, [], route, completion)

    def _launch(
        self, request: DispatchRequest, slot: Tensor, capacity: int, plan: Plan | None, *, tell_host: bool
    ) -> tuple[Received, Plan]:
        layout = request.layout
        fresh = plan is None and layout is not None
        return self._endpoint.dispatch(
            request.x.detach(),
            slot,
            capacity,
            dispatch_split(self._num_sms(request.num_sms), self.info.num_ranks),
            self._lane.stream.cuda_stream,
            plan=plan,
            scales=None if request.scales is None else request.scales.detach(),
            topk_idx=request.topk_idx if fresh else None,
            topk_weights=request.topk_weights.detach()
            if fresh and request.topk_weights is not None
            else None,
            is_token_in_rank=layout.is_token_in_rank if layout is not None and fresh else None,
            tokens_per_rank=layout.num_tokens_per_rank if layout is not None and fresh else None,
            tokens_per_expert=layout.num_tokens_per_expert if layout is not None and fresh else None,
            num_worst_tokens=request.num_worst_tokens,
            tell_host=tell_host,
        )

    def combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        with self._conductor.issuing:
            try:
                self._check_combine(request)
                plan = self._nvlink_plan(request.route)
                self._check_staging(request, plan)
            except ArgumentError as problem:
                self.refuse(Operation.COMBINE, problem, schedule)
            self._get_ready()
            x = request.x.detach()
            weights = None if request.topk_weights is None else request.topk_weights.detach()
            biases = tuple(bias.detach() for bias in request.biases)
            with self._on_lane(schedule):
                with torch.cuda.stream(self._lane.stream):
                    out = x.new_empty(plan.num_tokens, x.shape[1])
                    out_weights = (
                        None if weights is None else weights.new_empty(plan.num_tokens, weights.shape[1])
                    )
                self._endpoint.combine(
                    x,
                    plan,
                    combine_split(self._num_sms(request.num_sms), self.info.num_ranks),
                    self._lane.stream.cuda_stream,
                    topk_weights=weights,
                    biases=biases,
                    out=out,
                    out_weights=out_weights,
                )
            given = (x, weights, *biases, plan.counts, plan.send_row)
            return Combined(out, out_weights, self._hand_out(schedule, given, (out, out_weights)))

    def route_counts(self, route: Route) -> Tensor:
        return self._nvlink_plan(route).counts.to("cpu", torch.int64)

    def restore_route(self, is_token_in_rank: Tensor, counts: Tensor, num_experts: int) -> Route:
        rank, table = self.info.rank, counts.to(torch.int64)
        tokens = is_token_in_rank.shape[0]
        first_row = (table.cumsum(0) - table)[rank].to(self._endpoint.device)  # [R]
        position = is_token_in_rank.to(torch.int32).cumsum(0) - 1 + first_row
        send_row = torch.where(is_token_in_rank, position, -1).to(torch.int32)
        received = table.sum(0)
        rows = int(received[rank])
        plan = NvlinkPlan(
            table.to(self._endpoint.device, torch.int32),
            send_row,
            torch.empty(0, dtype=torch.int32, device=self._endpoint.device),
            tokens,
            rows,
            self._endpoint.live,
            int(received.max()),
        )
        return Route(self, tokens, num_experts, is_token_in_rank, rows, plan)

    # the rest

    def refuse(self, operation: Operation, problem: ArgumentError, schedule: Schedule) -> NoReturn:
        """The kernels of the others hear of it in their own call: they raise MismatchError, at the latest in
        their next.
        """
        if operation not in (Operation.DISPATCH, Operation.COMBINE):
            super().refuse(operation, problem, schedule)
        self._get_ready()
        stream = self._lane.stream
        if operation is Operation.DISPATCH:
            self._endpoint.refuse_dispatch(stream.cuda_stream)
        else:
            self._endpoint.refuse_combine(stream.cuda_stream)
        stream.synchronize()
        with contextlib.suppress(MismatchError):  # that is this rank's own doing
            self._raise_fault()
        raise problem.at(self.info.rank)

    def mask(self, rank: int, masked: bool) -> None:
        if not masked:
            allowed = "a new Buffer over all ranks: this backend does not take masked ranks in again"
            raise ArgumentError("mask", "False", allowed, self.info.rank)
        super().mask(rank, masked)
        self._stale = True

    def close(self) -> None:
        super().close()
        self._slots.close()

    # pieces

    def _check_dispatch(self, request: DispatchRequest) -> None:
        super()._check_dispatch(request)
        self._check_rows("x", request.x)
        if request.layout is not None:
            local = request.layout.num_tokens_per_expert.numel() // self.info.num_ranks
            if local > MAX_LOCAL_EXPERTS:
                allowed = f"at most {MAX_LOCAL_EXPERTS} experts per rank"
                raise RangeError("num_tokens_per_expert", f"{local} experts per rank", allowed)
        if request.topk_idx is not None and request.topk_idx.shape[1] > MAX_TOPK:
            raise RangeError("topk_idx", f"K = {request.topk_idx.shape[1]}", f"at most {MAX_TOPK}")

    def _check_combine(self, request: CombineRequest) -> None:
        super()._check_combine(request)
        if request.x.dtype != torch.bfloat16:
            raise ArgumentTypeError("x", str(request.x.dtype), "torch.bfloat16")
        self._check_rows("x", request.x)
        for bias in request.biases:
            self._check_rows("bias", bias)
        if request.topk_weights is not None and request.topk_weights.shape[1] > MAX_TOPK:
            raise RangeError("topk_weights", f"K = {request.topk_weights.shape[1]}", f"at most {MAX_TOPK}")

    def _check_rows(self, name: str, rows: Tensor) -> None:
        if rows.device != self._endpoint.device:
            raise DeviceError(name, str(rows.device), str(self._endpoint.device))
        if rows.data_ptr() % 16 != 0:
            raise LayoutError(name, "rows that do not start at a multiple of 16 bytes", "aligned rows")

    def _num_sms(self, wanted: int) -> int:
        return max(1, min(wanted or DEFAULT_NUM_SMS, self._sms))

    def _nvlink_plan(self, route: Route) -> NvlinkPlan:
        if not isinstance(route.plan, NvlinkPlan):
            raise HandleError("handle", "one whose dispatch did not finish", "a handle of a dispatch here")
        return route.plan

    def _check_staging(self, request: CombineRequest, plan: NvlinkPlan) -> None:
        topk = 0 if request.topk_weights is None else request.topk_weights.shape[1]
        room = self._endpoint.staging_capacity(request.x.shape[1] * 2, topk)
        coming = plan.num_tokens * (self.info.num_ranks - 1) if plan.returning is None else plan.returning
        if coming > room:
            raise CapacityError(
                "x", f"{coming} rows coming back", f"at most {room}: set DEEPEP_SYMMETRIC_BYTES higher"
            )

    def _take_slot(self, request: DispatchRequest, capacity: int) -> Tensor:
        topk = 0 if request.topk_idx is None else request.topk_idx.shape[1]
        size = self._endpoint.slot_bytes(
            capacity,
            request.x.shape[1] * request.x.element_size(),
            0 if request.scales is None else request.scales.shape[1],
            topk,
            8 if request.topk_idx is None else request.topk_idx.element_size(),
        )
        slot = self._graph_slot(size) if torch.cuda.is_current_stream_capturing() else self._slots.take(size)
        if slot is None:
            full = CapacityError(
                "x",
                f"{capacity} rows to receive, {size} bytes, with earlier outputs still held",
                f"{self._slots.num_bytes} bytes in all: set DEEPEP_SYMMETRIC_BYTES higher",
                self.info.rank,
            )
            self.refuse(Operation.DISPATCH, full, Schedule())
        return slot

    def _graph_slot(self, size: int) -> Tensor | None:
        """Where captured dispatches receive: one place, never freed: nobody tells when the last replay was.

        The rows are copied out of it at once, into the graph's own memory.
        """
        if self._captured is None or self._captured.numel() < size:
            self._captured = self._slots.reserve(size)
        return None if self._captured is None else self._captured[:size]

    def _on_lane(self, schedule: Schedule) -> torch.cuda.StreamContext:
        """The communication stream, behind what the schedule says comes before."""
        stream = self._lane.stream
        if schedule.after is None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        else:
            with torch.cuda.stream(stream):
                schedule.after.current_stream_wait()
        return torch.cuda.stream(stream)

    def _hand_out(
        self,
        schedule: Schedule,
        given: tuple[Tensor | None, ...],
        made: tuple[Tensor | None, ...],
    ) -> Completion | None:
        """Records what was read and written where it was; waits, or gives back the completion."""
        stream = self._lane.stream
        caller = torch.cuda.current_stream(stream.device)
        for tensor in given:
            if tensor is not None:
                tensor.record_stream(stream)
        if not schedule.allocate_on_comm_stream:
            for tensor in made:
                if tensor is not None:
                    tensor.record_stream(caller)
        done = torch.cuda.Event()
        done.record(stream)
        if schedule.asynchronous:
            return CudaCompletion(done)
        caller.wait_event(done)
        return None

    def _learn_counts(self, num_local: int) -> Counts:
        counts = self._endpoint.wait_counts(num_local)
        if counts is not None and counts.phase in (0, Phase.TOO_MANY_ROWS):
            return counts
        self._lane.stream.synchronize()
        self._raise_fault()
        raise RuntimeError("deepep: a dispatch neither finished nor left a fault record")

    def _get_ready(self) -> None:
        """Before an operation is issued: raises what stands in its way; builds anew after ranks were masked.

        After a time-out the ranks' kernels no longer count alike, and a rank that comes late may still write
        to this one's memory. So nothing runs until the missing ranks are masked; and then on other memory,
        while the old is kept for whoever still writes there.
        """
        if torch.cuda.is_current_stream_capturing():
            return
        if self._stale:
            self._lane.stream.synchronize()
            self._slots.outlive()
            self._build()
            self._stale, self._fault = False, None
        self._raise_fault()

    def _raise_fault(self) -> None:
        """Raises what a kernel has reported since the last look, or a time-out reported before."""
        if self._fault is not None:
            raise PeerTimeoutError(self._fault)
        fault = self._endpoint.take_fault(self._lane.stream.cuda_stream)
        if fault is None:
            return
        if fault.phase == "disagreement":
            ranks = ", ".join(map(str, fault.waited_on))
            raise MismatchError(
                fault.operation,
                f"other shapes, options, masks or handles than on rank {ranks}, or a refusal there",
                "the same on all ranks",
                self.info.rank,
            )
        if fault.phase == "too_many_rows":
            got = f"{fault.seen} rows for rank {', '.join(map(str, fault.waited_on))}"
            raise CapacityError("num_worst_tokens", str(fault.expected), f"at least {got}", self.info.rank)
        self._fault = fault
        raise PeerTimeoutError(fault)


def _copied(received: Received) -> Received:
    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    return Received(
        received.x.clone(),
        received.source.clone(),
        copy(received.scales),
        copy(received.topk_idx),
        copy(received.topk_weights),
    )


def _first_rows(received: Received, rows: int) -> Received:
    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:rows]

    return Received(
        received.x[:rows],
        received.source[:rows],
        cut(received.scales),
        cut(received.topk_idx),
        cut(received.topk_weights),
    )
