"""The reference backend's high-throughput operations, on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deepep.backends.reference.wire import wire_over
from deepep.errors import CapacityError, HandleError
from deepep.reference import all_to_all
from deepep.reference.all_to_all import CombineTensors, DispatchPlan, DispatchTensors
from deepep.reference.wire import Wire
from deepep.runtime import checks
from deepep.runtime.control.agreement import dtype_code
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.transport import Link
from deepep.runtime.requests import (
    RANKS_PER_DOMAIN,
    Combined,
    CombineRequest,
    Dispatched,
    DispatchRequest,
    Layout,
    Operation,
    Route,
    Schedule,
)


class RowExchange(Protocol):
    """Transport of rows: all_to_all (deepep.reference), or something else with its functions."""

    def exchange_counts(
        self, wire: Wire, is_token_in_rank: Tensor, num_tokens_per_expert: Tensor | None = None
    ) -> DispatchPlan: ...

    def dispatch(
        self,
        wire: Wire,
        plan: DispatchPlan,
        x: Tensor,
        *,
        scales: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_experts: int,
        out: DispatchTensors,
    ) -> object: ...

    def combine(
        self,
        wire: Wire,
        plan: DispatchPlan,
        x: Tensor,
        *,
        topk_weights: Tensor | None,
        biases: tuple[Tensor, ...],
    ) -> CombineTensors: ...


# Layout


def empty_layout(
    topk_idx: Tensor, num_experts: int, num_ranks: int, ranks_per_domain: int = RANKS_PER_DOMAIN
) -> Layout:
    """A layout's tensors, to be filled. Raises CapacityError."""

    def counts(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=topk_idx.device)

    domains = -(-num_ranks // ranks_per_domain)
    with checks.memory_for("num_experts", num_experts):
        per_expert = counts(num_experts)
    return Layout(
        num_tokens_per_rank=counts(num_ranks),
        num_tokens_per_domain=counts(domains) if domains > 1 else None,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=torch.empty(topk_idx.shape[0], num_ranks, dtype=torch.bool, device=topk_idx.device),
    )


def fill_layout(
    layout: Layout,
    topk_idx: Tensor,
    num_experts: int,
    num_ranks: int,
    ranks_per_domain: int = RANKS_PER_DOMAIN,
) -> None:
    """The compiled rules on the host, the reference's on a device."""
    if topk_idx.is_cuda:
        from deepep.reference.layout import dispatch_layout
    else:
        from deepep.layout import dispatch_layout  # type: ignore[assignment]
    made = dispatch_layout(topk_idx, num_experts, num_ranks, ranks_per_domain)
    layout.num_tokens_per_rank.copy_(made.num_tokens_per_rank)
    layout.num_tokens_per_expert.copy_(made.num_tokens_per_expert)
    layout.is_token_in_rank.copy_(made.is_token_in_rank)
    if layout.num_tokens_per_domain is not None and made.num_tokens_per_node is not None:
        layout.num_tokens_per_domain.copy_(made.num_tokens_per_node)


def layout_tensors(layout: Layout) -> tuple[Tensor | None, ...]:
    """All tensors of a layout."""
    return (
        layout.num_tokens_per_rank,
        layout.num_tokens_per_domain,
        layout.num_tokens_per_expert,
        layout.is_token_in_rank,
    )


# Operations, on checked requests


@dataclass(frozen=True)
class _Rows:
    """Fields that a dispatch sends of each token."""

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    payload: int = 0

    @classmethod
    def of(cls, request: DispatchRequest) -> _Rows:
        fields = (request.scales, request.topk_idx, request.topk_weights)
        scales, idx, weights = (None if f is None else f.detach() for f in fields)
        return cls(request.x.detach(), scales, idx, weights, request.payload)

    def empty(self, rows: int) -> DispatchTensors:
        """Outputs for so many rows of this kind."""

        def like(field: Tensor | None) -> Tensor | None:
            return None if field is None else field.new_empty(rows, field.shape[1])

        x = self.x.new_empty(rows, self.x.shape[1])
        return DispatchTensors(x, like(self.scales), like(self.topk_idx), like(self.topk_weights))

    def send(self, link: Link, route: Route, out: DispatchTensors, exchange: RowExchange) -> None:
        """The exchange of the payload."""
        exchange.dispatch(
            wire_over(link),
            plan_of(route),
            self.x,
            scales=self.scales,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
            num_experts=route.num_experts,
            out=out,
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.x, self.scales, self.topk_idx, self.topk_weights)


def dispatch_cached(
    control: ControlPlane,
    request: DispatchRequest,
    route: Route,
    schedule: Schedule,
    exchange: RowExchange = all_to_all,
) -> Dispatched:
    """Along the routes of an earlier dispatch: sizes are known, nothing is waited for."""
    assert route.num_rows is not None
    rows = _Rows.of(request)
    with control.queue.allocating(schedule.allocate_on_comm_stream):
        out = rows.empty(route.num_rows)

    def inspect() -> None:
        plan, rank = plan_of(route), control.rank
        for masked in sorted(control.membership.masked):
            if plan.counts[masked][rank] or plan.counts[rank][masked]:
                got = f"one with rows of rank {masked}, masked since"
                raise HandleError("handle", got, "one of a dispatch with the ranks there are")

    def body(link: Link, limits: dict[int, int]) -> None:
        control.enter("payload")
        rows.send(link, route, out, exchange)

    completion = control.perform(
        Operation.DISPATCH,
        schedule,
        body,
        agreed=_agreement(rows, route.num_experts, cached=True),
        inspect=inspect,
        num_tokens=route.num_tokens,
        tensors=(*rows.tensors, out.x, out.scales),
    )
    return Dispatched(out.x, out.scales, None, None, [], route, control.finish(schedule, completion))


def dispatch_fresh(
    control: ControlPlane,
    request: DispatchRequest,
    route: Route,
    schedule: Schedule,
    exchange: RowExchange = all_to_all,
) -> Dispatched:
    """Along new routes, which are left in `route`.

    The host waits for the counts, unless a worst case is given.
    """
    layout = request.layout
    assert layout is not None
    rows, worst = _Rows.of(request), request.num_worst_tokens
    inputs = (*rows.tensors, *layout_tensors(layout))
    agreed = _agreement(rows, route.num_experts, cached=False)

    def inspect() -> None:
        checks.check_layout_values(layout.num_tokens_per_rank, layout.is_token_in_rank)
        checks.check_expert_counts(layout.num_tokens_per_expert)
        if rows.topk_idx is not None:
            checks.check_index_range(rows.topk_idx, route.num_experts)

    def count(link: Link, limits: dict[int, int]) -> None:
        control.enter("counts")
        plan = exchange.exchange_counts(
            wire_over(link), layout.is_token_in_rank, layout.num_tokens_per_expert
        )
        checks.check_capacity(plan.counts, limits)
        route.plan = plan

    def allocate(num_rows: int) -> DispatchTensors:
        route.num_rows = num_rows
        with control.queue.allocating(schedule.allocate_on_comm_stream):
            return rows.empty(num_rows)

    if worst == 0:
        counted = control.perform(
            Operation.DISPATCH,
            schedule,
            count,
            agreed=agreed,
            inspect=inspect,
            num_tokens=route.num_tokens,
            tensors=inputs,
        )
        counted.host_wait()
        plan = plan_of(route)
        out = allocate(plan.num_recv_tokens)
        completion = control.proceed(
            "payload", schedule, lambda link: rows.send(link, route, out, exchange), (*inputs, *_all(out))
        )
        alignment = request.expert_alignment
        expert_counts = [-(-n // alignment) * alignment for n in plan.num_recv_tokens_per_expert]
    else:
        try:
            with checks.memory_for("num_worst_tokens", worst):
                out = allocate(worst)
        except CapacityError as problem:
            control.refuse(Operation.DISPATCH, problem, schedule)

        def count_and_send(link: Link, limits: dict[int, int]) -> None:
            count(link, limits)
            control.enter("payload")
            rows.send(link, route, out, exchange)

        completion = control.perform(
            Operation.DISPATCH,
            schedule,
            count_and_send,
            agreed=agreed,
            inspect=inspect,
            num_tokens=route.num_tokens,
            limit=worst,
            tensors=(*inputs, *_all(out)),
        )
        expert_counts = []
    finished = control.finish(schedule, completion)
    return Dispatched(*_all(out), expert_counts, route, finished)


def combine(
    control: ControlPlane, request: CombineRequest, schedule: Schedule, exchange: RowExchange = all_to_all
) -> Combined:
    """Back along a dispatch's routes."""
    route, x = request.route, request.x.detach()
    weights = None if request.topk_weights is None else request.topk_weights.detach()
    biases = tuple(b.detach() for b in request.biases)
    num_topk = request.num_topk
    with control.queue.allocating(schedule.allocate_on_comm_stream):
        out = x.new_empty(route.num_tokens, x.shape[1])
        out_weights = None if weights is None else weights.new_empty(route.num_tokens, num_topk)

    def body(link: Link, limits: dict[int, int]) -> None:
        control.enter("payload")
        done = exchange.combine(wire_over(link), plan_of(route), x, topk_weights=weights, biases=biases)
        out.copy_(done.x)
        if out_weights is not None and done.topk_weights is not None:
            out_weights.copy_(done.topk_weights)

    completion = control.perform(
        Operation.COMBINE,
        schedule,
        body,
        agreed={"hidden": x.shape[1], "x dtype": dtype_code(x.dtype), "num_topk": num_topk},
        inspect=lambda: _check_ran(route),
        num_tokens=route.num_tokens,
        tensors=(x, weights, *biases, out, out_weights),
    )
    return Combined(out, out_weights, control.finish(schedule, completion))


def _check_ran(route: Route) -> None:
    if route.plan is None:
        got = "the handle of a dispatch that failed"
        raise HandleError("handle", got, "one of a dispatch that succeeded")


def plan_of(route: Route) -> DispatchPlan:
    """The plan that the dispatch left. Raises HandleError if it failed."""
    _check_ran(route)
    plan = route.plan
    assert isinstance(plan, DispatchPlan)
    return plan


def _all(out: DispatchTensors) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return out.x, out.scales, out.topk_idx, out.topk_weights


def _agreement(rows: _Rows, num_experts: int, *, cached: bool) -> dict[str, int]:
    idx, scales = rows.topk_idx, rows.scales
    return {
        "cached": cached,
        "hidden": rows.x.shape[1],
        "x dtype": dtype_code(rows.x.dtype),
        "num_experts": num_experts,
        "num_scales": 0 if scales is None else scales.shape[1],
        "scales dtype": dtype_code(None if scales is None else scales.dtype),
        "dtypes and shapes of x": rows.payload,
        "num_topk": 0 if idx is None else idx.shape[1],
        "topk_idx dtype": dtype_code(None if idx is None else idx.dtype),
    }
