"""Handles: what a dispatch hands out so that later calls can follow the same routes back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from deepep.api.rebuilt import (
    NUM_ENTRIES,
    PREFIX,
    SEAL,
    SOURCES,
    TABLE,
    rebuilt_low_latency_route,
    rebuilt_route,
    seal,
)
from deepep.errors import ArgumentTypeError, DeepEPError, HandleError
from deepep.runtime.completion import Completion
from deepep.runtime.engine import Engine
from deepep.runtime.requests import LowLatencyRoute, Route


@dataclass(eq=False, repr=False)
class DispatchHandle:
    """Handle of a high-throughput dispatch, valid for any number of cached dispatches and combines.

    A sequence of six, as V1's intranode tuple: this library's entries where it has them, None where not.
    0: rank_prefix_matrix [R, R] int32, inclusive sums of rows by source rank, of each destination; 1: int64,
    for this library alone (rebuilt.py); 3: recv_src_idx [N] int32, the source token of each row;
    4: is_token_in_rank [T, R] bool. Taking them waits for the dispatch. Put together again as a tuple, they
    are a handle, too.
    """

    route: Route
    completion: Completion | None = None
    _made: dict[int, torch.Tensor | None] | None = field(default=None, init=False)

    def __len__(self) -> int:
        return NUM_ENTRIES

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        return (self[i] for i in range(NUM_ENTRIES))

    def __getitem__(self, index: int) -> torch.Tensor | None:
        if not -NUM_ENTRIES <= index < NUM_ENTRIES:
            raise IndexError(f"handle index {index}; allowed: {-NUM_ENTRIES} to {NUM_ENTRIES - 1}")
        return self._entries[index % NUM_ENTRIES]

    @property
    def _entries(self) -> dict[int, torch.Tensor | None]:
        """Entries by place, made once they can be: the same tensors each time."""
        if self._made is not None:
            return self._made
        route = self.route
        entries: dict[int, torch.Tensor | None] = dict.fromkeys(range(NUM_ENTRIES))
        with torch.inference_mode(False), torch.no_grad():  # normal tensors: to be saved for a backward
            if self.completion is not None:
                with contextlib.suppress(DeepEPError):  # a dispatch that failed has no plan
                    self.completion.host_wait()
            table = route.is_token_in_rank
            entries[TABLE] = table.clone() if table.is_inference() else table
            if route.plan is None:
                return entries
            sources = route.engine.route_sources(route)
            entries[SOURCES] = sources = None if sources is None else sources.clone()
            counts = route.engine.route_counts(route).to(table.device, torch.int32)
            entries[PREFIX] = prefix = counts.cumsum(dim=0, dtype=torch.int32)
            entries[SEAL] = seal(route, prefix, sources)
        self._made = entries
        return entries

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

    route: LowLatencyRoute | None = None  # none where namedtuple's own _replace has made it


AnyDispatchHandle = DispatchHandle | tuple[torch.Tensor | None, ...]
"""The handle of a dispatch, or its six entries put together again."""

AnyLowLatencyHandle = LowLatencyHandle | tuple[torch.Tensor, torch.Tensor, int, int, int]
"""The handle of a low-latency dispatch, or its five entries put together again."""


def route_of(handle: object, engine: Engine) -> Route:
    """The route behind a high-throughput handle, or behind its six entries put together by the caller.

    Raises ArgumentTypeError or HandleError.
    """
    if isinstance(handle, DispatchHandle):
        return handle.route
    if isinstance(handle, LowLatencyHandle):
        raise HandleError("handle", "the handle of a low-latency dispatch", "the handle of Buffer.dispatch")
    if not isinstance(handle, (tuple, list)):
        raise ArgumentTypeError("handle", type(handle).__name__, "the handle of Buffer.dispatch")
    return rebuilt_route(handle, engine)


def low_latency_route_of(handle: object, engine: Engine) -> LowLatencyRoute:
    """The route behind a low-latency handle, or behind five values put together by the caller."""
    if isinstance(handle, DispatchHandle):
        raise HandleError("handle", "the handle of Buffer.dispatch", "the handle of low_latency_dispatch")
    if isinstance(handle, OwnedLowLatencyHandle) and handle.route is not None:
        return handle.route
    if not isinstance(handle, (tuple, list)) or len(handle) != 5:
        raise ArgumentTypeError("handle", type(handle).__name__, "the handle of low_latency_dispatch")
    return rebuilt_low_latency_route(handle, engine)
