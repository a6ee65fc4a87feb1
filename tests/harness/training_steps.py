"""A training step's communication, in parts: for tests that interrupt it, through public calls of Buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deepep.sim.cases.case import Case
from deepep.sim.cases.values import RankInputs, inputs

#: Where a training step can be interrupted: before each of these.
POINTS = (
    "layout",
    "dispatch",
    "experts",
    "combine",
    "cached dispatch",
    "async dispatch",
    "dispatch event",
    "async combine",
    "combine event",
    "barrier",
)
#: Those that a victim can enter while its peer has not: it dies inside.
CALLS = ("dispatch", "combine", "cached dispatch", "async dispatch", "async combine", "barrier")
#: The same of a step that is captured in a graph and replayed.
REPLAY = "replay"


class Step:
    """A training step's communication, as a user writes it. at: is called with the name of each point."""

    def __init__(self, buffer: Any, case: Case, device: torch.device) -> None:
        self.buffer = buffer
        self.case = case
        self.mine: RankInputs = inputs(case, buffer.rank).to(device)
        self.at: Callable[[str], None] = lambda point: None

    def dispatch(self, layout: Sequence[Any], **how: Any) -> Any:
        per_rank, per_node, per_expert, in_rank, _ = layout
        return self.buffer.dispatch(
            self.mine.x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.mine.topk_idx,
            topk_weights=self.mine.topk_weights,
            **how,
        )

    def run(self) -> None:
        """All of it, once."""
        buffer, mine, at = self.buffer, self.mine, self.at
        at("layout")
        layout = buffer.get_dispatch_layout(mine.topk_idx, self.case.num_experts)
        at("dispatch")
        rows, _, weights, _, handle, _ = self.dispatch(layout)
        at("experts")
        returned = rows * 2
        at("combine")
        buffer.combine(returned, handle, topk_weights=weights)
        at("cached dispatch")
        buffer.dispatch(mine.x, handle=handle)
        at("async dispatch")
        early = {"async_finish": True, "allocate_on_comm_stream": True}
        *layout, ready = buffer.get_dispatch_layout(mine.topk_idx, self.case.num_experts, async_finish=True)
        rows, *_, handle, event = self.dispatch((*layout, None), previous_event=ready, **early)
        at("dispatch event")
        event.current_stream_wait()
        if rows.is_cuda:
            rows.record_stream(torch.cuda.current_stream())
        returned = rows * 2
        at("async combine")
        event = buffer.combine(returned, handle, async_finish=True)[2]
        at("combine event")
        event.current_stream_wait()
        at("barrier")
        buffer.clean_low_latency_buffer(8, self.case.hidden, self.case.num_experts)


class CapturedStep(Step):
    """A step that is captured at its first run; each run is a replay, and an eager layout and dispatch."""

    def __init__(self, buffer: Any, case: Case, device: torch.device) -> None:
        super().__init__(buffer, case, device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def _capture(self) -> torch.cuda.CUDAGraph:
        worst = sum(self.case.num_tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layout = self.buffer.get_dispatch_layout(self.mine.topk_idx, self.case.num_experts)
            rows, _, _, _, handle, _ = self.dispatch(layout, num_worst_tokens=worst)
            self._kept = self.buffer.combine(rows * 2, handle)[0]
        return graph

    def run(self) -> None:
        if self._graph is None:
            Step.run(self)  # eagerly once before capture, so that all is loaded and allocated
            torch.cuda.synchronize()
            self._graph = self._capture()
        for _ in range(3):
            self._graph.replay()
        torch.cuda.synchronize()
        self.at(REPLAY)
        self._graph.replay()
        self.at("layout")
        layout = self.buffer.get_dispatch_layout(self.mine.topk_idx, self.case.num_experts)
        self.at("dispatch")
        self.dispatch(layout)
        self.at("end")
