"""Arguments of Buffer's calls: checked as far as no engine is needed, and made into the engine's requests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any, cast, get_args

import torch

from deepep.api.handles import (
    AnyDispatchHandle,
    AnyLowLatencyHandle,
    DispatchHandle,
    OwnedLowLatencyHandle,
    low_latency_route_of,
    route_of,
)
from deepep.api.packed_rows import PackedRows
from deepep.config import Config
from deepep.errors import ArgumentError, ArgumentTypeError, ModeError, RangeError
from deepep.events import EventHandle, EventOverlap
from deepep.runtime.checks import MOST, check_flag, check_int
from deepep.runtime.devices import asked_device
from deepep.runtime.engine import Engine, EngineOptions, Reduction
from deepep.runtime.requests import (
    CombineRequest,
    DispatchRequest,
    Layout,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    Schedule,
)
from deepep.runtime.traffic_lanes import TrafficLanes

DEFAULT_TIMEOUT = 100.0
"""Seconds a rank waits for its peers; the constructor's `timeout` or DEEPEP_TIMEOUT set another."""

LONGEST_TIMEOUT = 10_000_000
"""A time-out that is as good as none; clocks of the transports and the kernels can count to it."""

AT_ONCE = Schedule()
"""The schedule of a call that neither waits for an event nor returns one."""
WITH_EVENT, WITH_HOOK = Schedule(asynchronous=True), Schedule(hook=True)
"""Of one that returns an event; and of one that returns a hook."""

_BYTES_ALIGNMENT = 128
_MOST_BYTES = 1 << 62
_MOST_RANKS = 2048

# The constructor: its arguments first, the environment second.


def engine_options(
    group: Any,
    *,
    num_qps_per_rank: int,
    flags: Mapping[str, object],
    num_nvl_bytes: int,
    num_rdma_bytes: int,
    low_latency: bool,
    masks: bool,
    timeout: float | None,
    symmetric_bytes: int | None,
    reduction: str,
    ranks_per_domain: int | None,
    max_num_ranks: int | None = None,
    lanes: tuple[object, object] = (None, None),
    device: object,
) -> tuple[EngineOptions, torch.device | None]:
    """The constructor's arguments as the engine's options; and the device asked for, if one was.

    num_qps_per_rank, flags: those without effect, by name. lanes: service_level and traffic_class.

    Bad ones are not raised but handed on as `problem`, for all ranks to raise; a rank with a bad time-out
    waits for the others as long as it would without one.
    """
    options = EngineOptions(group, DEFAULT_TIMEOUT)
    try:
        options = replace(
            options,
            timeout=timeout_of(timeout),
            low_latency=check_flag("low_latency_mode", low_latency),
            masks=check_flag("enable_shrink", masks),
        )
        for name, flag in flags.items():
            check_flag(name, flag)
        check_int("num_qps_per_rank", num_qps_per_rank, 0, MOST)
        _check_bytes("num_nvl_bytes", num_nvl_bytes)
        low_latency_bytes = _check_bytes("num_rdma_bytes", num_rdma_bytes)
        options = replace(
            options,
            low_latency_bytes=low_latency_bytes,
            symmetric_bytes=_symmetric_bytes(symmetric_bytes),
            reduction=check_reduction(reduction),
            ranks_per_domain=ranks_per_domain_of(ranks_per_domain),
            num_ranks=_num_ranks(max_num_ranks, group, options.masks),
            lanes=TrafficLanes.of(*lanes),
        )
        return options, asked_device(device)
    except ArgumentError as problem:
        return replace(options, problem=problem), None


def timeout_of(given: object) -> float:
    """The constructor's time-out; None: DEEPEP_TIMEOUT, else the default."""
    allowed = f"more than 0, at most {LONGEST_TIMEOUT:,} seconds"
    seconds: Any
    if given is not None:
        name, seconds = "timeout", given
        if isinstance(given, bool) or not isinstance(given, Real):
            raise ArgumentTypeError(name, type(given).__name__, f"a number: {allowed}")
    else:
        name, text = "DEEPEP_TIMEOUT", os.environ.get("DEEPEP_TIMEOUT") or str(DEFAULT_TIMEOUT)
        try:
            seconds = float(text)
        except ValueError:
            raise RangeError(name, repr(text)[:200], f"a number: {allowed}") from None
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise RangeError(name, f"{seconds}"[:200], allowed)
    return float(seconds)


def _num_ranks(given: int | None, group: Any, masks: bool) -> int:
    """R, if more ranks may join than the group has; 0: the group's."""
    if given is None:
        return 0
    there = group.size() if isinstance(group, torch.distributed.ProcessGroup) else 1
    num_ranks = check_int("max_num_ranks", given, there, _MOST_RANKS)
    if num_ranks > there and not masks:
        raise ModeError("enable_shrink", "False", "True, for more ranks to join (max_num_ranks)")
    return num_ranks


def _symmetric_bytes(given: int | None) -> int:
    """The size of the symmetric memory; 0 leaves it to the backend."""
    if given is not None:
        return _check_bytes("symmetric_bytes", given, 1)
    return environment_bytes()


def environment_bytes() -> int:
    """DEEPEP_SYMMETRIC_BYTES; 0 if it is not set."""
    text = os.environ.get("DEEPEP_SYMMETRIC_BYTES", "")
    if not text:
        return 0
    if not text.isdecimal():
        raise RangeError("DEEPEP_SYMMETRIC_BYTES", repr(text), "a number of bytes")
    return _check_bytes("DEEPEP_SYMMETRIC_BYTES", int(text), 1)


_REDUCTIONS = "'expert_rank', 'exact' or 'domain'"


def check_reduction(given: object) -> Reduction:
    """Of that name. Raises ArgumentTypeError and RangeError."""
    if not isinstance(given, str):
        raise ArgumentTypeError("reduction", type(given).__name__, _REDUCTIONS)
    if given not in get_args(Reduction):
        raise RangeError("reduction", repr(given), _REDUCTIONS)
    return cast(Reduction, given)


def ranks_per_domain_of(given: int | None) -> int:
    """The ranks of a scale-up domain; 0 makes one domain of all."""
    if given is not None:
        return check_int("ranks_per_domain", given, 1, MOST)
    text = os.environ.get("DEEPEP_RANKS_PER_DOMAIN", "")
    if not text:
        return 0
    if not text.isdecimal():
        raise RangeError("DEEPEP_RANKS_PER_DOMAIN", repr(text)[:200], "a number of ranks")
    return check_int("DEEPEP_RANKS_PER_DOMAIN", int(text), 1, MOST)


def _check_bytes(name: str, size: object, least: int = 0) -> int:
    number = check_int(name, size, least, _MOST_BYTES)
    if number % _BYTES_ALIGNMENT:
        raise RangeError(name, str(number), f"a multiple of {_BYTES_ALIGNMENT}")
    return number


# Schedules and SMs


def schedule(
    previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool
) -> Schedule:
    """V1's three scheduling options; outputs on the communication stream need an event and no wait."""
    if previous_event is None and async_finish is False and allocate_on_comm_stream is False:
        return AT_ONCE
    if previous_event is None and async_finish is True and allocate_on_comm_stream is False:
        return WITH_EVENT
    asynchronous = check_flag("async_finish", async_finish)
    on_comm_stream = check_flag("allocate_on_comm_stream", allocate_on_comm_stream)
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise ArgumentTypeError("previous_event", type(previous_event).__name__, "an EventOverlap or None")
    event = None if previous_event is None else previous_event.event
    if event is not None and not isinstance(event, EventHandle):
        got = f"an EventOverlap of a {type(event).__name__}"
        raise ArgumentTypeError("previous_event", got, "one of an EventHandle or None")
    if on_comm_stream and (event is None or not asynchronous):
        raise ArgumentError(
            "allocate_on_comm_stream", "True", "True only with a previous_event and async_finish=True"
        )
    after = None if event is None else event.completion
    return Schedule(after, asynchronous, allocate_on_comm_stream=on_comm_stream)


def low_latency_schedule(async_finish: bool, return_recv_hook: bool) -> Schedule:
    """The options of low-latency calls: return early with an event or with a hook, not both."""
    if async_finish is False and return_recv_hook is False:
        return AT_ONCE
    asynchronous = check_flag("async_finish", async_finish)
    hook = check_flag("return_recv_hook", return_recv_hook)
    if asynchronous and hook:
        raise ArgumentError("return_recv_hook", "True, with async_finish", "one of the two")
    return WITH_HOOK if hook else WITH_EVENT if asynchronous else AT_ONCE


def refusal(*early: object) -> Schedule:
    """The schedule of a call that is refused: early if one of these flags says so, whatever else they are."""
    return Schedule(asynchronous=any(flag is True for flag in early))


def refuse_nvfp4(use_nvfp4: object, x_global_scale: object) -> None:
    """Arguments of the forks that send NVFP4. Raises ArgumentError if they ask for it."""
    if x_global_scale is None and not check_flag("use_nvfp4", use_nvfp4):
        return
    raise ArgumentError("use_nvfp4, x_global_scale", "NVFP4", "neither: rows travel as BF16 or FP8")


def refuse_overlap(overlap: object) -> None:
    """Arguments of the forks that combine while the experts still compute. Raises ArgumentError."""
    if not check_flag("overlap", overlap):
        return
    raise ArgumentError("overlap", "True", "False: a combine starts once all rows of x are there")


def num_sms_of(config: object) -> int:
    """SMs that a call may use by its config."""
    if not isinstance(config, Config):
        raise ArgumentTypeError("config", type(config).__name__, "a Config or None")
    return config.num_sms


# Requests


def dispatch_request(
    x: Any,
    handle: AnyDispatchHandle | None,
    layout: tuple[
        torch.Tensor | None,  # num_tokens_per_rank
        torch.Tensor | None,  # num_tokens_per_rdma_rank
        torch.Tensor | None,  # num_tokens_per_expert
        torch.Tensor | None,  # is_token_in_rank
    ],
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    engine: Engine,
    *,
    expert_alignment: int,
    num_worst_tokens: int,
    num_sms: int,
    num_experts: int | None,
) -> DispatchRequest:
    """A dispatch along the routes of `handle`, of `layout`, or, with `num_experts`, of `topk_idx`."""
    payload = x.payload if isinstance(x, PackedRows) else 0
    if not isinstance(x, tuple):
        rows, scales = x, None
    elif len(x) == 2:
        rows, scales = x
    else:
        raise ArgumentTypeError("x", f"a tuple of {len(x)}", "a tensor or (x, scales)")
    if handle is not None:
        if topk_idx is not None or topk_weights is not None:
            name = "topk_idx" if topk_idx is not None else "topk_weights"
            raise ArgumentError(name, "a tensor, with a handle", "None: the handle has the routing")
        route = handle.route if type(handle) is DispatchHandle else route_of(handle, engine)
        return DispatchRequest(rows, scales, route=route, num_sms=num_sms, payload=payload)
    if not (type(expert_alignment) is type(num_worst_tokens) is int):  # they travel: numpy's do not
        expert_alignment = check_int("expert_alignment", expert_alignment, 1, MOST)
        num_worst_tokens = check_int("num_worst_tokens", num_worst_tokens, 0, MOST)
    per_rank, per_domain, per_expert, in_rank = layout
    if num_experts is not None:
        if not (per_rank is None and per_domain is None and per_expert is None and in_rank is None):
            raise ArgumentError("num_experts", "a number, with a layout", "either of the two")
        if topk_idx is None or topk_weights is None:
            name = "topk_idx" if topk_idx is None else "topk_weights"
            raise ArgumentError(name, "None, with num_experts", "topk_idx and topk_weights given")
        if type(num_experts) is not int or num_experts < 1:
            num_experts = check_int("num_experts", num_experts, 1, MOST)
        return DispatchRequest(
            rows,
            scales,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            expert_alignment=expert_alignment,
            num_worst_tokens=num_worst_tokens,
            num_sms=num_sms,
            num_experts=num_experts,
            payload=payload,
        )
    if per_rank is None or in_rank is None or per_expert is None:
        needed = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank}
        missing = next((name for name, tensor in needed.items() if tensor is None), "num_tokens_per_expert")
        allowed = "the tensor of get_dispatch_layout, or num_experts and topk_idx"
        raise ArgumentError(missing, "None, without a handle", allowed)
    return DispatchRequest(
        rows,
        scales,
        layout=Layout(per_rank, per_domain, per_expert, in_rank),
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        expert_alignment=expert_alignment,
        num_worst_tokens=num_worst_tokens,
        num_sms=num_sms,
        payload=payload,
    )


def combine_request(
    x: torch.Tensor,
    handle: AnyDispatchHandle,
    topk_weights: torch.Tensor | None,
    bias: Any,
    num_sms: int,
    engine: Engine,
) -> CombineRequest:
    """A combine along the routes of `handle`, with no, one or two biases."""
    route = handle.route if type(handle) is DispatchHandle else route_of(handle, engine)
    if bias is None:
        return CombineRequest(x, route, topk_weights, (), num_sms)
    biases = bias if isinstance(bias, tuple) else (bias,)
    if len(biases) > 2:
        raise ArgumentTypeError("bias", f"{len(biases)} tensors", "at most two")
    return CombineRequest(x, route, topk_weights, biases, num_sms)


def low_latency_dispatch_request(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    num_max_tokens: int,
    num_experts: int,
    *,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    expert_counts: torch.Tensor | None,
    wait_nanoseconds: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    num_sms: int,
) -> LowLatencyDispatchRequest:
    """A low-latency dispatch."""
    if not (type(num_max_tokens) is type(num_experts) is int):  # they travel: numpy's and tensors' do not
        num_max_tokens = check_int("num_max_dispatch_tokens_per_rank", num_max_tokens, 1, MOST)
        num_experts = check_int("num_experts", num_experts, 1, MOST)
    return LowLatencyDispatchRequest(
        x,
        topk_idx,
        num_max_tokens,
        num_experts,
        use_fp8=use_fp8 if type(use_fp8) is bool else check_flag("use_fp8", use_fp8),
        round_scale=round_scale if type(round_scale) is bool else check_flag("round_scale", round_scale),
        use_ue8m0=use_ue8m0 if type(use_ue8m0) is bool else check_flag("use_ue8m0", use_ue8m0),
        expert_counts=expert_counts,
        wait_nanoseconds=wait_nanoseconds,
        topk_weights=topk_weights,
        num_sms=num_sms if type(num_sms) is int else check_int("num_sms", num_sms, 0, MOST),
    )


def low_latency_combine_request(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    handle: AnyLowLatencyHandle,
    engine: Engine,
    *,
    use_logfmt: bool,
    zero_copy: bool,
    out: torch.Tensor | None,
    wait_nanoseconds: torch.Tensor | None,
    num_sms: int,
) -> LowLatencyCombineRequest:
    """A low-latency combine of what `handle`'s dispatch brought."""
    logfmt = use_logfmt if type(use_logfmt) is bool else check_flag("use_logfmt", use_logfmt)
    staged = zero_copy if type(zero_copy) is bool else check_flag("zero_copy", zero_copy)
    if logfmt and staged:
        raise ArgumentError("use_logfmt", "True, with zero_copy", "one of the two")
    if type(handle) is OwnedLowLatencyHandle and handle.route is not None:
        route = handle.route
    else:
        route = low_latency_route_of(handle, engine)
    return LowLatencyCombineRequest(
        x,
        topk_idx,
        topk_weights,
        route,
        use_logfmt=logfmt,
        zero_copy=staged,
        out=out,
        wait_nanoseconds=wait_nanoseconds,
        num_sms=num_sms if type(num_sms) is int else check_int("num_sms", num_sms, 0, MOST),
    )
