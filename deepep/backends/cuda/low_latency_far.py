"""One rank of several NVLink domains in the low-latency operations: what low_latency_launch.py is to one.

Inside a domain ranks write to each other's slots. To other domains they put, from memory that a NIC knows, by
way of a queue that another kernel serves (csrc/put_server). docs/low_latency.md has the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.low_latency_launch import LowLatencyEndpoint, LowLatencyRoom


def far_shape(
    num_ranks: int, ranks_per_domain: int, room: LowLatencyRoom, has_gateways: bool = False
) -> _cuda.FarShape:
    """Sizes of the memory that NICs know, the same on all ranks; has_gateways: calls go in two levels."""
    return _cuda.FarShape(
        num_ranks=num_ranks,
        ranks_per_domain=ranks_per_domain,
        max_local_experts=room.num_local_experts,
        max_tokens=room.num_max_tokens,
        max_topk=room.num_topk,
        max_row_bytes=2 * room.hidden,
        entry_stretches=room.entry_stretches,
        has_gateways=has_gateways,
    )


class FarLowLatencyEndpoint(LowLatencyEndpoint):
    """The low-latency operations of one rank on a group of several domains.

    heap, addresses: as of `LowLatencyEndpoint`; 0 for ranks of other domains. remote: this rank's memory that
    its NIC knows, uint8 [shape.remote_bytes] on the device. serve: the function that serves puts
    (csrc/put_server/service.hpp), or 0 where whoever launches has them served; pes: by rank, what it calls
    that rank's process. Where it serves, launches leave an SM free for that. has_gateways: calls go in two
    levels, of both halves alone, and forms have `num_domains`.
    """

    def __init__(
        self,
        rank: int,
        heap: Tensor,
        addresses: list[int],
        *,
        ranks_per_domain: int,
        remote: Tensor,
        room: LowLatencyRoom,
        timeout: float,
        turns: _cuda.Turns,
        serve: int = 0,
        pes: Sequence[int] = (),
        has_gateways: bool = False,
    ) -> None:
        self.shape = far_shape(len(addresses), ranks_per_domain, room, has_gateways)
        self.remote = remote
        self._serve, self._pes = serve, list(pes)
        super().__init__(rank, heap, addresses, room=room, timeout=timeout, turns=turns)

    def _make_domain(self, addresses: list[int], shrinks: bool) -> _cuda.LowLatencyDomain:
        def zeros(num_bytes: int) -> Tensor:
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

        self.remote[: self.shape.control_bytes].zero_()
        self._far_state = zeros(_cuda.FAR_STATE_BYTES)
        orders = self.shape.num_put_orders
        self._orders = zeros(orders * _cuda.PUT_ORDER_BYTES)
        self._put_state = zeros(_cuda.PUT_QUEUE_STATE_BYTES)
        self.puts = _cuda.PutQueue(
            orders=self._orders.data_ptr(), num_orders=orders, state=self._put_state.data_ptr()
        )
        domain = _cuda.FarLowLatencyDomain(
            shape=self.shape,
            rank=self.rank,
            heaps=addresses,
            remote=self.remote.data_ptr(),
            far_state=self._far_state.data_ptr(),
            puts=self.puts,
            serve=self._serve,
            pes=self._pes,
            state=self._state.data_ptr(),
            fault=self._fault.data_ptr(),
            timeout_seconds=self.timeout,
            turns=self.turns,
        )
        # It has the methods of one domain's.
        return cast(_cuda.LowLatencyDomain, domain)
