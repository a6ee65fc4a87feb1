"""The CUDA backend: high-throughput operations by kernels over NVLink, inside one node.

What the kernels do not do yet (low-latency operations) goes through the reference engine underneath, over
NCCL, as do barriers and the exchange of refusals.

Streams: a call that waits (no event asked for, none given) has its kernel on the caller's own stream, where
all order is given: no events, nothing to record. Any other runs on the communication stream, between events;
what it reads is recorded there, what it makes belongs to it and is recorded on the caller's stream.
Operations run in the order of the calls on whatever streams they are (csrc/bindings/cuda.cpp, Turns).

A call takes some 20 us of the host, most of it torch's: so the usual calls get by with a glance
(deepep.backends.cuda.checks), and a cached dispatch like one before with less (deepep.backends.cuda.cached).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda import checks as cuda_checks
from deepep.backends.cuda.base import CudaBase
from deepep.backends.cuda.cached import Repeat
from deepep.backends.cuda.launch import (
    Phase,
    Plan,
)
from deepep.backends.cuda.memory.arrays import ReceiveArrays, receive_spec
from deepep.backends.cuda.sm_split import ENGINE_BYTES, NO_ENGINE, combine_split, dispatch_split, engine_cut
from deepep.backends.cuda.streams import CallersStream, CommStream
from deepep.backends.reference.engine import RANKS_PER_DOMAIN
from deepep.errors import (
    ArgumentError,
    CapacityError,
    HandleError,
)
from deepep.runtime import checks, streams
from deepep.runtime.completion import Completion, CudaCompletion
from deepep.runtime.engine import EngineOptions
from deepep.runtime.requests import (
    Combined,
    CombineRequest,
    Dispatched,
    DispatchRequest,
    Layout,
    Operation,
    Route,
    Schedule,
)

DEFAULT_NUM_SMS = 24
_NOW = Schedule()


class NvlinkPlan(Plan):
    """A plan, and what the host knows of it if it waited.

    source [N] int32: source token of each received row. most_rows: the most that any rank receives.
    returning: the rows that combine brings back from other ranks. stream: that its memory belongs to.
    repeat: a cached dispatch along it.
    """

    __slots__ = ("most_rows", "repeat", "returning", "source", "stream")

    def __init__(self, plan: Plan, num_rows: int, source: Tensor | None, stream: int) -> None:
        super().__init__(plan.table, plan.num_tokens, num_rows, plan.live)
        self.source = source
        self.stream = stream
        self.most_rows: int | None = None
        self.returning: int | None = None
        self.repeat: Repeat | None = None


class CudaEngine(CudaBase):
    """See `Engine`."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._rows_seen = 0
        self._glance = cuda_checks.Glance(self, self._device)

    # layout

    def _layout(
        self, topk_idx: Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        checks.check_topk_idx(topk_idx, self.info.device_type)
        checks.check_num_experts(num_experts, self.info.num_ranks)
        with self._stream_for(schedule) as stream:
            made = self._endpoint.layout(topk_idx, num_experts, RANKS_PER_DOMAIN, stream)
        layout = Layout(*made)
        self._glance.remember(topk_idx, layout)
        return layout, self._hand_out(schedule, (topk_idx,), made)

    # high throughput

    def dispatch(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        with self._conductor.issuing:
            try:
                self._check_dispatch(request)
                plan = None if request.route is None else self._cached_plan(request.route)
            except ArgumentError as problem:
                self.refuse(Operation.DISPATCH, problem, schedule)
            capturing = self._get_ready(Operation.DISPATCH)
            if plan is None:
                return self._fresh(request, schedule, capturing)
            assert request.route is not None
            return self._cached(request, request.route, plan, schedule, capturing)

    def _fresh(self, request: DispatchRequest, schedule: Schedule, capturing: bool) -> Dispatched:
        layout = request.layout
        assert layout is not None
        x, scales, topk_idx, weights = request.x, request.scales, request.topk_idx, request.topk_weights
        ranks, tokens, worst = self.info.num_ranks, x.shape[0], request.num_worst_tokens
        experts = layout.num_tokens_per_expert.shape[0]
        if worst == 0 and capturing:
            allowed = "more than 0 while a graph is captured: the host cannot wait for counts"
            raise ArgumentError("num_worst_tokens", "0", allowed, self.info.rank)
        capacity = worst or max(64, self._rows_seen * 5 // 4 or ranks * tokens)
        is_guess = worst == 0
        given = (
            *(x, scales, topk_idx, weights),
            *(layout.num_tokens_per_rank, layout.num_tokens_per_expert, layout.is_token_in_rank),
        )
        while True:
            with self._stream_for(schedule) as stream:
                plan = self._endpoint.new_plan(tokens, capacity)
                received = self._lend(request, capacity, is_guess, capturing, stream)
                self._endpoint.dispatch(
                    x,
                    received,
                    dispatch_split(self._num_sms(request.num_sms), ranks),
                    stream,
                    plan,
                    scales=scales,
                    topk_idx=topk_idx,
                    topk_weights=weights,
                    is_token_in_rank=layout.is_token_in_rank,
                    tokens_per_rank=layout.num_tokens_per_rank,
                    tokens_per_expert=layout.num_tokens_per_expert,
                    num_worst_tokens=worst,
                    tell_host=worst == 0,
                )
                if capturing or (worst and received.overflow_stream):
                    received = self._memory.copy_out(received, worst)
            # All that can be done before the counts are known is done now: small batches wait for the host.
            if received.overflow_stream is None:
                completion = self._hand_out(schedule, given, (*received.tensors(), plan.table))
            if worst:
                rows, per_expert = worst, []
                known = NvlinkPlan(plan, rows, received.source, stream)
                break
            counts = self._learn_counts(experts // ranks)
            if counts.phase == Phase.TOO_MANY_ROWS:
                capacity, is_guess = counts.most_rows, False  # all ranks learned the same, and acquire anew
                continue
            self._rows_seen = max(counts.most_rows, self._rows_seen * 15 // 16)
            rows, per_expert = counts.num_rows, counts.per_expert
            if received.overflow_stream is None:
                received.cut(rows)
            else:
                received = self._memory.copy_out(received, rows)
                completion = self._hand_out(schedule, given, (*received.tensors(), plan.table))
            known = NvlinkPlan(plan, rows, received.source, stream)
            known.most_rows, known.returning = counts.most_rows, counts.returning
            known.known = counts.table
            alignment = request.expert_alignment
            if alignment > 1:
                per_expert = [-(-n // alignment) * alignment for n in per_expert]
            break
        route = Route(self, tokens, experts, layout.is_token_in_rank, rows, known)
        return Dispatched(
            received.x,
            received.scales,
            received.topk_idx,
            received.topk_weights,
            per_expert,
            route,
            completion,
        )

    def _cached(
        self,
        request: DispatchRequest,
        route: Route,
        plan: NvlinkPlan,
        schedule: Schedule,
        capturing: bool,
    ) -> Dispatched:
        x, scales = request.x, request.scales
        capacity = max(64, plan.num_rows if plan.most_rows is None else plan.most_rows)
        with self._stream_for(schedule) as stream:
            received = self._lend(request, capacity, False, capturing, stream)
            split = dispatch_split(self._num_sms(request.num_sms), self.info.num_ranks)
            self._endpoint.dispatch_cached(x, scales, received, split, stream, plan)
            if plan.stream != stream:
                plan.table.record_stream(streams.current(self._index))
            if capturing or received.overflow_stream:
                received = self._memory.copy_out(received, plan.num_rows)
            else:
                if plan.num_rows != capacity:
                    received.cut(plan.num_rows)
                self._remember(request, plan, capacity)
        completion = self._hand_out(schedule, (x, scales), received.tensors())
        return Dispatched(received.x, received.scales, None, None, [], route, completion)

    def _remember(self, request: DispatchRequest, plan: NvlinkPlan, capacity: int) -> None:
        """A cached dispatch that went the usual way."""
        x, scales, known = request.x, request.scales, plan.repeat
        spec = receive_spec(x, scales, None, with_source=False)
        # No shorter way while the overflow area has to grow before anything is acquired.
        if spec.num_bytes(capacity) > self._memory.overflow.num_bytes:
            return
        if known is not None and known.memory is self._memory and known.addresses(x, scales, request.num_sms):
            return
        assert plan.repeated is not None
        plan.repeat = Repeat(
            self._index,
            x.shape,
            x.dtype,
            None if scales is None else (scales.dtype, scales.shape, scales.stride()),
            request.num_sms,
            spec.templates(capacity, self._device),
            plan.repeated[1],
            self._memory,
        )

    def dispatch_again(
        self, x: object, scales: object, route: Route, num_sms: int
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        plan = route.plan
        like = plan.repeat if type(plan) is NvlinkPlan else None
        given = like.addresses(x, scales, num_sms) if like is not None else None
        if like is None or given is None:
            return None
        with self._conductor.issuing:
            stream = streams.current_address(self._index)
            if like.memory is not self._memory or plan.stream != stream or self._is_held_up():
                return None
            if torch.cuda.is_current_stream_capturing():
                return None
            made = self._memory.pool.acquire_now(like.templates, stream)
            if made is None:
                return None
            self._endpoint.repeat(like.call, given, made, stream)
            rows = plan.num_rows
            if rows != made[0].shape[0]:
                for tensor in made:
                    tensor.resize_(rows, tensor.shape[1])
            return made[0] if like.scales is None else (made[0], made[1])

    def combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        with self._conductor.issuing:
            try:
                self._check_combine(request)
                plan = self._nvlink_plan(request.route)
                self._check_staging(request, plan)
            except ArgumentError as problem:
                self.refuse(Operation.COMBINE, problem, schedule)
            self._get_ready(Operation.COMBINE)
            x, weights, biases = request.x, request.topk_weights, request.biases
            tokens = plan.num_tokens
            sms, ranks = self._num_sms(request.num_sms), self.info.num_ranks
            leaves_it = x.numel() * 2 >= ENGINE_BYTES * (ranks - 1)
            with self._stream_for(schedule) as stream:
                out = torch.empty((tokens, x.shape[1]), dtype=torch.bfloat16, device=self._device)
                out_weights = None
                if weights is not None:
                    columns = weights.shape[1]
                    out_weights = torch.empty((tokens, columns), dtype=torch.float32, device=self._device)
                self._endpoint.combine(
                    x,
                    plan,
                    combine_split(sms, ranks),
                    stream,
                    topk_weights=weights,
                    biases=biases,
                    out=out,
                    out_weights=out_weights,
                    engine_cut=engine_cut(sms, ranks) if leaves_it else NO_ENGINE,
                )
                if plan.stream != stream:
                    plan.table.record_stream(streams.current(self._index))
            completion = self._hand_out(schedule, (x, weights, *biases), (out, out_weights))
            return Combined(out, out_weights, completion)

    def route_counts(self, route: Route) -> Tensor:
        return self._nvlink_plan(route).counts.to("cpu", torch.int64)

    def route_sources(self, route: Route) -> Tensor | None:
        return self._nvlink_plan(route).source

    def restore_route(self, is_token_in_rank: Tensor, counts: Tensor, num_experts: int) -> Route:
        rank, table = self.info.rank, counts.to(torch.int64)
        tokens = is_token_in_rank.shape[0]
        first_row = (table.cumsum(0) - table)[rank].to(self._device)  # [R]
        position = is_token_in_rank.to(torch.int32).cumsum(0) - 1 + first_row
        send_row = torch.where(is_token_in_rank, position, -1).to(torch.int32)
        received = table.sum(0)
        rows = int(received[rank])
        both = torch.cat([send_row, table.to(self._device, torch.int32)])
        made = Plan(both, tokens, rows, self._endpoint.live)
        plan = NvlinkPlan(made, rows, None, streams.current_address(self._index))
        plan.most_rows = int(received.max())
        plan.known = _cuda.RowCounts(table.flatten().tolist())
        return Route(self, tokens, num_experts, is_token_in_rank, rows, plan)

    # pieces

    def _check_dispatch(self, request: DispatchRequest) -> None:
        if not self._glance.sees_nothing_wrong(request):
            super()._check_dispatch(request)
            cuda_checks.check_dispatch(request, self._device, self.info.num_ranks)

    def _check_combine(self, request: CombineRequest) -> None:
        if not self._glance.sees_nothing_wrong(request):
            super()._check_combine(request)
            cuda_checks.check_combine(request, self._device)

    def _num_sms(self, wanted: int) -> int:
        return max(1, min(wanted or DEFAULT_NUM_SMS, self._sms))

    def _nvlink_plan(self, route: Route) -> NvlinkPlan:
        if not isinstance(route.plan, NvlinkPlan):
            raise HandleError("handle", "one whose dispatch did not finish", "a handle of a dispatch here")
        return route.plan

    def _cached_plan(self, route: Route) -> NvlinkPlan:
        plan = self._nvlink_plan(route)
        live = self._endpoint.live
        if self._stale:
            live = sum(1 << r for r in self._conductor.membership.members)
        if plan.live != live:
            raise HandleError("handle", "one made while other ranks were masked", "a new dispatch")
        return plan

    def _check_staging(self, request: CombineRequest, plan: NvlinkPlan) -> None:
        topk = 0 if request.topk_weights is None else request.topk_weights.shape[1]
        room = self._endpoint.staging_capacity(request.x.shape[1] * 2, topk)
        coming = plan.num_tokens * (self.info.num_ranks - 1) if plan.returning is None else plan.returning
        if coming > room:
            raise CapacityError(
                "x", f"{coming} rows coming back", f"at most {room}: set DEEPEP_SYMMETRIC_BYTES higher"
            )

    def _lend(
        self, request: DispatchRequest, capacity: int, is_guess: bool, capturing: bool, stream: int
    ) -> ReceiveArrays:
        """Where `capacity` rows can arrive, or fewer if that is a guess, for the current stream, `stream`."""
        memory = self._memory
        spec = receive_spec(request.x, request.scales, request.topk_idx, with_source=request.route is None)
        if capturing:
            received = memory.acquire_for_graph(spec, capacity)
        else:
            received = memory.acquire(spec, capacity, is_guess, stream)
        if received is None:
            size = spec.num_bytes(capacity)
            got = f"{capacity} rows to receive, {size} bytes"
            full = CapacityError("x", got, memory.shortage(size, capturing), self.info.rank)
            self.refuse(Operation.DISPATCH, full, _NOW)
        return received

    def _stream_for(self, schedule: Schedule) -> CallersStream | CommStream:
        """Where an operation runs; inside, that is the current stream. Gives its address."""
        if schedule.after is None and not schedule.asynchronous:
            return CallersStream(self._index)
        return CommStream(self._comm, self._endpoint, schedule.after)

    def _hand_out(
        self, schedule: Schedule, given: tuple[Tensor | None, ...], made: tuple[Tensor | None, ...]
    ) -> Completion | None:
        """Of what ran on the communication stream: records what was read and made where it was; waits, or
        gives back the completion.
        """
        if schedule.after is None and not schedule.asynchronous:
            return None
        caller = streams.current(self._index)
        for tensor in given:
            if tensor is not None:
                tensor.record_stream(self._comm)
        if schedule.allocate_on_comm_stream:
            self._memory.pool.users.add_current()  # it may read them, and torch is not told
        else:
            for tensor in made:
                if tensor is not None:
                    tensor.record_stream(caller)
        done = torch.cuda.Event()
        done.record(self._comm)
        if schedule.asynchronous:
            return CudaCompletion(done)
        caller.wait_event(done)
        return None
