"""The calls of a Buffer that are measured: this library's, and anybody's who takes the same calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepep.bench.sweep import Dtype
from deepep.bench.workload import Traffic, Workload, expert_stand_in, fp8_rows

#: what a result holds, by the oracle's names
Outputs = dict[str, Tensor | list[int] | None]

LAYOUT, DISPATCH, CACHED, COMBINE = "layout", "dispatch", "cached dispatch", "combine"
#: dispatches that lay out as well, from top-k alone; or by a call before, in the time. The latter two have a
#: worst case given, so that no host waits
BY_TOPK, BY_TOPK_AT_ONCE = "dispatch by top-k", "dispatch by top-k, no wait"
LAID_OUT_AT_ONCE = "layout and dispatch, no wait"
FRESH = (DISPATCH, BY_TOPK, BY_TOPK_AT_ONCE, LAID_OUT_AT_ONCE)


@dataclass(frozen=True)
class TimedOperation:
    """One thing to time. outputs: what a result of `call` holds. traffic: the bytes it moves, None for none.

    variant: which of several ways to do it this is.
    """

    name: str
    call: Callable[[], Any]
    outputs: Callable[[Any], Outputs]
    dtype: Dtype | None = None
    traffic: Traffic | None = None
    variant: str = ""


class Inputs:
    """One rank's inputs to the operations, on its device."""

    def __init__(self, workload: Workload, rank: int, device: torch.device, scales: str) -> None:
        self.workload = workload
        self.rank = rank
        self.device = device
        self.scales = scales
        self.topk_idx = workload.topk_idx[rank].to(device)  # [T, K] int64
        self.topk_weights = workload.topk_weights[rank].to(device)  # [T, K] float32
        self.x = workload.x(rank).to(device)  # [T, H] bf16

    def rows(self, dtype: Dtype) -> tuple[Tensor, Tensor | None]:
        """(x [T, H], scales [T, P] or None) to dispatch."""
        return (self.x, None) if dtype == "bf16" else fp8_rows(self.x, self.scales)


def buffer_operations(
    buffer: Any, inputs: Inputs, dtypes: Sequence[Dtype], by_topk: bool
) -> Iterator[TimedOperation]:
    """The operations of a Buffer, in V1's calls; by_topk: and those that only this library's has. What an
    operation needs is made when its turn comes, by calls that all ranks have to make.
    """
    load = inputs.workload
    experts = load.shape.experts

    def layout() -> Any:
        return buffer.get_dispatch_layout(inputs.topk_idx, experts)

    yield TimedOperation(
        LAYOUT,
        layout,
        lambda made: {
            "num_tokens_per_rank": made[0],
            "num_tokens_per_expert": made[2],
            "is_token_in_rank": made[3],
        },
    )
    fresh = partial(dispatch_laid_out, buffer, inputs, layout())

    for dtype in dtypes:
        x, scales = inputs.rows(dtype)
        given = x if scales is None else (x, scales)
        traffic = load.dispatched(dtype)
        yield TimedOperation(DISPATCH, partial(fresh, given), _dispatched, dtype, traffic)
        if by_topk:
            yield from _topk_operations(buffer, inputs, given, dtype)
        handle = fresh(given)[4]
        yield TimedOperation(
            CACHED,
            partial(buffer.dispatch, given, handle=handle),
            lambda made: _rows(made[0]),
            dtype,
            traffic,
        )
    received, _, _, _, handle, _ = fresh(inputs.x)
    # As the experts leave them: rows in memory of their own, not where they were received.
    y = expert_stand_in(received, inputs.rank)
    del received
    yield TimedOperation(
        COMBINE,
        lambda: buffer.combine(y, handle),
        lambda made: {"combined_x": made[0]},
        "bf16",
        load.combined(),
    )


def dispatch_laid_out(buffer: Any, inputs: Inputs, layout: Any, given: Any) -> Any:
    """A dispatch of rows `given`, by V1's call, along a result of get_dispatch_layout."""
    per_rank, _, per_expert, in_rank, _ = layout
    return buffer.dispatch(
        given,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=inputs.topk_idx,
        topk_weights=inputs.topk_weights,
    )


def _topk_operations(buffer: Any, inputs: Inputs, given: Any, dtype: Dtype) -> Iterator[TimedOperation]:
    """Dispatches of rows `given` whose layout is not known."""
    load = inputs.workload
    traffic, experts = load.dispatched(dtype), load.shape.experts
    most, rows = load.num_ranks * load.shape.tokens, int(load.rows[:, inputs.rank].sum())
    topk = {"topk_idx": inputs.topk_idx, "topk_weights": inputs.topk_weights}

    def laid_out() -> Any:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(inputs.topk_idx, experts)
        return buffer.dispatch(
            given,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            num_worst_tokens=most,
            **topk,
        )

    def first_rows(made: Any) -> Outputs:
        kept = {name: got for name, got in _dispatched(made).items() if isinstance(got, Tensor)}
        return {name: got[:rows] for name, got in kept.items()}

    call = partial(buffer.dispatch, given, num_experts=experts, **topk)
    yield TimedOperation(BY_TOPK, call, _dispatched, dtype, traffic)
    at_once = partial(call, num_worst_tokens=most)
    yield TimedOperation(BY_TOPK_AT_ONCE, at_once, first_rows, dtype, traffic)
    yield TimedOperation(LAID_OUT_AT_ONCE, laid_out, first_rows, dtype, traffic)


def _dispatched(made: Any) -> Outputs:
    recv, idx, weights, counts, *_ = made
    return {
        **_rows(recv),
        "recv_topk_idx": idx,
        "recv_topk_weights": weights,
        "num_recv_tokens_per_expert": counts,
    }


def _rows(recv: Any) -> Outputs:
    x, scales = recv if isinstance(recv, tuple) else (recv, None)
    return {"recv_x": x, "recv_scales": scales}
