"""Requests and results of dispatches and combines with one row per (token, local expert): elastic.py.

Shapes: R ranks, E experts, L local experts, K top-k, T tokens here, H hidden, M maximum tokens per rank, N
rows received, X rows of the expanded layout, P scales per token. A *lane* is one of a token's K entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deepep.runtime.completion import Completion
from deepep.runtime.engine import Engine
from deepep.runtime.requests import Route


@dataclass(slots=True)
class ElasticDispatchRequest:
    """Rows to send. x, scales: as of DispatchRequest; topk_weights [T, K] float32 or None.

    topk_idx [T, K]: of a fresh dispatch. num_max_tokens: M, by which source tokens are numbered.
    expand: a row for every lane, grouped by expert, each from a multiple of `alignment` on. zero_padding: the
    gaps are zeroed. column_major: scales with strides (1, rows rounded up to 4).
    wait_for_counts: the host waits, and hands out as many rows as come; else R * M, and as many expanded ones
    as those can be, or num_max_rows.
    loads [L] int32: counts of lanes are added to it. before_epilogue: what the epilogue comes behind, too.
    payload: as of DispatchRequest.
    """

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    num_experts: int
    num_max_tokens: int
    alignment: int = 1
    expand: bool = False
    zero_padding: bool = False
    column_major: bool = False
    wait_for_counts: bool = True
    num_max_rows: int | None = None
    loads: Tensor | None = None
    before_epilogue: Completion | None = None
    num_sms: int = 0
    payload: int = 0


@dataclass(eq=False)
class ElasticRoute:
    """A dispatch's route, and what a rank knows of its rows there.

    topk_idx [T, K]: as sent. recv_topk_idx [N, K]: local expert or -1. counts: lanes of each local expert, if
    the host knows them; else X is most_rows. slots [N, K] int64 and expert_counts [L] int32: if rows were
    expanded. overflow [1] int32: 1 if lanes had no room (only where that can be). completion: of the
    dispatch, if it was asynchronous.
    """

    route: Route
    topk_idx: Tensor
    recv_topk_idx: Tensor
    num_max_tokens: int
    alignment: int
    most_rows: int = 0
    counts: list[int] | None = None
    slots: Tensor | None = None
    expert_counts: Tensor | None = None
    overflow: Tensor | None = None
    completion: Completion | None = None

    @cached_property
    def num_rows(self) -> int:
        """X: where the host knows it, of an expanded dispatch whether this one expanded or not."""
        return self.most_rows if self.counts is None else sum(aligned_list(self.counts, self.alignment))

    @property
    def num_local(self) -> int:
        """L."""
        return self.route.num_experts // self.route.engine.info.num_ranks

    @property
    def aligned_counts(self) -> list[int]:
        """Counts of each local expert, rounded up; empty where the host does not know them."""
        return aligned_list(self.counts or [], self.alignment)

    # Tensors that few ask for: made when they are, in the current stream's order.

    def rank_ends(self) -> Tensor:
        """[R] int32: inclusive sums of the rows received, by source rank."""
        return self.route.engine.rows_by_source(self.route).cumsum(0, dtype=torch.int32)

    def lanes_per_expert(self) -> Tensor:
        """[L] int32: lanes of each local expert."""
        if self.expert_counts is None:
            self.expert_counts = self.recv_topk_idx.new_empty(self.num_local, dtype=torch.int32)
            count_lanes(self.route.engine, self, self.expert_counts)
        return self.expert_counts

    def expert_ends(self) -> Tensor:
        """[L] int32: inclusive sums of aligned counts; of expanded rows: where each expert's end, or X."""
        counts = self.lanes_per_expert()
        whole = aligned(counts, self.alignment)
        ends = whole.cumsum(0, dtype=torch.int32)
        return ends if self.slots is None else (ends - whole + counts).clamp(max=self.num_rows)

    def row_sources(self) -> tuple[Tensor, Tensor]:
        """[N] int32 each: source rank, R of rows behind the real ones; and source token."""
        tokens = self.route.engine.route_sources(self.route)
        assert tokens is not None
        index = torch.arange(self.recv_topk_idx.shape[0], dtype=torch.int32, device=tokens.device)
        behind = tokens.new_zeros(max(0, len(index) - len(tokens)))
        return torch.searchsorted(self.rank_ends(), index, right=True), torch.cat([tokens, behind])

    def metadata(self) -> Tensor:
        """[N, K + 2] int32, -1 in rows behind the real ones: source rank * M + source token; source rank * K
        + the last lane that is this rank's; the expanded row of each lane, or -1.
        """
        engine, (num_rows, num_topk) = self.route.engine, self.recv_topk_idx.shape
        out = self.recv_topk_idx.new_full((num_rows, num_topk + 2), -1, dtype=torch.int32)
        source, tokens = self.row_sources()
        out[:, 0] = source * self.num_max_tokens + tokens
        lane = torch.arange(num_topk, dtype=torch.int32, device=out.device)
        out[:, 1] = source * num_topk + torch.where(self.recv_topk_idx >= 0, lane, -1).amax(1)
        out.masked_fill_((source == engine.info.num_ranks).unsqueeze(1), -1)
        if self.slots is not None:
            out[:, 2:] = self.slots
        return out

    def send_slots(self) -> Tensor:
        """[T, K] int32: this rank * M + the token's place among those that go to the lane's rank; or -1."""
        place = self.route.is_token_in_rank.cumsum(0) - 1 + self.route.engine.info.rank * self.num_max_tokens
        owner = self.topk_idx.long().clamp(min=0) // self.num_local
        return torch.where(self.topk_idx >= 0, place.gather(1, owner), -1).int()


@dataclass(slots=True)
class ElasticDispatched:
    """x [N, H] or [X, H], scales, topk_idx [N, K] (None if expanded), topk_weights [N, K] or [X] or None."""

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    route: ElasticRoute
    completion: Completion | None


@dataclass(slots=True)
class ElasticCombineRequest:
    """Rows to return: x [N, H], or [X, H] where they were expanded; topk_weights [N, K] or [X], or None;
    biases [T, H] each. single_reduction: the owner sums all lanes and rounds once. before_epilogue: what the
    sums come behind, too.
    """

    x: Tensor
    route: ElasticRoute
    topk_weights: Tensor | None = None
    biases: tuple[Tensor, ...] = ()
    single_reduction: bool = False
    before_epilogue: Completion | None = None
    num_sms: int = 0


def worst_rows(num_tokens: int, num_topk: int, num_local: int, alignment: int) -> int:
    """X, the most expanded rows of so many received ones, if no token names an expert twice."""
    rows = num_tokens * min(num_topk, num_local) + (alignment - 1) * num_local
    return align(rows, alignment)


def count_lanes(engine: Engine, route: ElasticRoute, counts: Tensor) -> None:
    """Writes the lanes of each local expert to counts [L] int32."""
    if route.counts is not None:
        counts.copy_(torch.tensor(route.counts, dtype=torch.int32, device="cpu"))
        return
    slots = torch.empty(route.recv_topk_idx.shape, dtype=torch.int64, device=counts.device)
    engine.local_rows.sort(route.recv_topk_idx, slots, counts)


def align(value: int, alignment: int) -> int:
    """`value` rounded up."""
    return -(-value // alignment) * alignment


def aligned_list(counts: list[int], alignment: int) -> list[int]:
    """Each count rounded up: a new list."""
    return list(counts) if alignment == 1 else [-(-count // alignment) * alignment for count in counts]


def aligned(counts: Tensor, alignment: int) -> Tensor:
    """Counts rounded up."""
    return (counts + (alignment - 1)) // alignment * alignment
