"""Checks of low-latency calls, twice: quick ones, which usual calls pass; others, which say what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepep.backends.cuda.low_latency_launch import LowLatencyFormat, LowLatencyPlan, num_blocks
from deepep.backends.cuda.remembered import Remembered
from deepep.errors import DeviceError, HandleError, LayoutError, ShapeError
from deepep.runtime import checks
from deepep.runtime.checks import FP8_GROUP
from deepep.runtime.low_latency_checks import check_low_latency_combine, check_low_latency_dispatch
from deepep.runtime.requests import LowLatencyCombineRequest, LowLatencyDispatchRequest

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine

MOST_ROWS = 1 << 15
"""R * M: the number of a row has 16 bits on the wire."""
MOST_EXPERTS = 1 << 13
"""E: their counts lie in a block's shared memory."""

Key = tuple[object, ...]
"""All that ranks must pass alike to a dispatch."""


def key_of(request: LowLatencyDispatchRequest) -> Key:
    """Of a request whose x and topk_idx are matrices."""
    x, topk_idx = request.x, request.topk_idx
    return (
        *(request.num_max_tokens, request.num_experts, x.shape[1], topk_idx.shape[1], topk_idx.dtype),
        *(request.use_fp8, request.round_scale, request.use_ue8m0, request.topk_weights is not None),
    )


def served(num_ranks: int, num_max_tokens: int, num_experts: int) -> bool:
    """True if the kernels serve calls of this size. All ranks decide alike: they agree on the arguments."""
    return num_ranks * num_max_tokens <= MOST_ROWS and num_experts <= MOST_EXPERTS


def usual_dispatch(
    request: LowLatencyDispatchRequest, agreed: dict[Key, LowLatencyFormat], index: int, known: Remembered
) -> LowLatencyFormat | None:
    """The format of a dispatch that passes all checks on device `index`, as far as that can be said
    without them; None says nothing. known: the last one, whose format is still agreed on.
    """
    x, topk_idx, weights = request.x, request.topk_idx, request.topk_weights
    if request.expert_counts is not None or request.wait_nanoseconds is not None or request.num_sms < 0:
        return None
    given = (x, topk_idx) if weights is None else (x, topk_idx, weights)
    others = (
        *(request.num_max_tokens, request.num_experts, len(given)),
        *(request.use_fp8, request.round_scale, request.use_ue8m0),
    )
    if others == known.others and known.are_alike(*given) and x.data_ptr() % 16 == 0:
        form: LowLatencyFormat | None = known.value
        return form
    if not (type(x) is Tensor and type(topk_idx) is Tensor and x.dim() == 2 and topk_idx.dim() == 2):
        return None
    form = agreed.get(key_of(request))
    tokens = x.shape[0]
    if form is None or not (
        tokens == topk_idx.shape[0]
        and tokens <= form.num_max_tokens
        and x.dtype is torch.bfloat16
        and x.get_device() == index
        and topk_idx.get_device() == index
        and x.is_contiguous()
        and topk_idx.is_contiguous()
        and x.data_ptr() % 16 == 0
        and not (x.is_neg() or topk_idx.is_neg())
    ):
        return None
    is_usual = weights is None or (
        type(weights) is Tensor
        and weights.dtype is torch.float32
        and weights.shape == topk_idx.shape
        and weights.get_device() == index
        and weights.is_contiguous()
        and not weights.is_neg()
    )
    if not is_usual:
        return None
    known.note(given, others, form)
    return form


def checked_dispatch(request: LowLatencyDispatchRequest, engine: CudaEngine) -> LowLatencyFormat:
    """The format of a dispatch. Raises ArgumentErrors."""
    check_low_latency_dispatch(request, engine.info)
    _check_rows("x", request.x, engine.device)
    _check_device("topk_idx", request.topk_idx, engine.device)
    _check_waits("dispatch_wait_recv_cost_stats", request.wait_nanoseconds, engine.device)
    form = LowLatencyFormat(
        num_ranks=engine.info.num_ranks,
        num_local_experts=request.num_experts // engine.info.num_ranks,
        num_max_tokens=request.num_max_tokens,
        num_topk=request.topk_idx.shape[1],
        hidden=request.x.shape[1],
        index_dtype=request.topk_idx.dtype,
        use_fp8=request.use_fp8,
        round_scale=request.round_scale,
        use_ue8m0=request.use_ue8m0,
        with_weights=request.topk_weights is not None,
        # Between domains an SM stays free for whoever serves puts.
        num_blocks=num_blocks(request.num_max_tokens, engine.sms - (engine.domains is not None)),
        entry_stretches=_entry_stretches(engine),
        num_domains=engine.domains.num_domains if engine.domains and engine.domains.has_gateways else 0,
    )
    is_served = served(form.num_ranks, form.num_max_tokens, request.num_experts)
    if engine.domains is not None and is_served:
        engine.domains.check_low_latency(form.room)
    return form


def _entry_stretches(engine: CudaEngine) -> int:
    """LowLatencyRoom's. Where ranks can be left out, one of them may still write when others go on."""
    options = engine.info.options
    if options.reduction != "exact":
        return 0
    return engine.info.num_ranks if options.masks else 1


def is_usual_combine(
    request: LowLatencyCombineRequest, plan: LowLatencyPlan, engine: CudaEngine, known: Remembered
) -> bool:
    """True if all checks would pass, as far as that can be said without them; False says nothing.

    known: the last one, with the dispatch's format.
    """
    given = x, topk_idx, weights = request.x, request.topk_idx, request.topk_weights
    form, index = plan.form, engine.index
    if not (
        request.route.engine is engine
        and request.out is None
        and not request.zero_copy
        and request.wait_nanoseconds is None
        and request.num_sms >= 0
    ):
        return False
    others = plan.num_tokens, request.use_logfmt
    is_known = known.value is form and others == known.others and known.are_alike(*given)
    if is_known and x.data_ptr() % 16 == 0:
        return True
    is_usual = (
        type(x) is Tensor
        and type(topk_idx) is Tensor
        and type(weights) is Tensor
        and not (request.use_logfmt and form.hidden % FP8_GROUP)
        and x.dtype is torch.bfloat16
        and weights.dtype is torch.float32
        and topk_idx.dtype in checks.INDEX_DTYPES
        and x.shape == (form.num_local_experts, form.num_ranks * form.num_max_tokens, form.hidden)
        and topk_idx.shape == (plan.num_tokens, form.num_topk)
        and weights.shape == topk_idx.shape
        and x.get_device() == index
        and topk_idx.get_device() == index
        and weights.get_device() == index
        and x.is_contiguous()
        and topk_idx.is_contiguous()
        and weights.is_contiguous()
        and x.data_ptr() % 16 == 0
        and not (x.is_neg() or topk_idx.is_neg() or weights.is_neg())
    )
    if is_usual:
        known.note(given, others, form)
    return is_usual


def checked_combine(request: LowLatencyCombineRequest, engine: CudaEngine) -> LowLatencyPlan | None:
    """The plan that a combine goes along; None if kernels do not serve its size. Raises ArgumentErrors."""
    route = request.route
    checks.check_own(route, engine)
    check_low_latency_combine(request, engine.info)
    if not request.zero_copy:
        _check_rows("x", request.x, engine.device)
    _check_device("topk_idx", request.topk_idx, engine.device)
    if request.out is not None:
        _check_rows("out", request.out, engine.device)
    _check_waits("combine_wait_recv_cost_stats", request.wait_nanoseconds, engine.device)
    if not served(engine.info.num_ranks, route.num_max_tokens, route.num_experts):
        return None
    plan = route.plan
    if not isinstance(plan, LowLatencyPlan):
        allowed = "the handle of low_latency_dispatch, or its own five entries"
        raise HandleError("handle", "tensors that no dispatch here has made", allowed)
    wanted = (plan.num_tokens, plan.form.num_topk)
    if request.topk_idx.shape != wanted:
        allowed = f"{checks.shape_text(wanted)}, as the dispatch's"
        raise ShapeError("topk_idx", checks.shape_text(request.topk_idx.shape), allowed)
    return plan


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise DeviceError(name, str(tensor.device), str(device))


def _check_rows(name: str, rows: Tensor, device: torch.device) -> None:
    _check_device(name, rows, device)
    if rows.data_ptr() % 16 != 0:
        raise LayoutError(name, "rows that do not start at a multiple of 16 bytes", "aligned rows")


def _check_waits(name: str, waits: Tensor | None, device: torch.device) -> None:
    if waits is not None:
        _check_device(name, waits, device)
        if not waits.is_contiguous():
            raise LayoutError(name, f"strides {waits.stride()}", "contiguous, or None")
