"""Dispatches of virtual ranks into the expanded layout, by one kernel or by a dispatch and a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from deepep.backends.cuda.launch import Plan
from deepep.backends.cuda.local_rows import RowKernels
from deepep.backends.cuda.memory.arrays import ExpandedArrays, ReceiveArrays, num_scale_tiles, receive_spec
from deepep.backends.cuda.sm_split import BlockSplit, dispatch_split, expanded_split
from deepep.reference.elastic import ElasticInput
from deepep.runtime.elastic import _Epilogue
from deepep.runtime.elastic_requests import ElasticDispatchRequest, ElasticRoute
from deepep.runtime.requests import Schedule
from harness.virtual_ranks import VirtualDomain


@dataclass
class ExpandedRank:
    """One rank's call: inputs on the device, and memory for all that comes of it."""

    given: ElasticInput
    plan: Plan
    received: ReceiveArrays
    expanded: ExpandedArrays


class ExpandedDomain:
    """Calls of all ranks of a virtual domain. capacities: expanded rows of each; room: received ones.

    worst: what a host that does not wait hands out, 0: it waits.
    """

    def __init__(
        self,
        domain: VirtualDomain,
        inputs: Sequence[ElasticInput],
        num_experts: int,
        *,
        capacities: Sequence[int],
        room: int,
        alignment: int = 1,
        column_major: bool = False,
        zero_padding: bool = False,
        worst: int = 0,
    ) -> None:
        self.domain, self.num_experts, self.worst = domain, num_experts, worst
        self.ranks = []
        device, count = domain.device, domain.num_ranks
        for endpoint, given, capacity in zip(domain.endpoints, inputs, capacities, strict=True):
            x, idx, scales = given.x.to(device), given.topk_idx.to(device), given.scales
            weights = given.topk_weights
            assert weights is not None
            scales = None if scales is None else scales.to(device)
            tokens, topk = idx.shape
            ints = torch.empty((tokens + count, count), dtype=torch.int32, device=device)
            plan = Plan(ints, tokens, room, endpoint.live)
            plan.in_rank = torch.empty((tokens, count), dtype=torch.bool, device=device)
            pool = endpoint.heap[endpoint.pool_begin :]
            spec = receive_spec(x, scales, idx, True)
            begin = -(-spec.num_bytes(room) // 128) * 128
            padded, local = -(-capacity // 4) * 4, num_experts // count
            has_tiles = scales is not None and column_major
            expanded = ExpandedArrays(
                places=torch.empty((max(1, tokens), topk), dtype=torch.int32, device=device),
                recv_places=pool[begin : begin + 4 * room * topk].view(torch.int32).view(room, topk),
                x=torch.empty((capacity, x.shape[1]), dtype=x.dtype, device=device),
                scales=None if scales is None else scales.new_empty(padded * scales.shape[1]),
                weights=torch.empty(capacity, dtype=torch.float32, device=device),
                slots=torch.empty((room, topk), dtype=torch.int64, device=device),
                expert_counts=torch.empty(local, dtype=torch.int32, device=device),
                overflow=torch.zeros(1, dtype=torch.int32, device=device),
                origins=torch.empty(capacity, dtype=torch.int32, device=device) if has_tiles else None,
                tiles=torch.zeros(num_scale_tiles(capacity, local), dtype=torch.int32, device=device)
                if has_tiles
                else None,
                alignment=alignment,
                column_major=column_major,
                zero_padding=zero_padding,
            )
            inside = ElasticInput(x, idx, weights.to(device), scales)
            self.ranks.append(ExpandedRank(inside, plan, spec.carve(pool, room), expanded))

    def launch(self, *, spreads: bool = True, pushing: int = 0) -> None:
        """One dispatch of all ranks; not `spreads`: as a dispatch by top-k leaves the rows. pushing: SMs that
        push in one that spreads, 0: as many as the engine has push.
        """
        sms = self.domain.num_sms
        split = (expanded_split if spreads else dispatch_split)(sms, self.domain.num_ranks)
        if pushing:
            split = BlockSplit(sms, pushing, sms - pushing)
        for endpoint, stream, mine in zip(
            self.domain.endpoints, self.domain.streams, self.ranks, strict=True
        ):
            assert mine.plan.in_rank is not None
            if spreads and mine.expanded.tiles is not None:
                with torch.cuda.stream(stream):
                    mine.expanded.tiles.zero_()
            endpoint.dispatch(
                mine.given.x,
                mine.received,
                split,
                stream.cuda_stream,
                mine.plan,
                scales=mine.given.scales,
                topk_idx=mine.given.topk_idx,
                topk_weights=mine.given.topk_weights,
                is_token_in_rank=mine.plan.in_rank,
                num_local_experts=self.num_experts // self.domain.num_ranks,
                num_worst_tokens=self.worst,
                post_counts=self.worst == 0,
                expanded=mine.expanded if spreads else None,
            )

    def wait_counts(self) -> list[int]:
        """Rows that each rank received, for which its host waits."""
        rows = []
        for endpoint in self.domain.endpoints:
            counts = endpoint.wait_counts(self.num_experts // self.domain.num_ranks)
            assert counts is not None
            assert counts.phase == 0
            rows.append(counts.num_rows)
        return rows

    def spread_behind(self, num_rows: Sequence[int]) -> None:
        """A dispatch that spreads no rows needs this behind it: a sort and a pass over the rows, on each."""
        for stream, mine, rows in zip(self.domain.streams, self.ranks, num_rows, strict=True):
            kernels = RowKernels(self.domain.device.index or 0)
            with torch.cuda.stream(stream):
                idx, slots = mine.received.topk_idx, mine.expanded.slots[:rows]
                assert idx is not None
                kernels.sort(idx[:rows], slots, mine.expanded.expert_counts)
                kernels.spread(mine.received.x[:rows], slots, mine.expanded.x)

    def finish_behind(self, num_rows: Sequence[int]) -> None:
        """All that ElasticBuffer does behind a dispatch that spreads no rows: sort, rows, weights, scales. Of
        the first ranks, if there are more than numbers of rows.
        """
        for stream, mine, rows in zip(self.domain.streams, self.ranks, num_rows, strict=False):
            ranks, to, received = self.domain.num_ranks, mine.expanded, mine.received
            engine: Any = SimpleNamespace(
                info=SimpleNamespace(num_ranks=ranks),
                local_rows=RowKernels(self.domain.device.index or 0),
                locally=_at_once,
            )
            assert received.topk_idx is not None
            assert received.topk_weights is not None
            request = ElasticDispatchRequest(
                mine.given.x,
                mine.given.scales,
                mine.given.topk_idx,
                mine.given.topk_weights,
                self.num_experts,
                rows // ranks,
                to.alignment,
                expand=True,
                zero_padding=to.zero_padding,
                column_major=to.column_major,
            )
            route = ElasticRoute(
                SimpleNamespace(num_experts=self.num_experts, engine=engine),  # type: ignore[arg-type]
                mine.given.topk_idx,
                received.topk_idx[:rows],
                rows // ranks,
                to.alignment,
                len(to.x),
            )
            scales = None if received.scales is None else received.scales[:rows]
            arrived = received.x[:rows], scales, received.topk_weights[:rows]
            with torch.cuda.stream(stream):
                _Epilogue(engine, request, route, *arrived).run(Schedule(), None)


def _at_once(make: Any, fill: Any, given: Sequence[object], schedule: Schedule) -> tuple[Any, None]:
    """`Engine.locally` on the current stream."""
    made = make()
    fill(made)
    return made, None
