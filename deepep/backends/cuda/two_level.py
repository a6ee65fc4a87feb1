"""One rank of several NVLink domains: the two-level kernels' launches, and the memory that they need.

Inside a domain ranks write to each other's heaps, as `Endpoint` says. To other domains they put, from memory
that a NIC knows, by way of a queue that another kernel serves (csrc/put_server): over NVSHMEM between
processes, by plain stores between the virtual ranks of tests.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from deepep import _core, _cuda
from deepep.backends.cuda.launch import MAX_BLOCKS, MAX_LOCAL_EXPERTS, Endpoint
from deepep.errors import ArgumentError


@dataclass(frozen=True)
class DomainPlan:
    """The ranks of a group by domain: `ranks_per_domain` consecutive ones each.

    live: those that take part, as bits.
    """

    num_ranks: int
    ranks_per_domain: int
    live: int

    def neighbours(self, rank: int) -> range:
        """The ranks of a rank's domain, itself among them."""
        first = rank - rank % self.ranks_per_domain
        return range(first, min(first + self.ranks_per_domain, self.num_ranks))


@dataclass(frozen=True)
class LargestCall:
    """Sizes that memory is laid out for: T of a rank, bytes of a row either way, scales of a row, K.

    window: tokens whose rows are under way together; 0: chosen by the number of domains.
    """

    max_tokens: int
    row_bytes: int
    num_scales: int
    num_topk: int
    window: int = 0


def two_level_shape(plan: DomainPlan, largest: LargestCall) -> _cuda.TwoLevelShape:
    """Sizes of all memory, the same on all ranks."""
    domains = -(-plan.num_ranks // plan.ranks_per_domain)
    return _cuda.TwoLevelShape(
        num_ranks=plan.num_ranks,
        ranks_per_domain=plan.ranks_per_domain,
        live=plan.live,
        max_local_experts=MAX_LOCAL_EXPERTS,
        max_blocks=MAX_BLOCKS,
        window=largest.window or _core.default_window(domains),
        row_bytes=largest.row_bytes,
        num_scales=largest.num_scales,
        num_topk=largest.num_topk,
    )


class TwoLevelEndpoint(Endpoint):
    """The operations of one rank on a group of several domains. Who takes part is fixed with the memory.

    heap, addresses: as of `Endpoint`; 0 for ranks of other domains. remote: this rank's memory that its NIC
    knows, uint8 [shape.remote_bytes] on the device. serve: the function that serves puts
    (csrc/put_server/service.hpp), or 0 where whoever launches has them served; pes: by rank, what it calls
    that rank's process. gathered: where launches go instead of a stream, of many virtual ranks.
    """

    def __init__(
        self,
        rank: int,
        heap: torch.Tensor,
        addresses: list[int],
        *,
        plan: DomainPlan,
        largest: LargestCall,
        remote: torch.Tensor,
        timeout: float,
        serve: int = 0,
        pes: Sequence[int] = (),
        turns: _cuda.Turns | None = None,
        gathered: _cuda.VirtualLaunches | None = None,
    ) -> None:
        self._gathered = gathered
        self.shape, self.largest, self.remote = two_level_shape(plan, largest), largest, remote
        self._serve, self._pes = serve, list(pes)
        super().__init__(rank, heap, addresses, staging_bytes=0, timeout=timeout, turns=turns)
        self.live = plan.live

    def _reserved_bytes(self) -> int:
        return self.shape.heap_bytes

    def _make_domain(self, addresses: list[int], turns: _cuda.Turns) -> _cuda.Domain:
        def zeros(num_bytes: int) -> torch.Tensor:
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

        self.remote.zero_()
        self._rail_state = zeros(_cuda.RAIL_STATE_BYTES)
        self._before = zeros(4 * -(-max(1, self.largest.max_tokens) // _core.CHUNK_RECORDS) * self.num_ranks)
        orders = self.shape.num_put_orders
        self._orders = zeros(orders * _cuda.PUT_ORDER_BYTES)
        self._put_state = zeros(_cuda.PUT_QUEUE_STATE_BYTES)
        self.puts = _cuda.PutQueue(
            orders=self._orders.data_ptr(), num_orders=orders, state=self._put_state.data_ptr()
        )
        domain = _cuda.TwoLevelDomain(
            shape=self.shape,
            rank=self.rank,
            heaps=addresses,
            remote=self.remote.data_ptr(),
            puts=self.puts,
            serve=self._serve,
            pes=self._pes,
            before=self._before.data_ptr(),
            max_tokens=self.largest.max_tokens,
            state=self._state.data_ptr(),
            rail_state=self._rail_state.data_ptr(),
            fault=self._fault.data_ptr(),
            timeout_seconds=self.timeout,
            turns=turns,
            gathered=self._gathered,
        )
        # It has the methods of one domain's, but for top-k dispatches, barriers, masks and refusals.
        return cast(_cuda.Domain, domain)

    def measure_waits(self, sums: torch.Tensor | None) -> None:
        """Nothing is measured between domains yet."""

    def set_live(self, live: int) -> None:
        """Raises ArgumentError for others than memory was made for."""
        if live != self.live:
            raise ArgumentError("live", bin(live), f"{bin(self.live)}: others need other memory")

    def staging_capacity(self, row_bytes: int, num_topk: int) -> int:
        """Without bound: rows come back a window at a time."""
        return sys.maxsize
