"""The CUDA backend's mapped memory in rank processes without CUDA: heaps are shared between the processes,
copies are real, a barrier kernel is a barrier of theirs, and a ring is stub_ring's. The rest is stub_cuda's.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist

from harness.stub_ring import StubRing

FAULT = (3, 16)  # barrier, arrival: csrc/kernels/common/args.hpp


class Watched:
    """Launches of one rank. barriers: how many were launched. missing: ranks that the next one reports. ring:
    launches of sends and receives.
    """

    def __init__(self, ctx: Any) -> None:
        from harness import stub_cuda

        stub_cuda.install(8)
        stub_cuda.serve()
        from deepep.backends.cuda.memory import generations
        from deepep.backends.cuda.memory.ipc import SymmetricHeap
        from deepep.runtime.control.membership import Membership

        Membership.payload = lambda membership: None  # NCCL's, which carries nothing of the host
        self.barriers = self.missing = 0
        self.ring = StubRing()
        self._reported = False

        def export_heap(own: torch.Tensor) -> bytes:
            # by file descriptor: torch's manager of names is a process that a busy machine starts too late
            descriptor, size = own.untyped_storage()._share_fd_cpu_()
            return json.dumps([os.getpid(), descriptor, size]).encode()

        def map_here(raw: bytes) -> torch.Tensor:
            pid, descriptor, size = json.loads(raw)
            opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
            try:
                storage = torch.UntypedStorage._new_shared_fd_cpu(opened, size)
            finally:
                os.close(opened)
            return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)

        def map_heaps(own: torch.Tensor, rank: int, exported: list[bytes | None]) -> SymmetricHeap:
            mapped = [own if r == rank or raw is None else map_here(raw) for r, raw in enumerate(exported)]
            return SymmetricHeap(own, mapped)

        def barrier(domain: Any, stream: int) -> None:
            self.barriers += 1
            if self.missing:
                self._reported = True
            else:
                dist.barrier(group=ctx.group)

        def remember(domain: Any, *, rank: int, heaps: list[int], **named: object) -> None:
            domain.rank, domain.heaps = rank, heaps

        def take_fault(domain: Any, stream: int) -> Any:
            if self.ring.fault is not None:
                reported, self.ring.fault = self.ring.fault, None
                return stub_cuda.Fault(*reported)
            self._reported = False
            return stub_cuda.Fault(*FAULT, missing=self.missing, expected=ctx.num_ranks, seen=1)

        generations.export_heap, generations.map_heaps = export_heap, map_heaps
        domain: Any = stub_cuda.Domain
        domain.barrier, domain.take_fault = barrier, take_fault
        domain.has_fault = lambda domain: self._reported or self.ring.fault is not None
        domain.__init__ = remember
        domain.ring_send = lambda domain, **call: self.ring.send(domain, **call)
        domain.ring_receive = lambda domain, **call: self.ring.receive(domain, **call)
