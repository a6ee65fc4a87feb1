"""Routes of the CUDA backend: their plans taken apart for callers, and made again of tables and counts."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.launch import Plan
from deepep.errors import HandleError
from deepep.runtime import streams
from deepep.runtime.engine import Engine
from deepep.runtime.requests import Route


def plan_of(route: Route) -> Plan:
    """The plan that a dispatch of the CUDA backend left. Raises HandleError where there is none."""
    if not isinstance(route.plan, Plan):
        raise HandleError("handle", "one whose dispatch did not finish", "a handle of a dispatch here")
    return route.plan


class CudaRoutes(Engine):
    """The part of the CUDA engine that reads routes and restores them. See `Engine`.

    index: the device's. live: the ranks that take part, as bits.
    """

    device: torch.device
    index: int
    live: int

    def rows_by_source(self, route: Route) -> Tensor:
        plan = plan_of(route)
        if plan.stream != streams.current_address(self.index):
            plan.table.record_stream(streams.current(self.index))
        return plan.counts[:, self.info.rank]

    def route_counts(self, route: Route) -> Tensor:
        plan, ranks = plan_of(route), self.info.num_ranks
        if plan.known is None:
            return plan.counts.to("cpu", torch.int64)
        return torch.tensor(plan.known.tolist(), dtype=torch.int64, device="cpu").view(ranks, ranks)

    def route_sources(self, route: Route) -> Tensor | None:
        plan = plan_of(route)
        if plan.source is not None and plan.stream != streams.current_address(self.index):
            plan.source.record_stream(streams.current(self.index))
        return plan.source

    def route_table(self, route: Route) -> Tensor:
        return plan_of(route).table

    def restore_route(
        self, is_token_in_rank: Tensor, counts: Tensor, num_experts: int, table: Tensor | None = None
    ) -> Route:
        tokens, ranks = is_token_in_rank.shape
        rows: list[list[int]] = counts.tolist()
        if table is None:
            table = self._table_of(is_token_in_rank, counts.to(torch.int64))
        elif table.shape != (tokens + ranks, ranks) or not table.is_contiguous():
            raise HandleError(
                "route", f"a table {list(table.shape)}", f"one of {tokens} tokens, {ranks} ranks"
            )
        received = [sum(column) for column in zip(*rows, strict=True)]
        own = received[self.info.rank]
        plan = Plan(table, tokens, own, self.live, streams.current_address(self.index))
        plan.most_rows = max(received)
        plan.known = _cuda.RowCounts([count for row in rows for count in row])
        return Route(self, tokens, num_experts, is_token_in_rank, plan.num_rows, plan)

    def _table_of(self, is_token_in_rank: Tensor, counts: Tensor) -> Tensor:
        """A plan's table, worked out anew: waits for the device."""
        first_row = (counts.cumsum(0) - counts)[self.info.rank].to(self.device)  # [R]
        position = is_token_in_rank.to(torch.int32).cumsum(0) - 1 + first_row
        send_row = torch.where(is_token_in_rank, position, -1).to(torch.int32)
        return torch.cat([send_row, counts.to(self.device, torch.int32)])
