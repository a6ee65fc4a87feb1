"""V2's calls in the low-latency mode of the benchmark: ElasticBuffer has none of low latency, so dispatches
along a known routing, and combines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from deepep.bench.clock import Call
from deepep.bench.elastic.operations import ALIGNMENT
from deepep.bench.low_latency.calls import PAIR
from deepep.bench.operations import COMBINE, DISPATCH, Inputs, Outputs
from deepep.bench.sweep import Dtype
from deepep.bench.workload import expert_stand_in

#: SMs that its calls are measured with, where the GPU has as many
SMS = (24, 64)


def by_elastic(sms: int) -> str:
    """The name of these figures."""
    return f"deep_ep V2, cached, {sms} SMs"


class ElasticDecodeCalls:
    """One rank's calls for one workload, with so many SMs. Collective, as are its calls.

    FP8 rows were cast before.
    """

    def __init__(self, buffer: Any, inputs: Inputs, dtypes: Sequence[Dtype], sms: int) -> None:
        self._buffer, self._sms = buffer, sms
        shape = inputs.workload.shape
        self._given: dict[Dtype, Any] = {}
        self._handles: dict[Dtype, Any] = {}
        wanted: tuple[Dtype, ...] = ("bf16", *(dtype for dtype in dtypes if dtype != "bf16"))
        for dtype in wanted:
            x, scales = inputs.rows(dtype)
            self._given[dtype] = x if scales is None else (x, scales)
            received, _, _, self._handles[dtype], _ = buffer.dispatch(
                self._given[dtype],
                inputs.topk_idx,
                inputs.topk_weights,
                num_experts=shape.experts,
                num_max_tokens_per_rank=shape.tokens,
                expert_alignment=ALIGNMENT,
                num_sms=sms,
            )
            if dtype == "bf16":
                self._y = expert_stand_in(received, inputs.rank)  # [N, H]

    def dispatch(self, dtype: Dtype) -> Any:
        """(recv_x or (recv_x, recv_sf), recv_topk_idx, None, handle, event)."""
        return self._buffer.dispatch(self._given[dtype], handle=self._handles[dtype], num_sms=self._sms)

    def combine(self, dtype: Dtype = "bf16") -> Any:
        """(combined_x, None, event), along that dtype's routing."""
        return self._buffer.combine(self._y, self._handles[dtype], num_sms=self._sms)

    def pair(self, dtype: Dtype) -> Any:
        """A dispatch, and a combine along it."""
        self.dispatch(dtype)
        return self.combine(dtype)

    def whole(self, dtypes: Sequence[Dtype]) -> Iterator[tuple[str, Dtype, Call]]:
        """Operations in one: (name, dtype, call)."""
        for dtype in dtypes:
            yield DISPATCH, dtype, partial(self.dispatch, dtype)
        yield COMBINE, "bf16", self.combine
        for dtype in dtypes:
            yield PAIR, dtype, partial(self.pair, dtype)


def outputs(name: str, result: Any) -> Outputs:
    """Tensors of a result that are compared with the reference."""
    if name == COMBINE:
        return {"combined_x": result[0]}
    x, scales = result[0] if isinstance(result[0], tuple) else (result[0], None)
    return {"recv_x": x, "recv_scales": scales}
