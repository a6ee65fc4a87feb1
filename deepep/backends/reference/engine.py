"""The reference backend: the all_to_all implementation of deepep.reference as
an engine, on gloo or NCCL groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from deepep.backends.reference import high_throughput
from deepep.backends.reference.engram import ReferenceEngram
from deepep.backends.reference.gather_sessions import ReferenceSessions
from deepep.backends.reference.low_latency import LowLatencyExchange, LowLatencyOperations
from deepep.backends.reference.ring import ReferenceRing
from deepep.errors import ArgumentError
from deepep.reference import all_to_all
from deepep.reference.all_to_all import restore_plan
from deepep.reference.two_level import TwoLevelExchange
from deepep.runtime import checks
from deepep.runtime.completion import Completion
from deepep.runtime.control import admission
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.waits import WaitRecorder
from deepep.runtime.engine import Engine, EngineInfo, EngineOptions, Made, Observer
from deepep.runtime.low_latency_checks import check_gateways
from deepep.runtime.requests import (
    RANKS_PER_DOMAIN,
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

COLLECTIVES = (
    *("dispatch", "cached dispatch", "combine"),
    *("low-latency dispatch", "low-latency combine", "barrier"),
)
_BESIDE = {
    "all-gather sessions": "all_gather",
    "sends around a ring": "messages between neighbours, over gloo",
    "Engram storage": "all entries on every rank",
}


class ReferenceEngine(Engine):
    """See `Engine`. Rows travel by torch.distributed's all_to_all; counts are known to every host."""

    def __init__(self, options: EngineOptions, control: ControlPlane) -> None:
        session, self._control = control.session, control
        device_type = session.device.type
        transport = f"all_to_all over {'NCCL' if device_type == 'cuda' else 'gloo'}"
        self.info = EngineInfo(
            "reference",
            session.rank,
            session.num_ranks,
            device_type,
            options,
            operations={"layout": "torch", **dict.fromkeys(COLLECTIVES, transport), **_BESIDE},
            ranks_per_domain=options.ranks_per_domain or RANKS_PER_DOMAIN,
        )
        per_domain, num_ranks = options.ranks_per_domain, session.num_ranks
        self._exchange = TwoLevelExchange(per_domain) if 0 < per_domain < num_ranks else all_to_all
        domains = per_domain if per_domain < num_ranks else 0
        self._low_latency = LowLatencyOperations(self._control, self, LowLatencyExchange(domains))
        self._sessions = ReferenceSessions(control)
        self._ring = ReferenceRing(control)
        self._engram = ReferenceEngram(control)
        control.agree(options.statement())
        check_gateways(options, num_ranks)

    def memory(self) -> dict[str, int]:
        beside = {
            "all-gather sessions": self._sessions.memory(),
            "tensors on their way around the ring": self._ring.memory(),
            "Engram storage": self._engram.memory(),
        }
        held = {name: size for name, size in beside.items() if size}
        return {"staged rows": self._low_latency.staged_bytes, **held}

    @contextmanager
    def _issuing(self, operation: Operation, schedule: Schedule) -> Iterator[None]:
        """One operation at a time; what is found wrong inside is refused on all ranks."""
        with self._control.issuing:
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
        num_ranks, per_domain = self.info.num_ranks, self.info.ranks_per_domain
        checks.check_topk_idx(topk_idx, self.info.device_type)
        checks.check_num_experts(num_experts, num_ranks)
        topk_idx = topk_idx.detach()
        with self._control.queue.allocating(schedule.allocate_on_comm_stream):
            layout = high_throughput.empty_layout(topk_idx, num_experts, num_ranks, per_domain)

        def job() -> None:
            checks.check_index_range(topk_idx, num_experts)
            high_throughput.fill_layout(layout, topk_idx, num_experts, num_ranks, per_domain)

        tensors = (topk_idx, *high_throughput.layout_tensors(layout))
        completion = self._control.locally(job, schedule, tensors)
        return layout, self._control.finish(schedule, completion)

    def dispatch(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        with self._control.issuing:
            with self._issuing(Operation.DISPATCH, schedule):
                self._check_dispatch(request)
            if request.num_experts:
                request, schedule = self.with_layout(request, schedule)
            if request.route is not None:
                return self._dispatch_cached(request, request.route, schedule)
            return self._dispatch_fresh(request, schedule)

    def _dispatch_cached(self, request: DispatchRequest, route: Route, schedule: Schedule) -> Dispatched:
        return high_throughput.dispatch_cached(self._control, request, route, schedule, self._exchange)

    def _dispatch_fresh(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        assert request.layout is not None
        in_rank, per_expert = request.layout.is_token_in_rank, request.layout.num_tokens_per_expert
        route = Route(self, request.x.shape[0], per_expert.numel(), in_rank)
        return high_throughput.dispatch_fresh(self._control, request, route, schedule, self._exchange)

    def combine(self, request: CombineRequest, schedule: Schedule) -> Combined:
        with self._control.issuing:
            with self._issuing(Operation.COMBINE, schedule):
                self._check_combine(request)
            return high_throughput.combine(self._control, request, schedule, self._exchange)

    def _check_dispatch(self, request: DispatchRequest) -> None:
        if request.route is not None:
            checks.check_own(request.route, self)
        checks.check_dispatch(request, self.info.device_type, self.info.num_ranks)

    def _check_combine(self, request: CombineRequest) -> None:
        checks.check_own(request.route, self)
        checks.check_combine(request, self.info.device_type)

    def locally(
        self,
        make: Callable[[], Made],
        fill: Callable[[Made], None],
        given: Sequence[Tensor | None],
        schedule: Schedule,
    ) -> tuple[Made, Completion | None]:
        with self._control.issuing:
            with self._control.queue.allocating(schedule.allocate_on_comm_stream):
                made = make()
            completion = self._control.locally(lambda: fill(made), schedule, (*given, *made))
            return made, self._control.finish(schedule, completion)

    def route_counts(self, route: Route) -> Tensor:
        return torch.tensor(high_throughput.plan_of(route).counts, dtype=torch.int64, device="cpu")

    def route_sources(self, route: Route) -> Tensor | None:
        return high_throughput.plan_of(route).src_token

    def restore_route(
        self, is_token_in_rank: Tensor, counts: Tensor, num_experts: int, table: Tensor | None = None
    ) -> Route:
        plan = restore_plan(self.info.rank, is_token_in_rank, counts.tolist())
        return Route(self, plan.num_tokens, num_experts, is_token_in_rank, plan.num_recv_tokens, plan)

    # low latency

    def low_latency_dispatch(
        self, request: LowLatencyDispatchRequest, schedule: Schedule
    ) -> LowLatencyDispatched:
        return self._low_latency.dispatch(request, schedule)

    def low_latency_combine(
        self, request: LowLatencyCombineRequest, schedule: Schedule
    ) -> LowLatencyCombined:
        return self._low_latency.combine(request, schedule)

    def low_latency_combine_buffer(self, route: LowLatencyRoute) -> Tensor:
        return self._low_latency.combine_buffer(route)

    # beside them

    def gather_sessions(self) -> ReferenceSessions:
        return self._sessions

    def ring(self) -> ReferenceRing:
        return self._ring

    def engram(self) -> ReferenceEngram:
        return self._engram

    # the rest

    def barrier(self, schedule: Schedule, arguments: dict[str, int] | None = None) -> None:
        self._control.barrier(schedule, arguments)

    def gather(self, values: Tensor, agreed: Mapping[str, int]) -> dict[int, Tensor]:
        return self._control.gather(values, agreed)

    def release_memory(self) -> None:
        with self._control.issuing:
            self._control.barrier(Schedule(), operation=Operation.RELEASE_MEMORY)
            self._low_latency.staged = None
            self._sessions.release()

    def refuse(self, operation: Operation, problem: ArgumentError, schedule: Schedule) -> NoReturn:
        self._control.refuse(operation, problem, schedule)

    def mask(self, rank: int, masked: bool) -> None:
        self._control.mask(rank, masked)

    @property
    def masked(self) -> frozenset[int]:
        return self._control.masked

    def invite(self, ranks: Sequence[int]) -> str:
        return admission.invite(self._control, ranks)

    def admit(self, invitation: str) -> None:
        admission.admit(self._control, invitation)

    def dismiss(self, ranks: Sequence[int]) -> None:
        admission.dismiss(self._control, ranks)

    def control_plane(self) -> ControlPlane:
        return self._control

    def comm_stream(self) -> torch.cuda.Stream | None:
        return self._control.session.stream

    def observe(self, observer: Observer | None) -> None:
        self._control.observer = observer

    def waits(self) -> WaitRecorder | None:
        return self._control.waits

    def leave(self) -> None:
        self._control.leave()
        self._ring.close()

    def abandon(self) -> None:
        self._control.abandon()
        self._ring.close()

    def close(self) -> None:
        self._control.close(self.info.options.timeout)
        self._ring.close()
