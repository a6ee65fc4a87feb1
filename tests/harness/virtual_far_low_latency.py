"""Virtual ranks of several domains in the low-latency operations, on one GPU: as virtual_low_latency.py, and
a kernel in a NIC's place, as virtual_domains.py has it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from deepep import _cuda
from deepep.backends.cuda.low_latency_far import FarLowLatencyEndpoint, far_shape
from harness.virtual_domains import NEVER
from harness.virtual_low_latency import VirtualLowLatency


@dataclass
class VirtualFarLowLatency(VirtualLowLatency):
    """`num_ranks` endpoints in domains of `ranks_per_domain`.

    delay: the most seconds that a put is late. silent_from: by rank, the number of the first put that its NIC
    loses, and all later ones. away: ranks that do not launch the next operation. has_gateways: in two levels.
    """

    ranks_per_domain: int = 2
    delay: float = 0.0
    away: frozenset[int] = frozenset()
    silent_from: dict[int, int] = field(default_factory=dict)
    has_gateways: bool = False

    def __post_init__(self) -> None:
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        most = (sms - -(-self.num_ranks // 4)) // self.num_ranks  # a block of four ranks serves puts
        self.num_blocks = self.num_blocks or most
        if self.num_blocks > most:
            raise ValueError(f"{self.num_ranks} ranks of {self.num_blocks} blocks do not fit on {sms} SMs")
        everyone = range(self.num_ranks)
        shape = far_shape(self.num_ranks, self.ranks_per_domain, self.room, self.has_gateways)

        def memory(num_bytes: int) -> list[torch.Tensor]:
            # What is read before it is written shall be seen.
            return [torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device=self.device) for _ in everyone]

        self.heaps, self._remotes = memory(self.room.num_bytes(self.num_ranks)[0]), memory(shape.remote_bytes)
        self.streams = [torch.cuda.Stream(self.device) for _ in everyone]
        self._nic = torch.cuda.Stream(self.device, priority=-1)  # never one of the ranks'
        self.far = [
            FarLowLatencyEndpoint(
                r,
                self.heaps[r],
                [self.heaps[s].data_ptr() if self._is_near(r, s) else 0 for s in everyone],
                ranks_per_domain=self.ranks_per_domain,
                remote=self._remotes[r],
                room=self.room,
                timeout=self.timeout,
                turns=_cuda.Turns(),
                has_gateways=self.has_gateways,
            )
            for r in everyone
        ]
        self.endpoints = list(self.far)
        self._calls = 0
        torch.cuda.synchronize(self.device)

    def _is_near(self, rank: int, other: int) -> bool:
        return rank // self.ranks_per_domain == other // self.ranks_per_domain

    def serve(self) -> None:
        """Has the puts of one operation served, of all ranks but those that are `away`."""
        nobody = _cuda.PutQueue(orders=0, num_orders=1, state=0)
        self._calls += 1
        _cuda.serve_puts_locally(
            puts=[nobody if r in self.away else endpoint.puts for r, endpoint in enumerate(self.far)],
            remotes=[remote.data_ptr() for remote in self._remotes],
            silent_from=[self.silent_from.get(r, NEVER) for r in range(self.num_ranks)],
            timeout_seconds=self.timeout,
            delay_seconds=self.delay,
            seed=self._calls,
            stream=self._nic.cuda_stream,
        )
