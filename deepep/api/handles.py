"""Handles: what a dispatch hands out so that later calls can follow the same routes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from deepep.errors import ArgumentTypeError, HandleError
from deepep.runtime.engine import Engine
from deepep.runtime.requests import LowLatencyRoute, Route


@dataclass(eq=False, repr=False)
class DispatchHandle:
    """Handle of a high-throughput dispatch, valid for any number of cached dispatches and combines.

    Indexing gives V1's intranode tuple where this library has its entries, None where it has not:
    0: rank_prefix_matrix [R, R] int32, of which column `rank` is meaningful (inclusive sums of rows received,
    by source rank); 3: recv_src_idx [N] int32, the source token of each row; 4: is_token_in_rank [T, R] bool.
    """

    route: Route

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return (self[i] for i in range(6))

    def __getitem__(self, index: int) -> torch.Tensor | None:
        if not -6 <= index < 6:
            raise IndexError(f"handle index {index}; allowed: -6 to 5")
        entry, route = index % 6, self.route
        if entry != 4 and (route.plan is None or entry not in (0, 3)):
            return None
        with torch.inference_mode(False), torch.no_grad():  # to be saved for a backward
            if entry == 4:
                table = route.is_token_in_rank
                return table.clone() if table.is_inference() else table
            if entry == 3:
                sources = route.engine.route_sources(route)
                return None if sources is None else sources.clone()
            counts = route.engine.route_counts(route).to(route.is_token_in_rank.device, torch.int32)
            return counts.cumsum(dim=0, dtype=torch.int32)

    def __repr__(self) -> str:
        rows = "unknown" if self.route.num_rows is None else self.route.num_rows
        return f"DispatchHandle({self.route.num_tokens} tokens sent, {rows} rows received)"


class LowLatencyHandle(NamedTuple):
    """V1's 5-tuple of a low-latency dispatch.

    recv_src_info: [L, R*M] int32, source token of each row.
    layout_range: [L, R] int64, (begin << 32) | count of each source rank's rows.
    num_max_dispatch_tokens_per_rank, hidden, num_experts: M, H and E.
    """

    recv_src_info: torch.Tensor
    layout_range: torch.Tensor
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int


class OwnedLowLatencyHandle(LowLatencyHandle):
    """A LowLatencyHandle with the route behind it; unpacks, compares and indexes as the plain tuple."""

    route: LowLatencyRoute


AnyLowLatencyHandle = LowLatencyHandle | tuple[torch.Tensor, torch.Tensor, int, int, int]
"""The handle of a low-latency dispatch, or its five entries put together again."""


def route_of(handle: object) -> Route:
    """The route behind a high-throughput handle. Raises ArgumentTypeError or HandleError."""
    if isinstance(handle, LowLatencyHandle):
        raise HandleError("handle", "the handle of a low-latency dispatch", "the handle of Buffer.dispatch")
    if not isinstance(handle, DispatchHandle):
        raise ArgumentTypeError("handle", type(handle).__name__, "the handle of Buffer.dispatch")
    return handle.route


def low_latency_route_of(handle: object, engine: Engine) -> LowLatencyRoute:
    """The route behind a low-latency handle, or behind five values put together by the caller."""
    if isinstance(handle, DispatchHandle):
        raise HandleError("handle", "the handle of Buffer.dispatch", "the handle of low_latency_dispatch")
    if isinstance(handle, OwnedLowLatencyHandle):
        return handle.route
    if not isinstance(handle, (tuple, list)) or len(handle) != 5:
        raise ArgumentTypeError("handle", type(handle).__name__, "the handle of low_latency_dispatch")
    source_index, ranges, num_max_tokens, hidden, num_experts = handle
    return LowLatencyRoute(source_index, ranges, num_max_tokens, hidden, num_experts, engine)
