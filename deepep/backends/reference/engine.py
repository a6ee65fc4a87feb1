"""The reference backend: the all_to_all implementation of deepep.reference as an engine, on gloo or NCCL
groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from deepep.backends.reference import high_throughput, low_latency
from deepep.errors import ArgumentError, DeepEPError, HandleError
from deepep.reference.all_to_all import restore_plan
from deepep.runtime import checks
from deepep.runtime.completion import Completion
from deepep.runtime.control.comm_queue import StreamLane
from deepep.runtime.control.issue import Conductor
from deepep.runtime.control.transport import device_type_of
from deepep.runtime.engine import Engine, EngineInfo, EngineOptions, Observer
from deepep.runtime.requests import (
    Combined,
    CombineRequest,
    Dispatched,
    DispatchRequest,
    Layout,
    LowLatencyCombined,
    LowLatencyCombineRequest,
    LowLatencyDispatched,
    LowLatencyDispatchRequest,
    LowLatencyRoute,
    Operation,
    Route,
    Schedule,
)

RANKS_PER_DOMAIN = high_throughput.RANKS_PER_DOMAIN
COLLECTIVES = (
    *("dispatch", "cached dispatch", "combine"),
    *("low-latency dispatch", "low-latency combine", "barrier"),
)


class ReferenceEngine(Engine):
    """See `Engine`. Rows travel by torch.distributed's all_to_all; counts are known to every host."""

    def __init__(self, options: EngineOptions) -> None:
        group = options.group
        device_type = device_type_of(group)
        self._conductor = Conductor(group, options.timeout, device_type)
        transport = f"all_to_all over {'NCCL' if device_type == 'cuda' else 'gloo'}"
        self.info = EngineInfo(
            "reference",
            group.rank(),
            group.size(),
            device_type,
            options,
            operations={"layout": "torch", **dict.fromkeys(COLLECTIVES, transport)},
            ranks_per_domain=RANKS_PER_DOMAIN,
        )
        self._masked: frozenset[int] = frozenset()
        self._staged: Tensor | None = None
        try:
            self._conductor.agree(options.statement(), options.problem)
        except DeepEPError:
            self._conductor.close(0.0)
            raise

    @contextmanager
    def _issuing(self, operation: Operation, schedule: Schedule) -> Iterator[None]:
        """One operation at a time; what is found wrong inside is told to the others."""
        with self._conductor.issuing:
            try:
                yield
            except ArgumentError as problem:
                self.refuse(operation, problem, schedule)

    # high throughput

    def layout(
        self, topk_idx: Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        # If this is refused, a dispatch would have come next: there the others, who call it, learn why not.
        with self._issuing(Operation.DISPATCH, replace(schedule, asynchronous=True)):
            return self._layout(topk_idx, num_experts, schedule)

    def _layout(
        self, topk_idx: Tensor, num_experts: int, schedule: Schedule
    ) -> tuple[Layout, Completion | None]:
        num_ranks = self.info.num_ranks
        checks.check_topk_idx(topk_idx, self.info.device_type)
        checks.check_num_experts(num_experts, num_ranks)
        topk_idx = topk_idx.detach()
        with self._conductor.lane.allocating(schedule.allocate_on_comm_stream):
            layout = high_throughput.empty_layout(topk_idx, num_experts, num_ranks)

        def job() -> None:
            checks.check_index_range(topk_idx, num_experts)
            high_throughput.fill_layout(layout, topk_idx, num_experts, num_ranks)

        tensors = (topk_idx, *high_throughput.layout_tensors(layout))
        completion = self._conductor.locally(job, schedule, tensors)
        return layout, self._conductor.finish(schedule, completion)

    def dispatch(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        with self._conductor.issuing:
            with self._issuing(Operation.DISPATCH, schedule):
                self._check_dispatch(request)
            if request.route is not None:
                return self._dispatch_cached(request, request.route, schedule)
            return self._dispatch_fresh(request, schedule)

    def _dispatch_cached(self, request: DispatchRequest, route: Route, schedule: Schedule) -> Dispatched:
        return high_throughput.dispatch_cached(self._conductor, request, route, schedule)

    def _dispatch_fresh(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        assert request.layout is not None
        in_rank, per_expert = request.layout.is_token_in_rank, request.layout.num_tokens_per_expert
        route = Route(self, request.x.shape[0], per_expert.numel(), in_rank)
        return high_throughput.dispatch_fresh(self._conductor, request, route, schedule)

    def combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        with self._conductor.issuing:
            with self._issuing(Operation.COMBINE, schedule):
                self._check_combine(request)
            return high_throughput.combine(self._conductor, request, schedule)

    def _check_dispatch(self, request: DispatchRequest) -> None:
        if request.route is not None:
            self._check_own(request.route)
        high_throughput.check_dispatch(request, self.info)

    def _check_combine(self, request: CombineRequest) -> None:
        self._check_own(request.route)
        high_throughput.check_combine(request, self.info)

    def route_counts(self, route: Route) -> Tensor:
        return torch.tensor(high_throughput.plan_of(route).counts, dtype=torch.int64)

    def route_sources(self, route: Route) -> Tensor | None:
        return high_throughput.plan_of(route).src_token

    def restore_route(self, is_token_in_rank: Tensor, counts: Tensor, num_experts: int) -> Route:
        plan = restore_plan(self.info.rank, is_token_in_rank, counts.tolist())
        return Route(self, plan.num_tokens, num_experts, is_token_in_rank, plan.num_recv_tokens, plan)

    # low latency

    def low_latency_dispatch(
        self, request: LowLatencyDispatchRequest, schedule: Schedule
    ) -> LowLatencyDispatched:
        with self._conductor.issuing:
            with self._issuing(Operation.LOW_LATENCY_DISPATCH, schedule):
                low_latency.check_dispatch(request, self.info)
            self._staged = None
            done = low_latency.dispatch(self._conductor, self.info, request, schedule)
            done.route = replace(done.route, engine=self)
            return done

    def low_latency_combine(
        self, request: LowLatencyCombineRequest, schedule: Schedule
    ) -> LowLatencyCombined:
        with self._conductor.issuing:
            with self._issuing(Operation.LOW_LATENCY_COMBINE, schedule):
                self._check_own(request.route)
                low_latency.check_combine(request, self.info)
                if request.zero_copy:
                    request = replace(request, x=self._staged_rows(request.route))
            self._staged = None
            return low_latency.combine(self._conductor, self.info, request, schedule)

    def low_latency_combine_buffer(self, route: LowLatencyRoute) -> Tensor:
        self._check_own(route)
        # Fresh memory each time: an earlier combine may still be reading from what it was given.
        self._staged = route.ranges.new_empty(self._slot_shape(route), dtype=torch.bfloat16)
        return self._staged

    def _staged_rows(self, route: LowLatencyRoute) -> Tensor:
        if self._staged is None or self._staged.shape != self._slot_shape(route):
            allowed = "get_next_low_latency_combine_buffer called since the last low-latency operation"
            raise ArgumentError("zero_copy", "True, with no buffer filled for it", allowed)
        return self._staged

    def _slot_shape(self, route: LowLatencyRoute) -> tuple[int, int, int]:
        num_ranks = self.info.num_ranks
        return route.num_experts // num_ranks, num_ranks * route.num_max_tokens, route.hidden

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
            conductor.locally(lambda: change(rank), Schedule()).host_wait()

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

    def _check_own(self, route: Route | LowLatencyRoute) -> None:
        if route.engine is not self:
            raise HandleError("handle", "the handle of another buffer", "a handle of this buffer")
