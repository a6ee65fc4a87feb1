"""Virtual ranks: the ranks of one NVLink domain as streams of one process on one GPU.

Each rank has its own heap, its own stream and a share of the SMs; all ranks' kernels are resident together,
as they would be on as many GPUs. The kernels cannot see the difference. What this cannot show is the links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from deepep.backends.cuda.launch import (
    Counts,
    Endpoint,
    Plan,
)
from deepep.backends.cuda.memory.arrays import ReceiveArrays, receive_spec
from deepep.backends.cuda.sm_split import NO_COPY_ENGINE, combine_split, dispatch_split


@dataclass
class RankInputs:
    """One rank's arguments of a dispatch, as `Endpoint.dispatch` takes them."""

    x: torch.Tensor  # [T, H]
    is_token_in_rank: torch.Tensor  # [T, R] bool
    tokens_per_rank: torch.Tensor  # [R] int32
    tokens_per_expert: torch.Tensor | None = None  # [E] int32
    scales: torch.Tensor | None = None  # [T, P]
    topk_idx: torch.Tensor | None = None  # [T, K]
    topk_weights: torch.Tensor | None = None  # [T, K]


@dataclass
class Arrived:
    """One rank's results of a dispatch."""

    received: ReceiveArrays
    plan: Plan
    counts: Counts | None = None


@dataclass
class VirtualDomain:
    """`num_ranks` endpoints on one device.

    heap_bytes: symmetric memory per rank, control and staging included. staging_bytes: of it, what rows
    return to. ce_chunks: as `Endpoint.combine` takes it.
    """

    num_ranks: int
    num_sms: int = 0
    heap_bytes: int = 256 << 20
    staging_bytes: int = 64 << 20
    timeout: float = 5.0
    ce_chunks: tuple[int, int] = NO_COPY_ENGINE
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    endpoints: list[Endpoint] = field(init=False)

    def __post_init__(self) -> None:
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        if self.num_sms == 0:
            self.num_sms = sms // self.num_ranks
        if self.num_sms * self.num_ranks > sms:
            raise ValueError(f"{self.num_ranks} ranks of {self.num_sms} SMs do not fit on {sms} SMs together")
        heaps = [
            torch.empty(self.heap_bytes, dtype=torch.uint8, device=self.device) for _ in range(self.num_ranks)
        ]
        addresses = [heap.data_ptr() for heap in heaps]
        self.streams = [torch.cuda.Stream(self.device) for _ in range(self.num_ranks)]
        self.endpoints = [
            Endpoint(r, heaps[r], addresses, staging_bytes=self.staging_bytes, timeout=self.timeout)
            for r in range(self.num_ranks)
        ]
        torch.cuda.synchronize(self.device)

    def dispatch(
        self,
        inputs: Sequence[RankInputs],
        *,
        capacity: int,
        num_worst_tokens: int = 0,
        num_experts: int = 0,
        post_counts: bool = True,
        plans: Sequence[Plan] | None = None,
        order: Sequence[int] | None = None,
        skip: frozenset[int] = frozenset(),
        late: int | None = None,
        by_topk: frozenset[int] = frozenset(),
    ) -> list[Arrived]:
        """One dispatch of all ranks, launched in `order`; `skip` do not arrive, `late` comes 100 ms later.
        by_topk: ranks whose kernel finds out itself where tokens go, into the plan's in_rank.
        """
        torch.cuda.synchronize(self.device)
        self._begin(skip)
        results: dict[int, Arrived] = {}
        for r in order if order is not None else range(self.num_ranks):
            if r in skip:
                continue
            self._hold_back(r, late)
            endpoint, given = self.endpoints[r], inputs[r]
            stretch = endpoint.heap[endpoint.pool_begin :]
            split = dispatch_split(self.num_sms, self.num_ranks)
            stream = self.streams[r].cuda_stream
            if plans is not None:
                plan = plans[r]
                received = receive_spec(given.x, given.scales, None, False).carve(stretch, capacity)
                call = endpoint.prepare_cached(given.x, given.scales, split, capacity, plan)
                of_scales = 0 if given.scales is None else given.scales.data_ptr()
                to_scales = 0 if received.scales is None else received.scales.data_ptr()
                endpoint.domain.dispatch_cached(
                    call, given.x.data_ptr(), of_scales, received.x.data_ptr(), to_scales, stream
                )
            else:
                tokens, ranks = given.x.shape[0], self.num_ranks
                table = torch.empty((tokens + ranks, ranks), dtype=torch.int32, device=self.device)
                plan = Plan(table, tokens, capacity, endpoint.live)
                received = receive_spec(given.x, given.scales, given.topk_idx, True).carve(stretch, capacity)
                inside = r in by_topk
                plan.in_rank = torch.empty_like(given.is_token_in_rank) if inside else given.is_token_in_rank
                endpoint.dispatch(
                    given.x,
                    received,
                    split,
                    stream,
                    plan,
                    scales=given.scales,
                    topk_idx=given.topk_idx,
                    topk_weights=given.topk_weights,
                    is_token_in_rank=plan.in_rank,
                    tokens_per_rank=None if inside else given.tokens_per_rank,
                    tokens_per_expert=None if inside else given.tokens_per_expert,
                    num_local_experts=num_experts // ranks if inside else 0,
                    num_worst_tokens=num_worst_tokens,
                    post_counts=post_counts,
                )
                plan.source = received.source
            results[r] = Arrived(received, plan)
        self._end()
        if post_counts and plans is None:
            for r, arrived in results.items():
                arrived.counts = self.endpoints[r].wait_counts(num_experts // self.num_ranks)
                if arrived.counts is not None:
                    arrived.plan.num_rows = arrived.counts.num_rows
                    arrived.plan.known = arrived.counts.table
        torch.cuda.synchronize(self.device)
        return [results[r] for r in sorted(results)]

    def _begin(self, skip: frozenset[int]) -> None:
        """Before all ranks but those of `skip` launch an operation."""

    def _end(self) -> None:
        """After they have."""

    def _hold_back(self, rank: int, late: int | None) -> None:
        """Delays rank `late`: what is launched next for it starts about 100 ms after the others."""
        if rank == late:
            with torch.cuda.stream(self.streams[rank]):
                torch.cuda._sleep(180_000_000)

    def combine(
        self,
        rows: Sequence[torch.Tensor],
        plans: Sequence[Plan],
        *,
        hidden: int,
        topk_weights: Sequence[torch.Tensor] | None = None,
        biases: Sequence[tuple[torch.Tensor, ...]] | None = None,
        slots: Sequence[torch.Tensor] | None = None,
        factors: Sequence[torch.Tensor] | None = None,
        skip: frozenset[int] = frozenset(),
        late: int | None = None,
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """One combine of all ranks: (x [T, H], weights [T, K] or None) by rank.

        slots, factors: of expanded rows.
        """
        torch.cuda.synchronize(self.device)
        self._begin(skip)
        results = []
        for r in range(self.num_ranks):
            plan = plans[r]
            out = torch.empty((plan.num_tokens, hidden), dtype=torch.bfloat16, device=self.device)
            weights = None
            if topk_weights is not None:
                columns = (topk_weights if slots is None else slots)[r].shape[1]
                weights = torch.empty((plan.num_tokens, columns), dtype=torch.float32, device=self.device)
            results.append((out, weights))
            if r in skip:
                continue
            self._hold_back(r, late)
            self.endpoints[r].combine(
                rows[r],
                plan,
                combine_split(self.num_sms, self.num_ranks, expanded=slots is not None),
                self.streams[r].cuda_stream,
                topk_weights=None if topk_weights is None else topk_weights[r],
                biases=() if biases is None else biases[r],
                out=out,
                out_weights=weights,
                ce_chunks=self.ce_chunks if slots is None else NO_COPY_ENGINE,
                slots=None if slots is None else slots[r],
                factors=None if factors is None else factors[r],
            )
        self._end()
        torch.cuda.synchronize(self.device)
        return results
