"""Virtual ranks of several NVLink domains, on one GPU: as virtual_ranks.py, and a kernel in a NIC's place.

A rank maps the heaps of its own domain alone. What it puts, another kernel delivers, late and out of order,
from and to memory that no rank's kernels address. What this cannot show is a network.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from deepep import _cuda
from deepep.backends.cuda.two_level import DomainPlan, LargestCall, TwoLevelEndpoint, two_level_shape
from harness.virtual_ranks import VirtualDomain

#: The number of an order that none has.
NEVER = 0xFFFFFFFF
LARGEST = LargestCall(max_tokens=8192, row_bytes=2 * 7168, num_scales=70, num_topk=32)


@dataclass
class VirtualDomains(VirtualDomain):
    """`num_ranks` endpoints in domains of `ranks_per_domain`. live: those that take part, bits; 0: all.

    delay: the most seconds that a put is late. silent_from: by rank, the number of the first put that its NIC
    loses, and all later ones. refusing: by rank, the operation ("dispatch", "combine") that it refuses while
    others, which skip it, make it.

    More than 32 ranks are launched together, in one kernel: none is late, and none refuses.
    """

    heap_bytes: int = 64 << 20
    ranks_per_domain: int = 2
    largest: LargestCall = LARGEST
    live: int = 0
    delay: float = 0.0
    silent_from: dict[int, int] = field(default_factory=dict)
    refusing: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        most = (sms - -(-self.num_ranks // 4)) // self.num_ranks  # a block of four ranks serves puts
        self.num_sms = self.num_sms or most
        if self.num_sms > most:
            raise ValueError(f"{self.num_ranks} ranks of {self.num_sms} SMs do not fit on {sms} SMs together")
        everyone = range(self.num_ranks)
        self.live = self.live or (1 << self.num_ranks) - 1
        plan = DomainPlan(self.num_ranks, self.ranks_per_domain, self.live)
        shape = two_level_shape(plan, self.largest)

        def memory(num_bytes: int) -> list[torch.Tensor]:
            return [torch.empty(num_bytes, dtype=torch.uint8, device=self.device) for _ in everyone]

        heaps = memory(shape.heap_bytes + self.heap_bytes)
        self._remotes = memory(shape.remote_bytes)
        self.streams = [torch.cuda.Stream(self.device) for _ in everyone]
        # Of another priority: torch has 32 streams of each, and gives out the same ones again, a rank's.
        self._nic = torch.cuda.Stream(self.device, priority=-1)
        self._gathered = _cuda.VirtualLaunches() if self.num_ranks > 32 else None
        self.domains = [
            TwoLevelEndpoint(
                r,
                heaps[r],
                [heaps[other].data_ptr() if other in plan.neighbours(r) else 0 for other in everyone],
                plan=plan,
                largest=self.largest,
                remote=self._remotes[r],
                timeout=self.timeout,
                gathered=self._gathered,
            )
            for r in everyone
        ]
        self.endpoints = list(self.domains)
        self._calls = 0
        torch.cuda.synchronize(self.device)

    def _begin(self, skip: frozenset[int]) -> None:
        away = skip - set(self.refusing)
        nobody = _cuda.PutQueue(orders=0, num_orders=1, state=0)
        self._calls += 1
        _cuda.serve_puts_locally(
            puts=[nobody if r in away else domain.puts for r, domain in enumerate(self.domains)],
            remotes=[remote.data_ptr() for remote in self._remotes],
            silent_from=[self.silent_from.get(r, NEVER) for r in range(self.num_ranks)],
            timeout_seconds=self.timeout,
            delay_seconds=self.delay,
            seed=self._calls,
            stream=self._nic.cuda_stream,
        )
        for r, operation in self.refusing.items():
            endpoint = self.domains[r]
            refuse = endpoint.refuse_dispatch if operation == "dispatch" else endpoint.refuse_combine
            refuse(self.streams[r].cuda_stream)

    def _end(self) -> None:
        if self._gathered is not None:
            self._gathered.launch(self.streams[0].cuda_stream)
