"""Dispatches and combines with one row per (token, local expert), composed of an engine's operations.

A dispatch is the engine's, and behind it, on this rank alone, its *epilogue*: rows to the places of their
lanes, unless the engine spreads them as they come (elastic_spread.py). A combine sums a rank's lanes to one
row a token while it reads them, where the engine does that (`Engine.sums_expanded`), else in a *prologue*;
or, where the owner is to sum all lanes in one go, every lane's row is dispatched back to it.

Shapes: R ranks, E experts, L local experts, K top-k, T tokens here, H hidden, M maximum tokens per rank, N
rows received, X rows of the expanded layout, P scales per token. A *lane* is one of a token's K entries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deepep.errors import CapacityError
from deepep.runtime.completion import Completion, CudaCompletion, after_all, bare, now
from deepep.runtime.elastic_requests import (
    ElasticCombineRequest,
    ElasticDispatched,
    ElasticDispatchRequest,
    ElasticRoute,
    align,
    aligned,
    count_lanes,
    worst_rows,
)
from deepep.runtime.elastic_spread import expansion_again, expansion_of, spread, spread_again
from deepep.runtime.engine import Engine
from deepep.runtime.local_rows import settle_nans
from deepep.runtime.requests import Combined, CombineRequest, DispatchRequest, Schedule

_ZERO = torch.zeros((), dtype=torch.float32, device="cpu")  # a number takes 2 us more of the host


def dispatch(engine: Engine, request: ElasticDispatchRequest, schedule: Schedule) -> ElasticDispatched:
    """A dispatch along a new route."""
    topk_idx, weights = request.topk_idx, request.topk_weights
    assert topk_idx is not None
    num_ranks = engine.info.num_ranks
    most_rows = 0  # of an expanded dispatch, where that is asked for
    if request.expand or not request.wait_for_counts:
        most_rows = worst_rows(
            num_ranks * request.num_max_tokens,
            topk_idx.shape[-1],
            request.num_experts // num_ranks,
            request.alignment,
        )
        if request.num_max_rows is not None:
            most_rows = min(most_rows, request.num_max_rows)
    expansion = None
    if request.expand:
        expansion = expansion_of(engine, request, topk_idx.shape[-1], most_rows)
    done = engine.dispatch(
        DispatchRequest(
            request.x,
            request.scales,
            num_experts=request.num_experts,
            topk_idx=topk_idx,
            topk_weights=_no_weights(topk_idx) if weights is None else weights,
            num_worst_tokens=0 if request.wait_for_counts else num_ranks * request.num_max_tokens,
            num_sms=request.num_sms,
            payload=request.payload,
            expansion=expansion,
        ),
        schedule,
    )
    assert done.topk_idx is not None
    counts = done.num_tokens_per_expert if request.wait_for_counts else None
    route = ElasticRoute(
        done.route,
        topk_idx,
        done.topk_idx,
        request.num_max_tokens,
        request.alignment,
        most_rows,
        counts,
    )
    if done.expanded is not None:
        return spread(engine, request, route, done.expanded, schedule, done.completion)
    received = None if weights is None else done.topk_weights
    if _is_plain(request, done.scales):
        route.completion = bare(done.completion)
        return ElasticDispatched(done.x, done.scales, done.topk_idx, received, route, done.completion)
    return _Epilogue(engine, request, route, done.x, done.scales, received).run(schedule, done.completion)


def _is_plain(request: ElasticDispatchRequest, scales: Tensor | None) -> bool:
    """True if nothing is to be done behind the rows' arrival."""
    turns = request.column_major and scales is not None
    return not (request.expand or turns) and request.loads is request.before_epilogue is None


def copy_topk_idx(engine: Engine, done: ElasticDispatched, schedule: Schedule) -> None:
    """Has the route keep a copy of topk_idx, which is read when the dispatch reads it: behind `after`."""
    given = done.route.topk_idx
    if schedule.after is None or not schedule.asynchronous:
        done.route.topk_idx = given.clone()
        return

    def fill(made: tuple[Tensor]) -> None:
        made[0].copy_(given)

    later = replace(schedule, after=done.completion)
    (copy,), completion = engine.locally(lambda: (torch.empty_like(given),), fill, (given,), later)
    done.route.topk_idx = copy
    done.completion, done.route.completion = completion, bare(completion)


def dispatch_cached(
    engine: Engine, route: ElasticRoute, request: ElasticDispatchRequest, schedule: Schedule
) -> ElasticDispatched:
    """A dispatch along `route`: no host waits, and what is received lies where it did."""
    weights, num_rows = request.topk_weights, route.recv_topk_idx.shape[0]
    expansion = expansion_again(engine, route, request)
    if request.expand or weights is not None:
        _follow_dispatch(route, schedule)
    if weights is expansion is None:
        again = DispatchRequest(
            *(request.x, request.scales), route=route.route, num_sms=request.num_sms, payload=request.payload
        )
    else:  # an engine's has rows alone, as they come: a new dispatch, whose number of rows is known
        again = DispatchRequest(
            request.x,
            request.scales,
            num_experts=route.route.num_experts,
            topk_idx=route.topk_idx,
            topk_weights=_no_weights(route.topk_idx) if weights is None else weights,
            num_worst_tokens=max(1, num_rows),
            num_sms=request.num_sms,
            payload=request.payload,
            expansion=expansion,
            known_route=route.route,
        )
    done = engine.dispatch(again, schedule)
    if done.expanded is not None:
        return spread_again(engine, request, route, done.expanded, schedule, done.completion)
    x, scales, received = done.x, done.scales, None if weights is None else done.topk_weights
    if x.shape[0] > num_rows:
        x = x[:num_rows]
        scales, received = (None if t is None else t[:num_rows] for t in (scales, received))
    return _Epilogue(engine, request, route, x, scales, received).run(schedule, done.completion)


def combine(engine: Engine, request: ElasticCombineRequest, schedule: Schedule) -> Combined:
    """Every token's rows, brought back to its owner and summed there."""
    route, weights = request.route, request.topk_weights
    if request.before_epilogue is not None:
        schedule = _also_after(schedule, request.before_epilogue)
    if route.slots is not None or weights is not None:
        _follow_dispatch(route, schedule)
    if route.slots is not None and request.single_reduction:
        return _combine_lanes(engine, request, route.slots, schedule)
    x = request.x
    if route.slots is not None and engine.sums_expanded(x, request.num_sms):
        expanded = CombineRequest(x, route.route, weights, request.biases, request.num_sms, slots=route.slots)
        return engine.combine(expanded, schedule)
    if route.slots is None and weights is not None and schedule.after is None and not schedule.asynchronous:
        weights = _own_weights(weights, route.recv_topk_idx)  # the usual call: nothing else to order
    elif route.slots is not None or weights is not None:
        x, weights, reduced = _prologue(engine, request, schedule)
        schedule = replace(schedule, after=reduced)
    return engine.combine(CombineRequest(x, route.route, weights, request.biases, request.num_sms), schedule)


def _prologue(
    engine: Engine, request: ElasticCombineRequest, schedule: Schedule
) -> tuple[Tensor, Tensor | None, Completion | None]:
    """Rows [N, H] and weights [N, K], of this rank's lanes alone; and when they are there."""
    x, weights = request.x, request.topk_weights
    slots, lanes = request.route.slots, request.route.recv_topk_idx

    def make() -> tuple[Tensor, Tensor | None]:
        rows = x if slots is None else x.new_empty(lanes.shape[0], x.shape[1])
        return rows, None if weights is None else weights.new_empty(lanes.shape)

    def fill(made: tuple[Tensor, Tensor | None]) -> None:
        rows, own = made
        if slots is not None:
            engine.local_rows.reduce(x, slots, rows)
        if own is not None and weights is not None:
            own.copy_(weights if slots is None else _at(weights, slots))
            own.masked_fill_((lanes if slots is None else slots) < 0, 0.0)

    (rows, own), completion = engine.locally(make, fill, (x, weights, slots, lanes), schedule)
    return rows, own, completion


def _own_weights(weights: Tensor, lanes: Tensor) -> Tensor:
    """weights [N, K], +0 of lanes elsewhere, whose numbers are negative. A new tensor, contiguous."""
    return torch.where(lanes < 0, _ZERO, weights).contiguous()


def columns(rows: int, width: int, like: Tensor) -> Tensor:
    """[rows, width] with strides (1, rows rounded up to 4), uninitialised."""
    return like.new_empty(width, align(rows, 4)).t()[:rows]


class _Epilogue:
    """The part of a dispatch behind its rows' arrival, as far as it has one."""

    def __init__(
        self,
        engine: Engine,
        request: ElasticDispatchRequest,
        route: ElasticRoute,
        x: Tensor,
        scales: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        self._engine, self._request, self._route = engine, request, route
        self._received = x, scales, weights
        self._sorts = request.expand and route.slots is None
        self._padding = request.zero_padding and request.expand and route.alignment > 1

    def run(self, schedule: Schedule, arrived: Completion | None) -> ElasticDispatched:
        """Runs it behind the rows' arrival."""
        request, route, (x, scales, weights) = self._request, self._route, self._received
        done = ElasticDispatched(x, scales, route.recv_topk_idx, weights, route, arrived)
        if not _is_plain(request, scales):
            schedule = _also_after(replace(schedule, after=arrived), request.before_epilogue)
            given = (x, scales, weights, route.recv_topk_idx, route.slots, request.loads)
            made, done.completion = self._engine.locally(self._make, self._fill, given, schedule)
            done.x, done.scales, done.topk_weights = made[:3]  # type: ignore[assignment]
            if request.expand:
                done.topk_idx = None
                done.x = done.x[: route.num_rows]
                if done.topk_weights is not None:
                    done.topk_weights = done.topk_weights[: route.num_rows]
        if request.topk_idx is not None:
            route.completion = bare(done.completion)
        return done

    def _make(self) -> tuple[Tensor | None, ...]:
        """x, scales, weights as they are handed out; and what the route keeps."""
        request, route, (x, scales, weights) = self._request, self._route, self._received
        lanes, num_rows = route.recv_topk_idx, x.shape[0]
        if request.expand:
            num_rows = route.num_rows
            x = x.new_empty(num_rows + self._padding, x.shape[1])  # the last: for what has no place
            weights = None if weights is None else weights.new_empty(num_rows + 1)
        if self._sorts:
            route.slots = lanes.new_empty(lanes.shape, dtype=torch.int64)
            route.expert_counts = lanes.new_empty(route.num_local, dtype=torch.int32)
            most = lanes.numel() + (route.alignment - 1) * route.num_local
            if route.counts is None and num_rows < align(most, route.alignment):
                route.overflow = lanes.new_zeros(1, dtype=torch.int32)
        if scales is not None:
            if request.column_major:
                scales = columns(num_rows, scales.shape[1], scales)
            elif request.expand:
                scales = scales.new_empty(num_rows, scales.shape[1])
        return x, scales, weights, route.slots, route.expert_counts, route.overflow

    def _fill(self, made: tuple[Tensor | None, ...]) -> None:
        request, route, received = self._request, self._route, self._received
        x, scales, weights, slots, counts, overflow = made
        if self._sorts:
            self._place()
        if request.loads is not None:
            if counts is None:
                counts = torch.empty_like(request.loads)
                count_lanes(self._engine, route, counts)
            request.loads.add_(counts)
        if request.expand:
            assert x is not None
            assert slots is not None
            self._engine.local_rows.spread(received[0], slots, x)
            self._spread_fields(slots, scales, weights)
            if self._padding:
                x.view(torch.int64).index_fill_(0, self._gaps(), 0)
        elif scales is not None and request.column_major and received[1] is not None:
            scales.copy_(received[1])
        has_to_fit = self._sorts and request.num_max_rows is None  # a cached one leaves out what that left
        if has_to_fit and overflow is not None and not overflow.is_cuda and int(overflow):
            got = f"tokens that name experts twice, more than {route.num_rows} rows"
            raise CapacityError("topk_idx", got, "do_cpu_sync=True for these", self._engine.info.rank)

    def _place(self) -> None:
        """The slots of a new route: sorted, aligned, inside of what there is."""
        route, lanes = self._route, self._route.recv_topk_idx
        assert route.slots is not None
        assert route.expert_counts is not None
        self._engine.local_rows.sort(lanes, route.slots, route.expert_counts)
        if route.alignment > 1 and route.num_local > 1:
            gaps = aligned(route.expert_counts, route.alignment) - route.expert_counts
            shift = gaps.cumsum(0) - gaps  # [L] int64: of the experts before
            route.slots += torch.where(lanes >= 0, shift[lanes.long().clamp(0, route.num_local - 1)], 0)
        if route.overflow is not None:
            beyond = route.slots >= route.num_rows
            route.overflow.copy_(beyond.any())
            route.slots.masked_fill_(beyond, -1)

    def _spread_fields(self, slots: Tensor, scales: Tensor | None, weights: Tensor | None) -> None:
        """Scales and weights: few bytes a row. Without reading a value: nothing is waited for."""
        num_rows, (_, given_scales, given_weights) = self._route.num_rows, self._received
        at = torch.where(slots < 0, num_rows, slots).flatten()  # lanes without a row share one behind the end
        if weights is not None and given_weights is not None:
            weights.zero_().scatter_(0, at, given_weights.flatten())
        if scales is not None and given_scales is not None and num_rows:
            rows = torch.arange(slots.shape[0], device=slots.device).unsqueeze(1).expand_as(slots).flatten()
            none = given_scales.shape[0]
            source = torch.full((num_rows + 1,), none, device=slots.device).scatter_(0, at, rows)[:num_rows]
            padded = torch.cat([given_scales, given_scales.new_zeros(1, given_scales.shape[1])])
            scales.copy_(padded.index_select(0, source))

    def _gaps(self) -> Tensor:
        """The rows between the experts', and the one behind all as often as it takes."""
        route = self._route
        assert route.expert_counts is not None
        offset = torch.arange(route.alignment - 1, dtype=torch.int32, device=route.expert_counts.device)
        end = route.expert_ends().unsqueeze(1)
        length = (aligned(route.expert_counts, route.alignment) - route.expert_counts).unsqueeze(1)
        at = torch.where(offset < length, end + offset, route.num_rows)
        return at.clamp(max=route.num_rows).flatten().long()


def _combine_lanes(
    engine: Engine, request: ElasticCombineRequest, slots: Tensor, schedule: Schedule
) -> Combined:
    """Every lane's row travels to its token's owner, as a dispatch back; there it is one sum.

    With a row, as the bits of a second weight, goes its lane's number there: the owner does not know which
    lanes had no room where they went.
    """
    route, x, weights = request.route, request.x, request.topk_weights
    num_rows, num_topk = x.shape[0], slots.shape[1]
    num_tokens, num_lanes = route.route.num_tokens, route.topk_idx.numel()

    def make_owners() -> tuple[Tensor, Tensor]:
        return slots.new_empty(num_rows, 2), x.new_empty(num_rows, 2, dtype=torch.float32)

    def fill_owners(made: tuple[Tensor, Tensor]) -> None:
        owners, own = made
        source, token = route.row_sources()
        lane = token.unsqueeze(1) * num_topk + torch.arange(num_topk, device=slots.device)
        at = torch.where(slots < 0, num_rows, slots).flatten()
        of_rows = slots.new_full((2, num_rows + 1), -1)
        of_rows[0].scatter_(0, at, source.unsqueeze(1).expand_as(slots).flatten())
        of_rows[1].scatter_(0, at, lane.flatten())
        owners.copy_(of_rows[0, :num_rows].unsqueeze(1))
        own[:, 0] = 0.0 if weights is None else weights
        own.view(torch.int32)[:, 1] = of_rows[1, :num_rows]

    (owners, own), known = engine.locally(make_owners, fill_owners, (slots, weights), schedule)
    schedule = replace(schedule, after=known)
    done = engine.dispatch(
        DispatchRequest(
            x,
            num_experts=engine.info.num_ranks,
            topk_idx=owners,
            topk_weights=own,
            num_worst_tokens=max(1, num_lanes),
            num_sms=request.num_sms,
        ),
        schedule,
    )

    def make_sums() -> tuple[Tensor, Tensor | None]:
        out = x.new_empty(num_tokens, x.shape[1])
        return out, None if weights is None else weights.new_empty(num_tokens, num_topk)

    def fill_sums(made: tuple[Tensor, Tensor | None]) -> None:
        out, returned = made
        assert done.topk_idx is not None
        assert done.topk_weights is not None
        lane = done.topk_weights.view(torch.int32)[:, 1].clamp(0, num_lanes)  # after a time-out: anything
        lane = torch.where(done.topk_idx[:, 1] < 0, num_lanes, lane)
        index = torch.arange(len(lane), device=lane.device)
        at = slots.new_full((num_lanes + 1,), -1).scatter_(0, lane.long(), index)[:num_lanes]
        at = at.view(num_tokens, num_topk)
        engine.local_rows.reduce(done.x, at, out, request.biases)
        if returned is not None:
            returned.copy_(torch.where(at >= 0, _at(done.topk_weights[:, 0], at), 0.0) + 0.0)
            settle_nans(returned, returned)

    given = (done.x, done.topk_idx, done.topk_weights, *request.biases)
    (out, returned), completion = engine.locally(
        make_sums, fill_sums, given, replace(schedule, after=done.completion)
    )
    return Combined(out, returned, completion)


def _also_after(schedule: Schedule, event: Completion | None) -> Schedule:
    """The schedule of work that comes behind `event` as well."""
    if event is None:
        return schedule
    at_once = schedule.after is None and not schedule.asynchronous
    if at_once and isinstance(event, CudaCompletion):
        event.current_stream_wait()
        return schedule
    # A host's event may have failed: that is raised in the operation's turn, where the peers learn of it.
    return replace(schedule, after=after_all(schedule.after or now(), event))


def _follow_dispatch(route: ElasticRoute, schedule: Schedule) -> None:
    """Orders the current stream behind an asynchronous dispatch, if it is the one that is to read what that
    left: engines' kernels know their turns, the communication stream is in order. In a graph the caller has.
    """
    end, at_once = route.completion, schedule.after is None and not schedule.asynchronous
    if isinstance(end, CudaCompletion) and at_once and not torch.cuda.is_current_stream_capturing():
        end.current_stream_wait()


def _no_weights(topk_idx: Tensor) -> Tensor:
    return torch.zeros(topk_idx.shape, dtype=torch.float32, device=topk_idx.device)


def _at(values: Tensor, slots: Tensor) -> Tensor:
    """values [X] -> [N, K]: each lane's; anything where it has none."""
    if values.shape[0] == 0:
        return values.new_zeros(slots.shape)
    return values[slots.clamp(min=0)]
