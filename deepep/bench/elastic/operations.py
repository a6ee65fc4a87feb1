"""The calls of an ElasticBuffer that are measured: this library's, and anybody's who takes V2's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from deepep.bench.operations import CACHED, COMBINE, DISPATCH, Inputs, Outputs, TimedOperation
from deepep.bench.sweep import Dtype
from deepep.bench.workload import expert_stand_in

#: Dispatches of which no host waits for counts; with a row for each top-k entry; of an earlier one's routing.
AT_ONCE = "dispatch, no wait"
EXPANDED, EXPANDED_AT_ONCE = "expanded dispatch", "expanded dispatch, no wait"
CACHED_EXPANDED = "cached expanded dispatch"
COMBINE_EXPANDED = "combine of expanded rows"
FRESH_EXPANDED = (EXPANDED, EXPANDED_AT_ONCE, CACHED_EXPANDED)
ALIGNMENT = 128
"""Rows by which each expert's begin, as grouped products take them."""


def elastic_operations(
    buffer: Any, inputs: Inputs, dtypes: Sequence[Dtype], sms: int | None
) -> Iterator[TimedOperation]:
    """The operations of an ElasticBuffer with `sms` SMs, None for its own choice. What an operation needs is
    made when its turn comes, by calls that all ranks have to make.
    """
    load = inputs.workload
    how = {} if sms is None else {"num_sms": sms}

    def dispatch(given: Any, **more: Any) -> Any:
        return buffer.dispatch(
            given,
            inputs.topk_idx,
            inputs.topk_weights,
            num_experts=load.shape.experts,
            num_max_tokens_per_rank=load.shape.tokens,
            expert_alignment=ALIGNMENT,
            **more,
            **how,
        )

    def again(given: Any, handle: Any, **more: Any) -> Any:
        return buffer.dispatch(given, handle=handle, **more, **how)

    for dtype in dtypes:
        x, scales = inputs.rows(dtype)
        given = x if scales is None else (x, scales)
        traffic = load.dispatched(dtype)
        for name, expand in ((DISPATCH, False), (EXPANDED, True)):
            fresh = partial(dispatch, given, do_expand=expand)
            at_once = AT_ONCE if name is DISPATCH else EXPANDED_AT_ONCE
            cached = CACHED if name is DISPATCH else CACHED_EXPANDED
            handle = fresh()[3]
            calls: dict[str, Callable[[], Any]] = {
                name: fresh,
                at_once: partial(fresh, do_cpu_sync=False),
                cached: partial(again, given, handle, do_expand=expand),
            }
            for called, call in calls.items():
                kept = _rows if called is cached else _dispatched
                yield TimedOperation(called, call, kept, dtype, traffic)
    for name, expand in ((COMBINE, False), (COMBINE_EXPANDED, True)):
        received, _, _, handle, _ = dispatch(inputs.x, do_expand=expand)
        y = expert_stand_in(received, inputs.rank)  # in memory of its own, not where rows were received
        del received
        call = partial(buffer.combine, y, handle, **how)
        yield TimedOperation(name, call, _combined, "bf16", load.combined())


def _rows(made: Any) -> Outputs:
    x, scales = made[0] if isinstance(made[0], tuple) else (made[0], None)
    return {"recv_x": x, "recv_scales": scales}


def _dispatched(made: Any) -> Outputs:
    return {**_rows(made), "recv_topk_idx": made[1], "recv_topk_weights": made[2]}


def _combined(made: Any) -> Outputs:
    return {"combined_x": made[0]}
