"""Cases cut out of a recorded routing trace (deepep.trace), so that one's own routing can be fuzzed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from deepep.sim.cases.case import Case, Limits, draw_mask, draw_options
from deepep.sim.cases.choices import Choices
from deepep.trace import RoutingTrace


@dataclass(frozen=True)
class TraceSource:
    """Draws windows of a trace: one layer of one step, a few neighbouring tokens of it for every rank.

    The routing is the trace's own, and so are E and K; the number of ranks, the window, the values of the
    tensors and the options are drawn.
    """

    trace: RoutingTrace

    @staticmethod
    def load(path: str | os.PathLike[str]) -> TraceSource:
        """Reads a trace file.

        Raises:
            TraceError: the file is not a trace, or it has no batches to draw from.
        """
        return TraceSource(RoutingTrace.load(path))

    def draw(self, choices: Choices, limits: Limits) -> Case:
        """A case within `limits`; the bounds of E and K are the trace's.

        Raises:
            ValueError: the trace is empty, or its experts divide among none of the numbers of ranks allowed.
        """
        trace = self.trace
        ranks = [r for r in limits.ranks if trace.num_experts % r == 0]
        if not ranks:
            raise ValueError(f"the trace's {trace.num_experts} experts divide among none of {limits.ranks}")
        if len(trace) == 0:
            raise ValueError("the trace is empty")
        index = choices.integer(0, len(trace) - 1)
        step, layer = divmod(index, trace.num_layers)
        num_ranks = choices.pick(ranks)
        batch = trace.batch(step, layer)
        batch = batch if num_ranks == trace.num_ranks else batch.reshard(num_ranks)
        windows = []
        for indices in batch.topk_idx:
            length = choices.integer(0, min(len(indices), limits.max_tokens))
            start = choices.integer(0, len(indices) - length)
            windows.append(np.ascontiguousarray(indices[start : start + length].numpy().astype(np.int64)))
        return Case(
            num_experts=trace.num_experts,
            topk_idx=tuple(windows),
            hidden=choices.pick(limits.hidden),
            seed=choices.seed(),
            options=draw_options(choices, limits.fixed),
            masked=draw_mask(choices, num_ranks, limits.masks),
            origin=f"trace+step {batch.step} layer {layer}",
        ).legal()
