"""The reference backend: the all_to_all implementation of deepep.reference as an engine, on gloo or NCCL
groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from deepep.engine import checks, reference_low_latency
from deepep.engine.completion import Completion
from deepep.engine.conductor import Conductor
from deepep.engine.control import dtype_code
from deepep.engine.interface import (
    Combined,
    CombineRequest,
    Dispatched,
    DispatchRequest,
    Engine,
    EngineInfo,
    EngineOptions,
    Layout,
    LowLatencyCombined,
    LowLatencyCombineRequest,
    LowLatencyDispatched,
    LowLatencyDispatchRequest,
    LowLatencyRoute,
    Observer,
    Operation,
    Route,
    Schedule,
)
from deepep.engine.lane import StreamLane
from deepep.engine.link import Link, device_type_of
from deepep.errors import ArgumentError, HandleError, ShapeError
from deepep.reference import all_to_all
from deepep.reference.all_to_all import DispatchPlan, DispatchTensors

RANKS_PER_DOMAIN = 8


class ReferenceEngine(Engine):
    """See `Engine`. Rows travel by torch.distributed's all_to_all; counts are known to every host."""

    def __init__(self, options: EngineOptions) -> None:
        group = options.group
        device_type = device_type_of(group)
        self._conductor = Conductor(group, options.timeout, device_type)
        self.info = EngineInfo("reference", group.rank(), group.size(), device_type, options)
        self._masked: frozenset[int] = frozenset()
        self._staged: Tensor | None = None
        statement = {
            "low_latency": options.low_latency,
            "masks": options.masks,
            "reduce_on_expert_rank": options.reduce_on_expert_rank,
        }
        self._conductor.agree(statement, options.problem)

    # layout

    def layout(
        self, topk_idx: Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        with self._conductor.issuing:
            try:
                return self._layout(topk_idx, num_experts, schedule)
            except ArgumentError as problem:
                # A dispatch would have come next. The others are about to call it: there they learn why not.
                self.refuse(Operation.DISPATCH, problem, replace(schedule, asynchronous=True))

    def _layout(
        self, topk_idx: Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        info = self.info
        checks.check_topk_idx(topk_idx, info.device_type)
        checks.check_num_experts(num_experts, info.num_ranks)
        topk_idx = topk_idx.detach()
        with self._conductor.lane.allocating(schedule.allocate_on_comm_stream):
            layout = _empty_layout(topk_idx, num_experts, info.num_ranks)

        def job() -> None:
            checks.check_index_range(topk_idx, num_experts)
            _fill_layout(layout, topk_idx, num_experts, info.num_ranks)

        completion = self._conductor.locally(job, schedule.after, (topk_idx, *_layout_tensors(layout)))
        return layout, self._conductor.finish(schedule, completion)

    # high throughput

    def dispatch(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        with self._conductor.issuing:
            try:
                self._check_dispatch(request)
            except ArgumentError as problem:
                self.refuse(Operation.DISPATCH, problem, schedule)
            if request.route is not None:
                return self._dispatch_cached(request, request.route, schedule)
            return self._dispatch_fresh(request, schedule)

    def _dispatch_cached(self, request: DispatchRequest, route: Route, schedule: Schedule) -> Dispatched:
        assert route.num_rows is not None
        x, scales = request.x.detach(), _detached(request.scales)
        with self._conductor.lane.allocating(schedule.allocate_on_comm_stream):
            out = _empty_rows(route.num_rows, x, scales, None, None)

        def inspect() -> None:
            plan = self._plan_of(route)
            lost = [r for r in sorted(self._conductor.membership.masked) if plan.counts[r][self.info.rank]]
            lost += [r for r in sorted(self._conductor.membership.masked) if plan.send_counts[r]]
            if lost:
                raise HandleError(
                    "handle", f"one with rows of rank {lost[0]}, masked since", "a new dispatch"
                )

        def body(link: Link, limits: dict[int, int]) -> None:
            self._conductor.enter("payload")
            all_to_all.dispatch(link, self._plan_of(route), x, scales=scales, out=out)

        completion = self._conductor.perform(
            Operation.DISPATCH,
            schedule,
            body,
            agreed=_dispatch_agreement(request, route.num_experts),
            inspect=inspect,
            num_tokens=route.num_tokens,
            tensors=(x, scales, out.x, out.scales),
        )
        finished = self._conductor.finish(schedule, completion)
        return Dispatched(out.x, out.scales, None, None, [], route, finished)

    def _dispatch_fresh(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        conductor, layout = self._conductor, request.layout
        assert layout is not None
        x, scales = request.x.detach(), _detached(request.scales)
        topk_idx, topk_weights = _detached(request.topk_idx), _detached(request.topk_weights)
        num_experts = layout.num_tokens_per_expert.numel()
        route = Route(self, x.shape[0], num_experts, layout.is_token_in_rank)
        worst = request.num_worst_tokens

        def inspect() -> None:
            checks.check_layout_values(layout.num_tokens_per_rank, layout.is_token_in_rank)
            checks.check_expert_counts(layout.num_tokens_per_expert)
            if topk_idx is not None:
                checks.check_index_range(topk_idx, num_experts)

        def count(link: Link, limits: dict[int, int]) -> None:
            conductor.enter("counts")
            plan = all_to_all.exchange_counts(link, layout.is_token_in_rank, layout.num_tokens_per_expert)
            checks.check_capacity(plan.counts, limits)
            route.plan = plan

        def send(link: Link, out: DispatchTensors) -> None:
            all_to_all.dispatch(
                link,
                self._plan_of(route),
                x,
                scales=scales,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                num_experts=num_experts,
                out=out,
            )

        def count_and_send(link: Link, limits: dict[int, int]) -> None:
            count(link, limits)
            conductor.enter("payload")
            send(link, out)

        inputs = (x, scales, topk_idx, topk_weights, *_layout_tensors(layout))
        counted = None
        if worst == 0:
            counted = conductor.perform(
                Operation.DISPATCH,
                schedule,
                count,
                agreed=_dispatch_agreement(request, num_experts),
                inspect=inspect,
                num_tokens=x.shape[0],
                tensors=inputs,
            )
            counted.host_wait()
            worst_or_exact = self._plan_of(route).num_recv_tokens
        else:
            worst_or_exact = worst
        route.num_rows = worst_or_exact
        with conductor.lane.allocating(schedule.allocate_on_comm_stream):
            out = _empty_rows(worst_or_exact, x, scales, topk_idx, topk_weights)
        touched = (*inputs, out.x, out.scales, out.topk_idx, out.topk_weights)
        if counted is not None:
            completion = conductor.proceed("payload", lambda link: send(link, out), touched)
            alignment = request.expert_alignment
            exact = self._plan_of(route).num_recv_tokens_per_expert
            expert_counts = [-(-n // alignment) * alignment for n in exact]
        else:
            completion = conductor.perform(
                Operation.DISPATCH,
                schedule,
                count_and_send,
                agreed=_dispatch_agreement(request, num_experts),
                inspect=inspect,
                num_tokens=x.shape[0],
                limit=worst,
                tensors=touched,
            )
            expert_counts = []
        finished = conductor.finish(schedule, completion)
        return Dispatched(out.x, out.scales, out.topk_idx, out.topk_weights, expert_counts, route, finished)

    def combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        conductor, route = self._conductor, request.route
        with conductor.issuing:
            try:
                self._check_combine(request)
            except ArgumentError as problem:
                self.refuse(Operation.COMBINE, problem, schedule)
            x, weights = request.x.detach(), _detached(request.topk_weights)
            biases = tuple(b.detach() for b in request.biases)
            num_topk = 0 if weights is None else weights.shape[1]
            with conductor.lane.allocating(schedule.allocate_on_comm_stream):
                out = x.new_empty(route.num_tokens, x.shape[1])
                out_weights = None if weights is None else weights.new_empty(route.num_tokens, num_topk)

            def body(link: Link, limits: dict[int, int]) -> None:
                conductor.enter("payload")
                done = all_to_all.combine(link, self._plan_of(route), x, topk_weights=weights, biases=biases)
                out.copy_(done.x)
                if out_weights is not None and done.topk_weights is not None:
                    out_weights.copy_(done.topk_weights)

            completion = conductor.perform(
                Operation.COMBINE,
                schedule,
                body,
                agreed={"hidden": x.shape[1], "x dtype": dtype_code(x.dtype), "num_topk": num_topk},
                inspect=lambda: self._check_route_ran(route),
                num_tokens=route.num_tokens,
                tensors=(x, weights, *biases, out, out_weights),
            )
            return Combined(out, out_weights, conductor.finish(schedule, completion))

    def route_counts(self, route: Route) -> Tensor:
        return torch.tensor(self._plan_of(route).counts, dtype=torch.int64)

    def restore_route(self, is_token_in_rank: Tensor, counts: Tensor, num_experts: int) -> Route:
        plan = all_to_all.restore_plan(self.info.rank, is_token_in_rank, counts.tolist())
        return Route(self, plan.num_tokens, num_experts, is_token_in_rank, plan.num_recv_tokens, plan)

    # low latency

    def low_latency_dispatch(
        self, request: LowLatencyDispatchRequest, schedule: Schedule
    ) -> LowLatencyDispatched:
        with self._conductor.issuing:
            try:
                reference_low_latency.check_dispatch(request, self.info)
            except ArgumentError as problem:
                self.refuse(Operation.LOW_LATENCY_DISPATCH, problem, schedule)
            self._staged = None
            done = reference_low_latency.dispatch(self._conductor, self.info, request, schedule)
            done.route = replace(done.route, engine=self)
            return done

    def low_latency_combine(
        self, request: LowLatencyCombineRequest, schedule: Schedule
    ) -> LowLatencyCombined:
        with self._conductor.issuing:
            try:
                if request.route.engine is not self:
                    raise HandleError("handle", "the handle of another buffer", "a handle of this buffer")
                reference_low_latency.check_combine(request, self.info)
                if request.zero_copy:
                    request = replace(request, x=self._staged_rows(request.route))
            except ArgumentError as problem:
                self.refuse(Operation.LOW_LATENCY_COMBINE, problem, schedule)
            self._staged = None
            return reference_low_latency.combine(self._conductor, self.info, request, schedule)

    def low_latency_combine_buffer(self, route: LowLatencyRoute) -> Tensor:
        # Fresh memory each time: an earlier combine may still be reading from what it was given.
        num_local = route.num_experts // self.info.num_ranks
        rows = route.ranges.new_empty(
            num_local, self.info.num_ranks * route.num_max_tokens, route.hidden, dtype=torch.bfloat16
        )
        self._staged = rows
        return rows

    def _staged_rows(self, route: LowLatencyRoute) -> Tensor:
        wanted = (
            route.num_experts // self.info.num_ranks,
            self.info.num_ranks * route.num_max_tokens,
            route.hidden,
        )
        if self._staged is None or self._staged.shape != wanted:
            allowed = (
                "get_next_low_latency_combine_buffer(handle) called since the last low-latency operation"
            )
            raise ArgumentError("zero_copy", "True, with no buffer filled for it", allowed)
        return self._staged

    # the rest

    def barrier(self, schedule: Schedule, arguments: dict[str, int] | None = None) -> None:
        with self._conductor.issuing:
            completion = self._conductor.perform(
                Operation.BARRIER, schedule, lambda link, limits: None, agreed=arguments or {}
            )
            self._conductor.finish(schedule, completion)

    def refuse(self, operation: Operation, problem: ArgumentError, schedule: Schedule) -> NoReturn:
        self._conductor.refuse(operation, problem, schedule)

    def mask(self, rank: int, masked: bool) -> None:
        conductor = self._conductor
        change = conductor.membership.mask if masked else conductor.membership.unmask
        with conductor.issuing:
            self._masked = self._masked | {rank} if masked else self._masked - {rank}
            conductor.locally(lambda: change(rank), None).host_wait()

    @property
    def masked(self) -> frozenset[int]:
        return self._masked

    def comm_stream(self) -> torch.cuda.Stream | None:
        lane = self._conductor.lane
        return lane.stream if isinstance(lane, StreamLane) else None

    def observe(self, observer: Observer | None) -> None:
        self._conductor.observer = observer

    def leave(self) -> None:
        self._conductor.leave()

    def close(self) -> None:
        self._conductor.close(self.info.options.timeout)

    # checks that need the engine

    def _check_dispatch(self, request: DispatchRequest) -> None:
        device = self.info.device_type
        checks.check_rows(request.x, device, request.scales is not None)
        num_tokens = request.x.shape[0]
        if request.scales is not None:
            checks.check_scales(request.scales, num_tokens, device)
        checks.check_int("expert_alignment", request.expert_alignment, 1)
        checks.check_int("num_worst_tokens", request.num_worst_tokens, 0)
        if request.route is not None:
            self._check_route(request.route)
            if num_tokens != request.route.num_tokens:
                allowed = f"[{request.route.num_tokens}, H], the tokens of the handle"
                raise ShapeError("x", checks.shape_text(request.x.shape), allowed)
            return
        assert request.layout is not None
        self._check_layout(request.layout, num_tokens)
        checks.check_together(topk_idx=request.topk_idx, topk_weights=request.topk_weights)
        if request.topk_idx is not None:
            checks.check_topk_idx(request.topk_idx, device, num_tokens)
            checks.check_topk_weights(request.topk_weights, request.topk_idx.shape, device)
        elif request.num_worst_tokens > 0:
            raise ArgumentError("topk_idx", "None, with num_worst_tokens", "topk_idx and topk_weights given")

    def _check_layout(self, layout: Layout, num_tokens: int) -> None:
        device, ranks = self.info.device_type, self.info.num_ranks
        checks.check_tensor(
            "num_tokens_per_rank",
            layout.num_tokens_per_rank,
            dtypes=(torch.int32,),
            device_type=device,
            shape=(ranks,),
        )
        checks.check_tensor(
            "is_token_in_rank",
            layout.is_token_in_rank,
            dtypes=(torch.bool,),
            device_type=device,
            shape=(num_tokens, ranks),
        )
        checks.check_tensor(
            "num_tokens_per_expert",
            layout.num_tokens_per_expert,
            dtypes=(torch.int32,),
            device_type=device,
            shape=("E",),
        )
        checks.check_num_experts(layout.num_tokens_per_expert.numel(), ranks, "num_tokens_per_expert")

    def _check_combine(self, request: CombineRequest) -> None:
        device, route = self.info.device_type, request.route
        self._check_route(route)
        rows = route.num_rows
        assert rows is not None
        x = checks.check_tensor(
            "x", request.x, dtypes=checks.SUM_DTYPES, device_type=device, shape=(rows, "H")
        )
        checks.check_row_bytes(x)
        if request.topk_weights is not None:
            checks.check_topk_weights(request.topk_weights, (rows, "K"), device)
        for bias in request.biases:
            checks.check_tensor(
                "bias", bias, dtypes=(x.dtype,), device_type=device, shape=(route.num_tokens, x.shape[1])
            )

    def _check_route(self, route: Route) -> None:
        if route.engine is not self:
            raise HandleError("handle", "the handle of another buffer", "a handle of this buffer")

    def _check_route_ran(self, route: Route) -> None:
        if route.plan is None:
            raise HandleError(
                "handle", "the handle of a dispatch that failed", "one of a dispatch that succeeded"
            )

    def _plan_of(self, route: Route) -> DispatchPlan:
        self._check_route_ran(route)
        plan = route.plan
        assert isinstance(plan, DispatchPlan)
        return plan


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _dispatch_agreement(request: DispatchRequest, num_experts: int) -> dict[str, int]:
    idx, scales = request.topk_idx, request.scales
    return {
        "cached": request.route is not None,
        "hidden": request.x.shape[1],
        "x dtype": dtype_code(request.x.dtype),
        "num_experts": num_experts,
        "num_scales": 0 if scales is None else scales.shape[1],
        "scales dtype": dtype_code(None if scales is None else scales.dtype),
        "num_topk": 0 if idx is None else idx.shape[1],
        "topk_idx dtype": dtype_code(None if idx is None else idx.dtype),
    }


def _layout_tensors(layout: Layout) -> tuple[Tensor | None, ...]:
    return (
        layout.num_tokens_per_rank,
        layout.num_tokens_per_domain,
        layout.num_tokens_per_expert,
        layout.is_token_in_rank,
    )


def _empty_layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> Layout:
    def counts(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=topk_idx.device)

    domains = -(-num_ranks // RANKS_PER_DOMAIN)
    return Layout(
        num_tokens_per_rank=counts(num_ranks),
        num_tokens_per_domain=counts(domains) if domains > 1 else None,
        num_tokens_per_expert=counts(num_experts),
        is_token_in_rank=torch.empty(topk_idx.shape[0], num_ranks, dtype=torch.bool, device=topk_idx.device),
    )


def _fill_layout(layout: Layout, topk_idx: Tensor, num_experts: int, num_ranks: int) -> None:
    if topk_idx.is_cuda:
        from deepep.reference.layout import dispatch_layout
    else:
        from deepep.layout import dispatch_layout  # type: ignore[assignment]
    made = dispatch_layout(topk_idx, num_experts, num_ranks, RANKS_PER_DOMAIN)
    layout.num_tokens_per_rank.copy_(made.num_tokens_per_rank)
    layout.num_tokens_per_expert.copy_(made.num_tokens_per_expert)
    layout.is_token_in_rank.copy_(made.is_token_in_rank)
    if layout.num_tokens_per_domain is not None and made.num_tokens_per_node is not None:
        layout.num_tokens_per_domain.copy_(made.num_tokens_per_node)


def _empty_rows(
    rows: int, x: Tensor, scales: Tensor | None, topk_idx: Tensor | None, topk_weights: Tensor | None
) -> DispatchTensors:
    def empty_like(field: Tensor | None) -> Tensor | None:
        return None if field is None else field.new_empty(rows, field.shape[1])

    return DispatchTensors(
        x.new_empty(rows, x.shape[1]), empty_like(scales), empty_like(topk_idx), empty_like(topk_weights)
    )
