"""Arguments of ElasticBuffer's calls: checked as far as no engine is needed, and made into requests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepep.api import elastic_sizes as sizes
from deepep.api.arguments import (
    AT_ONCE,
    LONGEST_TIMEOUT,
    environment_bytes,
    ranks_per_domain_of,
    timeout_of,
)
from deepep.api.ep_handle import EPHandle
from deepep.api.packed_rows import PackedRows
from deepep.errors import ArgumentError, ArgumentTypeError, CapacityError, HandleError
from deepep.events import EventHandle, EventOverlap
from deepep.runtime import checks
from deepep.runtime.checks import MOST, check_flag, check_int
from deepep.runtime.completion import Completion
from deepep.runtime.devices import asked_device
from deepep.runtime.elastic_requests import ElasticCombineRequest, ElasticDispatchRequest
from deepep.runtime.engine import Engine, EngineOptions
from deepep.runtime.requests import Schedule
from deepep.runtime.traffic_lanes import TrafficLanes

AnyEvent = EventHandle | EventOverlap | None

DEFAULT_CPU_TIMEOUT, DEFAULT_GPU_TIMEOUT, DEFAULT_SL_IDX = 300, 100, 3


@dataclass(frozen=True)
class BufferLimits:
    """Sizes that a buffer was constructed for; 0: any. multiple_reduction: where expanded rows are summed.
    num_cpu_bytes: of Engram storage; 0: there is none.
    """

    num_max_tokens: int = 0
    hidden: int = 0
    num_topk: int = 0
    num_qps: int = sizes.DEFAULT_NUM_QPS
    multiple_reduction: bool = True
    num_bytes: int = 0
    num_cpu_bytes: int = 0


def engine_options(
    group: Any,
    *,
    num_bytes: int | None,
    num_cpu_bytes: int,
    num_max_tokens: int,
    hidden: int,
    num_topk: int,
    flags: Mapping[str, object],
    sl_idx: int,
    num_qps: int,
    timeouts: tuple[int, int],
    ranks_per_domain: int | None,
    device: object,
) -> tuple[EngineOptions, BufferLimits, torch.device | None]:
    """The constructor's arguments as the engine's options, its limits, and the device asked for, if one was.

    flags: by name. timeouts: of the host and the device. Bad arguments are handed on as `problem`, for all
    ranks to raise.
    """
    options, limits = EngineOptions(group, float(DEFAULT_GPU_TIMEOUT)), BufferLimits()
    try:
        options = replace(options, timeout=_timeout(*timeouts))
        on = {name: check_flag(name, flag) for name, flag in flags.items()}
        storage = sizes.check_storage_bytes(num_cpu_bytes, num_bytes)
        level = check_int("sl_idx", sl_idx, 0, 15)
        lanes = TrafficLanes() if level == DEFAULT_SL_IDX else TrafficLanes(level, if_any=True)
        most, width = (
            check_int("num_max_tokens_per_rank", num_max_tokens, 0, MOST),
            check_int("hidden", hidden, 0, MOST),
        )
        topk = check_int("num_topk", num_topk, 0, sizes.MOST_TOPK)
        given = None if num_bytes is None else sizes.check_num_bytes(num_bytes)
        if given is None and not (most and width):
            got = f"{most} and {width}, without num_bytes"
            raise ArgumentError("num_max_tokens_per_rank, hidden", got, "both, or num_bytes")
        ranks = group.size() if isinstance(group, torch.distributed.ProcessGroup) else 1
        multiple = on["allow_multiple_reduction"]
        hint = sizes.buffer_size_hint(
            ranks, most, width, topk, use_fp8=on["use_fp8_dispatch"], multiple_reduction=multiple
        )
        qps = check_int("num_allocated_qps", num_qps, 0, MOST) or sizes.DEFAULT_NUM_QPS
        limits = BufferLimits(most, width, topk, qps, multiple, given or hint, storage)
        memory = sizes.symmetric_bytes(given and given - storage, hint, environment_bytes())
        domain = ranks_per_domain_of(ranks_per_domain)
        options = replace(
            options,
            symmetric_bytes=memory,
            ranks_per_domain=domain if on["allow_hybrid_mode"] else 0,
            lanes=lanes,
        )
        return options, limits, asked_device(device)
    except ArgumentError as problem:
        return replace(options, problem=problem), limits, None


def _timeout(cpu: object, gpu: object) -> float:
    """The earlier of the two ends a wait. As constructed by default: DEEPEP_TIMEOUT, if it is set."""
    seconds = [
        check_int(name, given, 1, LONGEST_TIMEOUT)
        for name, given in (("num_cpu_timeout_secs", cpu), ("num_gpu_timeout_secs", gpu))
    ]
    if seconds == [DEFAULT_CPU_TIMEOUT, DEFAULT_GPU_TIMEOUT] and os.environ.get("DEEPEP_TIMEOUT"):
        return timeout_of(None)
    return float(min(seconds))


def schedule(previous_event: AnyEvent, asynchronous: bool, allocate_on_comm_stream: bool) -> Schedule:
    """V2's three scheduling options, in any combination."""
    if previous_event is None and asynchronous is False and allocate_on_comm_stream is False:
        return AT_ONCE
    return Schedule(
        completion_of("previous_event", previous_event),
        check_flag("async_with_compute_stream", asynchronous),
        allocate_on_comm_stream=check_flag("allocate_on_comm_stream", allocate_on_comm_stream),
    )


def completion_of(name: str, event: AnyEvent) -> Completion | None:
    """Of an EventHandle, or of an EventOverlap that may be empty."""
    if isinstance(event, EventOverlap):
        event = event.event
    if event is None:
        return None
    if not isinstance(event, EventHandle):
        raise ArgumentTypeError(name, type(event).__name__, "an EventHandle, an EventOverlap or None")
    return event.completion


def dispatch_request(
    engine: Engine,
    limits: BufferLimits,
    x: Any,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    handle: EPHandle | None,
    *,
    loads: torch.Tensor | None,
    num_experts: int | None,
    num_max_tokens: int | None,
    alignment: int | None,
    num_sms: int,
    num_qps: int,
    before_epilogue: AnyEvent,
    wait: bool | None,
    expand: bool,
    zero_padding: bool,
    column_major: bool,
    num_max_rows: int | None,
) -> ElasticDispatchRequest:
    """A dispatch along the routes of `handle`, or of `topk_idx`. num_sms: not 0."""
    rows, scales = _rows_of(x) if isinstance(x, tuple) else (x, None)
    if not (type(expand) is type(zero_padding) is type(column_major) is bool):
        expand = check_flag("do_expand", expand)
        zero_padding = check_flag("do_zero_padding", zero_padding)
        column_major = check_flag("use_tma_aligned_col_major_sf", column_major)
    if zero_padding and not expand:
        raise ArgumentError("do_zero_padding", "True, without do_expand", "both: only then are there gaps")
    if num_qps:
        check_int("num_qps", num_qps, 0, limits.num_qps)
    if handle is not None:
        _check_handle(handle, engine, topk_idx, loads, expand)
        _same("num_experts", num_experts, handle.num_experts)
        _same("num_max_tokens_per_rank", num_max_tokens, handle.num_max_tokens_per_rank)
        _same("expert_alignment", alignment, handle.expert_alignment)
        experts, most = handle.num_experts, handle.num_max_tokens_per_rank
        alignment = handle.expert_alignment
    else:
        experts, most = _check_fresh(engine, limits, topk_idx, num_experts, num_max_tokens)
        alignment = 1 if alignment is None else check_int("expert_alignment", alignment, 1, MOST)
    if isinstance(rows, torch.Tensor):
        _check_size(rows, most, limits)
    if loads is not None:
        local, where = experts // engine.info.num_ranks, engine.info.device_type
        name = "cumulative_local_expert_recv_stats"
        checks.check_tensor(name, loads, dtypes=(torch.int32,), device_type=where, shape=(local,))
    waits = handle is None if wait is None else check_flag("do_cpu_sync", wait)
    if num_max_rows is not None:
        num_max_rows = check_int("num_max_expanded_tokens", num_max_rows, 0, MOST)
        if waits or not expand or handle is not None:
            allowed = "one with do_expand and do_cpu_sync=False, without a handle"
            raise ArgumentError("num_max_expanded_tokens", "a number", allowed)
    return ElasticDispatchRequest(
        rows,
        scales,
        topk_idx,
        topk_weights,
        experts,
        most,
        alignment=alignment,
        expand=expand,
        zero_padding=zero_padding,
        column_major=column_major,
        wait_for_counts=waits,
        num_max_rows=num_max_rows,
        loads=loads,
        before_epilogue=None
        if before_epilogue is None
        else completion_of("previous_event_before_epilogue", before_epilogue),
        num_sms=num_sms,
        payload=x.payload if isinstance(x, PackedRows) else 0,
    )


def _rows_of(x: tuple[Any, ...]) -> tuple[Any, Any]:
    if len(x) != 2:
        raise ArgumentTypeError("x", f"a tuple of {len(x)}", "a tensor or (x, sf)")
    return x[0], x[1]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _check_fresh(
    engine: Engine,
    limits: BufferLimits,
    topk_idx: torch.Tensor | None,
    num_experts: int | None,
    num_max_tokens: int | None,
) -> tuple[int, int]:
    """E and M of a fresh dispatch."""
    if topk_idx is None:
        raise ArgumentError("topk_idx", "None, without a handle", "a tensor")
    if not isinstance(topk_idx, torch.Tensor) or topk_idx.dim() != 2:
        checks.check_topk_idx(topk_idx, engine.info.device_type)
    if num_experts is None:
        raise ArgumentError("num_experts", "None, without a handle", "the number of experts")
    experts = num_experts
    if type(num_experts) is not int or num_experts < 1 or num_experts % engine.info.num_ranks:
        experts = check_int("num_experts", num_experts, 1, MOST)
        checks.check_num_experts(experts, engine.info.num_ranks)
    if limits.num_topk and topk_idx.shape[1] > limits.num_topk:
        allowed = f"at most num_topk = {limits.num_topk}, as constructed"
        raise CapacityError("topk_idx", f"K = {topk_idx.shape[1]}", allowed)
    if num_max_tokens is None and not limits.num_max_tokens:
        allowed = "a number: the buffer was constructed without one"
        raise ArgumentError("num_max_tokens_per_rank", "None", allowed)
    most = limits.num_max_tokens
    if num_max_tokens is not None:
        most = check_int("num_max_tokens_per_rank", num_max_tokens, 1, MOST)
        if most > (limits.num_max_tokens or most):
            allowed = f"at most {limits.num_max_tokens}, as constructed"
            raise CapacityError("num_max_tokens_per_rank", str(most), allowed)
    return experts, most


def _check_size(rows: torch.Tensor, most: int, limits: BufferLimits) -> None:
    """The rows are no more and no longer than the buffer is for; what is no matrix is refused elsewhere."""
    shape = rows.shape
    if len(shape) != 2:
        return
    tokens, width = shape
    if tokens > most:
        allowed = f"at most num_max_tokens_per_rank = {most} tokens"
        raise CapacityError("x", f"{tokens} tokens", allowed)
    # Of a list's rows there are bytes: as many as of a BF16 row.
    if limits.hidden and width > limits.hidden * (2 if rows.dtype is torch.uint8 else 1):
        allowed = f"at most hidden = {limits.hidden}, as constructed"
        raise CapacityError("x", f"rows of {width}", allowed)


def _check_handle(
    handle: object,
    engine: Engine,
    topk_idx: object,
    loads: object,
    expand: bool,
) -> None:
    """The handle goes with what else is given."""
    if not isinstance(handle, EPHandle):
        raise ArgumentTypeError("handle", type(handle).__name__, "the handle of ElasticBuffer.dispatch")
    checks.check_own(handle.elastic_route.route, engine)
    for name, given in (("topk_idx", topk_idx), ("cumulative_local_expert_recv_stats", loads)):
        if given is not None:
            raise ArgumentError(name, "a tensor, with a handle", "None: the handle has the routing")
    if expand != handle.do_expand:
        raise HandleError("do_expand", str(expand), f"{handle.do_expand}, as the handle's dispatch")


def _same(name: str, given: object, wanted: int) -> None:
    if given is not None and given != wanted:
        raise HandleError(name, str(given)[:200], f"{wanted}, as the handle's dispatch")


def combine_request(
    engine: Engine,
    limits: BufferLimits,
    x: torch.Tensor,
    handle: EPHandle,
    topk_weights: torch.Tensor | None,
    bias: Any,
    *,
    num_sms: int,
    num_qps: int,
    before_epilogue: AnyEvent,
) -> ElasticCombineRequest:
    """A combine along the routes of `handle`, with no, one or two biases."""
    if not isinstance(handle, EPHandle):
        raise ArgumentTypeError("handle", type(handle).__name__, "the handle of ElasticBuffer.dispatch")
    route, where = handle.elastic_route, engine.info.device_type
    biases = () if bias is None else tuple(bias) if isinstance(bias, (tuple, list)) else (bias,)
    if len(biases) > 2:
        raise ArgumentTypeError("bias", f"{len(biases)} tensors", "at most two")
    if num_qps:
        check_int("num_qps", num_qps, 0, limits.num_qps)
    expanded = route.slots is not None
    if expanded or topk_weights is not None:  # else the engine sees all of it
        checks.check_own(route.route, engine)
    if expanded:
        shape = (route.num_rows, "H")
        checks.check_tensor("x", x, dtypes=checks.SUM_DTYPES, device_type=where, shape=shape)
        checks.check_row_bytes(x)
        for tensor in biases:
            own = (route.route.num_tokens, x.shape[1])
            checks.check_tensor("bias", tensor, dtypes=(x.dtype,), device_type=where, shape=own)
    if topk_weights is not None:
        rows = (route.num_rows,) if expanded else tuple(route.recv_topk_idx.shape)
        checks.check_topk_weights(topk_weights, rows, where)
    return ElasticCombineRequest(
        _detached(x),
        route,
        _detached(topk_weights),
        tuple(_detached(tensor) for tensor in biases),
        single_reduction=not limits.multiple_reduction,
        before_epilogue=None
        if before_epilogue is None
        else completion_of("previous_event_before_epilogue", before_epilogue),
        num_sms=check_int("num_sms", num_sms, 0, MOST) if num_sms else handle.num_sms,
    )
