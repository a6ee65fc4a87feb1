"""Counts of top-k entries by expert, kept by a buffer's dispatches: loads, to make placements from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from deepep.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeepEPError,
    DeviceError,
    ShapeError,
)
from deepep.runtime import elastic
from deepep.runtime.checks import INDEX_DTYPES, check_flag
from deepep.runtime.completion import Completion, bare
from deepep.runtime.elastic_requests import ElasticDispatched, ElasticDispatchRequest
from deepep.runtime.engine import Engine
from deepep.runtime.labels import with_label
from deepep.runtime.requests import (
    Dispatched,
    DispatchRequest,
    LowLatencyDispatched,
    LowLatencyDispatchRequest,
    Operation,
    Schedule,
)

MOST_DIMENSIONS = 8
"""Of counts that are gathered."""

_Result = TypeVar("_Result")


class ExpertCounter:
    """Adds the entries of every dispatch to a tensor of the user's, [E] int64, in the dispatch's turn.

    Has an engine's dispatches, for a facade to call instead.
    """

    def __init__(self, engine: Engine, counts: torch.Tensor) -> None:
        self._engine, self.counts = engine, counts
        self.last: Completion | None = None

    def dispatch(self, request: DispatchRequest, schedule: Schedule) -> Dispatched:
        """`Engine.dispatch`, counted unless it repeats a route."""
        dispatch = partial(self._engine.dispatch, request, schedule)
        if request.route is not None:
            return dispatch()
        if request.topk_idx is None and request.layout is not None:
            return self._around(dispatch, request.layout.num_tokens_per_expert, True, schedule)
        return self._around(dispatch, request.topk_idx, False, schedule)

    def low_latency_dispatch(
        self, request: LowLatencyDispatchRequest, schedule: Schedule
    ) -> LowLatencyDispatched:
        """`Engine.low_latency_dispatch`, counted."""
        dispatch = partial(self._engine.low_latency_dispatch, request, schedule)
        return self._around(dispatch, request.topk_idx, False, schedule)

    def elastic_dispatch(
        self, engine: Engine, request: ElasticDispatchRequest, schedule: Schedule
    ) -> ElasticDispatched:
        """`deepep.runtime.elastic.dispatch`, counted."""
        dispatch = partial(elastic.dispatch, engine, request, schedule)
        return self._around(dispatch, request.topk_idx, False, schedule)

    def _around(
        self, dispatch: Callable[[], _Result], entries: object, by_expert: bool, schedule: Schedule
    ) -> _Result:
        """The dispatch, its entries counted before it: they are read when it reads them, and its caller may
        overwrite them behind it. One that raises at the call is taken back. What
        cannot be counted the dispatch refuses.
        """
        if not self._can_count(entries):
            return dispatch()
        assert isinstance(entries, torch.Tensor)
        self._add(entries, by_expert, 1, schedule)
        try:
            return dispatch()
        except BaseException:
            with contextlib.suppress(DeepEPError):
                self._add(entries, by_expert, -1, schedule)
            raise

    def _can_count(self, entries: object) -> bool:
        if not isinstance(entries, torch.Tensor) or entries.layout != torch.strided or entries.is_meta:
            return False
        return entries.dtype in INDEX_DTYPES and entries.device == self.counts.device

    def _add(self, entries: torch.Tensor, by_expert: bool, sign: int, schedule: Schedule) -> None:
        """On the host's communication thread, or in the order of the stream that the dispatch is on."""
        counts, number = self.counts, self.counts.shape[0]

        def fill(made: tuple[torch.Tensor, ...]) -> None:
            if by_expert:
                shared = min(number, entries.numel())
                counts[:shared].add_(entries.detach()[:shared], alpha=sign)
                return
            experts = entries.detach().flatten().long()
            inside = (experts >= 0) & (experts < number)
            counts.scatter_add_(0, experts.clamp(0, number - 1), inside.long() * sign)

        later = schedule.after is not None or schedule.asynchronous
        turn = Schedule(schedule.after, asynchronous=True) if later else Schedule()
        _, completion = self._engine.locally(tuple, fill, (entries, counts), turn)
        self.last = bare(completion) or self.last


class ExpertCounting:
    """Part of a buffer's interface that counts entries by expert: `count_experts`, `gather_expert_counts`."""

    _engine: Engine
    _counter: ExpertCounter | None = None

    def count_experts(self, counts: torch.Tensor | None) -> None:
        """Have every dispatch from now on add this rank's top-k entries to `counts`; None: count no more.

        counts: [E] int64 on the buffer's device, contiguous, as many as the calls' num_experts; entries that
            it has no place for are left out. Each MoE layer of a model can have its own: call this before its
            dispatch, with a row of [layers, E].

        Low-latency and high-throughput dispatches with new routes count, cached ones do not; one that is
        refused at the call is not counted. No host waits: counts are added in the order of the dispatch's
        stream, or of the communication stream for one that returns an event. They are added again when a
        CUDA graph is replayed. A layer of deepep.nn counts by itself, in its router's `load`.

        Not collective. Raises ArgumentTypeError, ShapeError, DeviceError, DestroyedError.
        """
        self._check_alive()
        if counts is None:
            self._counter = None
            return
        found = _check_counts(counts)
        device = self._engine.info.options.device
        if found.ndim != 1 or not found.numel() or not found.is_contiguous():
            raise ShapeError("counts", f"{list(found.shape)}, strides {found.stride()}", "[E], contiguous")
        if found.device.type != device.type:
            raise DeviceError("counts", str(found.device), str(device))
        last = None if self._counter is None else self._counter.last
        self._counter = ExpertCounter(self._engine, found)
        self._counter.last = last

    @with_label
    def gather_expert_counts(self, counts: torch.Tensor, zero: bool = False) -> torch.Tensor:
        """The sum of all ranks' `counts`, on the CPU: what `deepep.placement.place` takes. Collective.

        counts: int64 of any shape, the same on all ranks, [layers, E] say, filled by this buffer's calls.
        zero: sets it to 0 behind that, for what is counted next.

        The host waits for what was counted, and for the ranks that take part, up to the time-out. Raises, on
        all ranks, ArgumentTypeError, ShapeError, MismatchError, PeerTimeoutError.
        """
        self._check_alive()
        try:
            zeroed = check_flag("zero", zero)
            shape = _check_counts(counts).shape
            if len(shape) > MOST_DIMENSIONS:
                raise ShapeError("counts", str(list(shape)), f"at most {MOST_DIMENSIONS} dimensions")
        except ArgumentError as problem:
            self._engine.refuse(Operation.GATHER, problem, Schedule())
        if self._counter is not None and self._counter.last is not None:
            self._counter.last.current_stream_wait()
        mine = counts.detach().to("cpu", copy=True).contiguous()
        extents = {f"counts.shape[{axis}]": extent for axis, extent in enumerate(shape)}
        everyone = self._engine.gather(mine, {"counts.ndim": len(shape), **extents})
        if zeroed:
            with torch.inference_mode():  # they may have been made in it
                counts.zero_()
        return torch.stack(list(everyone.values())).sum(0)

    def _check_alive(self) -> None:
        raise NotImplementedError


def _check_counts(counts: object) -> torch.Tensor:
    if not isinstance(counts, torch.Tensor) or counts.layout != torch.strided or counts.is_meta:
        raise ArgumentTypeError("counts", type(counts).__name__, "a dense tensor of int64")
    if counts.dtype != torch.int64:
        raise ArgumentTypeError("counts", str(counts.dtype), "torch.int64")
    return counts
