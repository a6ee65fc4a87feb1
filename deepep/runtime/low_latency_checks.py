"""Checks of low-latency requests, as deepep.runtime.checks: for every backend, without reading values."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.errors import ArgumentError, ModeError, ShapeError
from deepep.runtime import checks
from deepep.runtime.engine import EngineInfo, EngineOptions
from deepep.runtime.requests import LowLatencyCombineRequest, LowLatencyDispatchRequest, Schedule


def check_low_latency_dispatch(request: LowLatencyDispatchRequest, info: EngineInfo) -> None:
    """Checks what can be checked without reading values."""
    x = checks.check_tensor(
        "x", request.x, dtypes=(torch.bfloat16,), device_type=info.device_type, shape=("T", "H")
    )
    checks.check_row_bytes(x)
    checks.check_topk_idx(request.topk_idx, info.device_type, x.shape[0])
    most = checks.check_max_tokens(x.shape[0], request.num_max_tokens)
    num_local = checks.check_num_experts(request.num_experts, info.num_ranks)
    checks.check_int("num_max_dispatch_tokens_per_rank", info.num_ranks * most, 1, 2**31 - 1)
    if request.use_fp8:
        _check_groups(x, checks.FP8_GROUP, "use_fp8")
    if request.use_ue8m0:
        if not (request.use_fp8 and request.round_scale):
            raise ArgumentError("use_ue8m0", "True", "True only with use_fp8 and round_scale")
        _check_groups(x, checks.UE8M0_PACK, "use_ue8m0")
    if request.expert_counts is not None:
        checks.check_tensor(
            "cumulative_local_expert_recv_stats",
            request.expert_counts,
            dtypes=(torch.int32,),
            device_type=info.device_type,
            shape=(num_local,),
        )
    _check_wait_stats("dispatch_wait_recv_cost_stats", request.wait_nanoseconds, info)
    if request.topk_weights is not None:
        checks.check_topk_weights(request.topk_weights, request.topk_idx.shape, info.device_type)
    checks.check_int("num_sms", request.num_sms, 0)


def check_low_latency_combine(request: LowLatencyCombineRequest, info: EngineInfo) -> None:
    """Checks what can be checked without reading values."""
    route = request.route
    num_local = checks.check_num_experts(route.num_experts, info.num_ranks)
    room = info.num_ranks * checks.check_int("handle", route.num_max_tokens, 1)
    x = checks.check_tensor(
        "x",
        request.x,
        dtypes=(torch.bfloat16,),
        device_type=info.device_type,
        shape=(num_local, room, route.hidden),
        contiguous=not request.zero_copy,
    )
    checks.check_topk_idx(request.topk_idx, info.device_type)
    checks.check_topk_weights(request.topk_weights, request.topk_idx.shape, info.device_type)
    num_tokens = request.topk_idx.shape[0]
    if num_tokens > route.num_max_tokens:
        allowed = f"at most the {route.num_max_tokens} tokens of the dispatch"
        raise ShapeError("topk_idx", checks.shape_text(request.topk_idx.shape), allowed)
    for name, tensor, dtype, width in (
        ("handle[0]", route.source_index, torch.int32, room),
        ("handle[1]", route.ranges, torch.int64, info.num_ranks),
    ):
        checks.check_tensor(
            name, tensor, dtypes=(dtype,), device_type=info.device_type, shape=(num_local, width)
        )
    if request.use_logfmt:
        _check_groups(x, checks.FP8_GROUP, "use_logfmt")
    if request.out is not None:
        checks.check_tensor(
            "out",
            request.out,
            dtypes=(torch.bfloat16,),
            device_type=info.device_type,
            shape=(num_tokens, route.hidden),
        )
    _check_wait_stats("combine_wait_recv_cost_stats", request.wait_nanoseconds, info)
    checks.check_int("num_sms", request.num_sms, 0)


def _check_groups(x: Tensor, group: int, option: str) -> None:
    if x.shape[-1] % group:
        raise ShapeError("x", checks.shape_text(x.shape), f"H a multiple of {group} with {option}")


def _check_wait_stats(name: str, stats: Tensor | None, info: EngineInfo) -> None:
    if stats is not None:
        checks.check_tensor(
            name, stats, dtypes=(torch.int64,), device_type=info.device_type, shape=(info.num_ranks,)
        )


def has_gateways(options: EngineOptions, num_ranks: int) -> bool:
    """True if low-latency calls cross between domains by way of gateways."""
    return options.reduction == "domain" and 0 < options.ranks_per_domain < num_ranks


def check_gateways(options: EngineOptions, num_ranks: int) -> None:
    """Raises ModeError for domains or options that calls by way of gateways are not made for."""
    if not (options.low_latency and has_gateways(options, num_ranks)):
        return
    by_domain = "with reduction='domain' between domains"
    if num_ranks % options.ranks_per_domain:
        allowed = f"a divisor of the {num_ranks} ranks {by_domain}"
        raise ModeError("ranks_per_domain", str(options.ranks_per_domain), allowed)
    if options.masks:  # a gateway that is left out would cut ranks off that are there
        raise ModeError("enable_shrink", "True", f"False {by_domain}")


def check_levels(info: EngineInfo, schedule: Schedule, use_logfmt: bool = False) -> None:
    """Raises ModeError for calls that have no way through gateways: a hook would leave them at work between
    its halves, and a domain's sum of what LogFMT restores has no bits that were agreed on.
    """
    if not has_gateways(info.options, info.num_ranks):
        return
    allowed = "False with reduction='domain' between domains"
    if schedule.hook:
        raise ModeError("return_recv_hook", "True", allowed)
    if use_logfmt:
        raise ModeError("use_logfmt", "True", allowed)
