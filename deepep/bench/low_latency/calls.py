"""The low-latency calls that are measured: this library's Buffer's, and anybody's who takes V1's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from deepep.bench.clock import Call, Stage
from deepep.bench.operations import COMBINE, DISPATCH, Inputs
from deepep.bench.sweep import Dtype
from deepep.bench.workload import expert_stand_in

PAIR = "dispatch + combine"
SEND, RECEIVE = ", send", ", receive"
GRAPH = "pair, graph of "
#: pairs that a graph holds; times are those of one
GRAPHS = (1, 8)


class DecodeCalls:
    """One rank's calls of a low-latency Buffer for one workload. Collective, as are its calls.

    most: M, the tokens that the buffer has room for. Combines go along one dispatch, with rows of their own.
    """

    def __init__(self, buffer: Any, inputs: Inputs, most: int) -> None:
        self._buffer = buffer
        self._inputs = inputs
        self._most = most
        self._experts = inputs.workload.shape.experts
        buffer.clean_low_latency_buffer(most, inputs.workload.shape.hidden, self._experts)
        received, _, self._handle, *_ = self.dispatch("bf16")
        self._y = stand_in_rows(received, inputs.rank)  # [L, R*M, H]

    def dispatch(self, dtype: Dtype, *, hook: bool = False) -> Any:
        """(recv_x, recv_count, handle, event, hook or None)."""
        given = self._inputs
        return self._buffer.low_latency_dispatch(
            given.x,
            given.topk_idx,
            self._most,
            self._experts,
            use_fp8=dtype == "fp8",
            return_recv_hook=hook,
        )

    def combine(self, handle: Any = None, *, hook: bool = False) -> Any:
        """(combined_x, event, hook or None)."""
        given = self._inputs
        return self._buffer.low_latency_combine(
            self._y,
            given.topk_idx,
            given.topk_weights,
            self._handle if handle is None else handle,
            return_recv_hook=hook,
        )

    def pair(self, dtype: Dtype) -> Any:
        """A dispatch, and a combine along it."""
        return self.combine(self.dispatch(dtype)[2])

    def whole(self, dtypes: Sequence[Dtype]) -> Iterator[tuple[str, Dtype, Call]]:
        """Operations in one: (name, dtype, call)."""
        for dtype in dtypes:
            yield DISPATCH, dtype, partial(self.dispatch, dtype)
        yield COMBINE, "bf16", self.combine
        for dtype in dtypes:
            yield PAIR, dtype, partial(self.pair, dtype)

    def halves(self, dtypes: Sequence[Dtype]) -> Iterator[tuple[str, Dtype, Stage]]:
        """The halves of a call with a hook: the call, and the hook when all ranks have sent."""
        for dtype in dtypes:
            sends = partial(self.dispatch, dtype, hook=True)
            yield DISPATCH + SEND, dtype, Stage(partial(_same, sends), lambda made: made[4]())
            yield DISPATCH + RECEIVE, dtype, Stage(partial(_hook_of, sends, 4))
        sends = partial(self.combine, hook=True)
        yield COMBINE + SEND, "bf16", Stage(partial(_same, sends), lambda made: made[2]())
        yield COMBINE + RECEIVE, "bf16", Stage(partial(_hook_of, sends, 2))


def _same(call: Call) -> Call:
    return call


def _hook_of(call: Callable[[], Any], place: int) -> Call:
    made = call()
    # With its result: memory that is freed before the hook runs would be another's by then.
    return partial(_run_hook, made[place], made)


def _run_hook(hook: Call, made: object) -> object:
    hook()
    return made


def stand_in_rows(received: Tensor, rank: int) -> Tensor:
    """[L, R*M, H] bf16, what stands for the experts' outputs; expert by expert, which takes less memory."""
    out = received.new_empty(received.shape)
    for expert, rows in enumerate(received):
        out[expert] = expert_stand_in(rows, rank)
    return out
