"""The CUDA backend between domains in rank processes without CUDA and NVSHMEM: stub_cuda's launches, which do
nothing, stand_in_nvshmem's memory, real agreement between the ranks.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from deepep import layout

SERVE = 99
"""Where the function that serves puts would be."""


class FarLowLatencyDomain:
    """Stands for the extension's.

    given: what it was made with. live: as it was set. captured: a graph holds it. faults: to be taken.
    """

    made: ClassVar[list[Any]] = []

    def __new__(cls, **given: Any) -> Any:
        from harness import stub_cuda

        domain: Any = stub_cuda.LowLatencyDomain()
        domain.given, domain.live, domain.captured, domain.faults = given, None, False, []
        domain.has_fault = lambda: bool(domain.faults)
        domain.take_fault = lambda stream: domain.faults.pop() if domain.faults else None
        domain.set_live = lambda live: setattr(domain, "live", live)
        domain.was_captured = lambda: domain.captured
        cls.made.append(domain)
        return domain


def far_shape(
    *,
    num_ranks: int,
    ranks_per_domain: int,
    max_local_experts: int,
    max_tokens: int,
    max_topk: int,
    max_row_bytes: int,
    entry_stretches: int,
    has_gateways: bool,
) -> Any:
    """Stands for `_cuda.FarShape`, with its number of bytes."""
    most = layout.low_latency_nic_bytes(
        max_tokens,
        max_row_bytes // 2,
        num_ranks,
        num_ranks * max_local_experts,
        ranks_per_domain,
        num_topk=max_topk,
        returns_entries=entry_stretches > 0,
        has_gateways=has_gateways,
    )
    return SimpleNamespace(
        remote_bytes=most,
        control_bytes=128,
        num_put_orders=8,
        entries=entry_stretches,
        has_gateways=has_gateways,
    )


class Domains:
    """One rank's. made: low latency's launchers, the latest last. pe: its NVSHMEM, of stand_in_nvshmem."""

    def __init__(self, ctx: Any) -> None:
        from harness import stub_cuda
        from harness.stand_in_nvshmem import StandIn

        stub_cuda.install(8)
        cuda: Any = sys.modules["deepep._cuda"]
        cuda.FarShape, cuda.FarLowLatencyDomain = far_shape, FarLowLatencyDomain
        cuda.TwoLevelShape = lambda **given: SimpleNamespace(
            remote_bytes=1 << 12, heap_bytes=1 << 12, num_put_orders=8
        )
        cuda.TwoLevelDomain = stub_cuda.Domain
        cuda.PutQueue = stub_cuda.Opaque
        for name in ("FAR_STATE", "RAIL_STATE", "PUT_ORDER", "PUT_QUEUE_STATE"):
            setattr(cuda, f"{name}_BYTES", 64)
        stub_cuda.serve()
        self.launches: list[str] = []
        stub_cuda.Domain.launched = staticmethod(self.launches.append)
        self.made = FarLowLatencyDomain.made
        stand_in = StandIn()
        patch = pytest.MonkeyPatch()
        stand_in.install(patch)
        stand_in.meet = lambda size, group=b"": dist.barrier()  # type: ignore[method-assign]
        self.pe = stand_in.enter()
        self._without_libraries(patch)

        from deepep.backends.cuda.memory import generations
        from deepep.backends.cuda.memory.ipc import SymmetricHeap
        from deepep.runtime.control.membership import Membership

        Membership.payload = lambda membership: None  # NCCL's, which carries nothing of the host
        generations.export_heap = lambda own: b""  # type: ignore[assignment]

        def map_heaps(own: torch.Tensor, rank: int, exported: list[bytes | None]) -> SymmetricHeap:
            return SymmetricHeap(own, [own] * len(exported))

        generations.map_heaps = map_heaps  # type: ignore[assignment]

    @staticmethod
    def _without_libraries(patch: pytest.MonkeyPatch) -> None:
        """NVSHMEM's libraries, and the module that is linked with them."""
        from deepep.backends.cuda.memory import remote

        module: Any = ModuleType("deepep._nvshmem")
        module.serve, module.module = (lambda: SERVE), (lambda: 0)
        bindings: Any = ModuleType("nvshmem.bindings")
        bindings.cumodule_init = lambda module: None
        patch.setitem(sys.modules, "deepep._nvshmem", module)
        patch.setitem(sys.modules, "nvshmem.bindings", bindings)
        patch.setattr(remote, "ctypes", SimpleNamespace(CDLL=lambda *args, **named: None, RTLD_GLOBAL=0))
        patch.setattr("deepep._nvshmem", module, raising=False)

    def since(self) -> list[str]:
        """Launches since the last look."""
        made = list(self.launches)
        self.launches.clear()
        return made

    @property
    def given(self) -> dict[str, Any]:
        """Arguments that the latest launcher was made with."""
        given: dict[str, Any] = self.made[-1].given
        return given

    def part(self) -> int:
        """Offset in the slab of the latest launcher's memory for puts."""
        from deepep.backends.cuda.memory.nvshmem import THIS_PROCESS

        assert THIS_PROCESS.process is not None
        return int(self.given["remote"]) - THIS_PROCESS.process.slab.data_ptr()

    def slab(self) -> tuple[int, list[tuple[int, int]]]:
        """Bytes of the slab, and what of it is free."""
        from deepep.backends.cuda.memory.nvshmem import THIS_PROCESS

        assert THIS_PROCESS.process is not None
        return THIS_PROCESS.process.slab.numel(), THIS_PROCESS.process._free.ranges
