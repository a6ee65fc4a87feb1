"""Dispatches whose rows the engine itself spreads (`Engine.spreads_rows`): see elastic.py."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from deepep.runtime.completion import Completion, bare
from deepep.runtime.elastic_requests import ElasticDispatched, ElasticDispatchRequest, ElasticRoute, align
from deepep.runtime.engine import Engine
from deepep.runtime.requests import Schedule, SpreadRequest, SpreadRows


def expansion_of(
    engine: Engine, request: ElasticDispatchRequest, num_topk: int, most: int
) -> SpreadRequest | None:
    """The layout that the engine is to spread rows to itself; None: that is done in the epilogue.

    An event that the epilogue comes behind is one rank's affair: the kernel is the same as the others'.
    """
    if not engine.spreads_rows(request.num_experts, num_topk, request.num_max_tokens, request.num_sms):
        return None
    waits = request.wait_for_counts
    return SpreadRequest(
        request.alignment,
        request.zero_padding,
        request.column_major,
        num_rows=0 if waits else most,
        overflows=not waits and most < _all_lanes(engine, request, num_topk),
        spreads=request.before_epilogue is None,
    )


def expansion_again(
    engine: Engine, route: ElasticRoute, request: ElasticDispatchRequest
) -> SpreadRequest | None:
    """The same of a dispatch along `route`, whose rows are as many as they were."""
    experts, topk = route.route.num_experts, route.topk_idx.shape[1]
    if not request.expand or not engine.spreads_rows(experts, topk, route.num_max_tokens, request.num_sms):
        return None
    return SpreadRequest(
        route.alignment,
        request.zero_padding,
        request.column_major,
        num_rows=max(1, route.num_rows),
        spreads=request.before_epilogue is None,
    )


def _all_lanes(engine: Engine, request: ElasticDispatchRequest, num_topk: int) -> int:
    """The most rows that lanes can take, also where a token names an expert twice."""
    num_ranks, num_local = engine.info.num_ranks, request.num_experts // engine.info.num_ranks
    lanes = num_ranks * request.num_max_tokens * num_topk
    return align(lanes + (request.alignment - 1) * num_local, request.alignment)


def spread(
    engine: Engine,
    request: ElasticDispatchRequest,
    route: ElasticRoute,
    expanded: SpreadRows,
    schedule: Schedule,
    arrived: Completion | None,
) -> ElasticDispatched:
    """The result of a dispatch that the engine has spread itself."""
    route.slots, route.expert_counts = expanded.slots, expanded.expert_counts
    route.overflow = expanded.overflow
    done = _handed_out(engine, request, route, expanded, schedule, arrived)
    route.completion = bare(done.completion)
    return done


def spread_again(
    engine: Engine,
    request: ElasticDispatchRequest,
    route: ElasticRoute,
    expanded: SpreadRows,
    schedule: Schedule,
    arrived: Completion | None,
) -> ElasticDispatched:
    """The same along a route, which stays as it was."""
    rows, scales = route.num_rows, expanded.scales
    cut = replace(
        expanded,
        x=expanded.x[:rows],
        scales=None if scales is None else scales[:rows],
        weights=expanded.weights[:rows],
    )
    return _handed_out(engine, request, route, cut, schedule, arrived)


def _handed_out(
    engine: Engine,
    request: ElasticDispatchRequest,
    route: ElasticRoute,
    expanded: SpreadRows,
    schedule: Schedule,
    arrived: Completion | None,
) -> ElasticDispatched:
    weights = None if request.topk_weights is None else expanded.weights
    done = ElasticDispatched(expanded.x, expanded.scales, None, weights, route, arrived)
    if request.loads is not None:
        loads, counts = request.loads, expanded.expert_counts

        def fill(made: tuple[Tensor, ...]) -> None:
            loads.add_(counts)

        _, done.completion = engine.locally(tuple, fill, (loads, counts), replace(schedule, after=arrived))
    return done
