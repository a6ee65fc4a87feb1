"""Low-latency ranks of several NVLink domains on an emulated machine.

As EmulatedLowLatency, whose calls it has; besides its slots, which its domain maps, every rank has memory
that its NIC knows and that ranks of other domains reach by puts alone.
"""

from __future__ import annotations

from typing import Any

from deepep import _emulator
from deepep.sim.emulator.low_latency import EmulatedLowLatency, LowLatencyGpu, LowLatencySizes


def far_shape(
    num_ranks: int, ranks_per_domain: int, sizes: LowLatencySizes, has_gateways: bool = False
) -> _emulator.FarShape:
    """Sizes of the memory that NICs know; has_gateways: calls go in two levels."""
    return _emulator.FarShape(
        num_ranks=num_ranks,
        ranks_per_domain=ranks_per_domain,
        max_local_experts=sizes.num_local_experts,
        max_tokens=sizes.num_max_tokens,
        max_topk=sizes.num_topk,
        max_row_bytes=2 * sizes.hidden,
        entry_stretches=sizes.entry_stretches,
        has_gateways=has_gateways,
    )


def far_network(
    num_ranks: int, ranks_per_domain: int, sizes: LowLatencySizes, has_gateways: bool = False
) -> dict[str, Any]:
    """Arguments of a machine between domains: no mapping, as many open puts as the protocol may have, and
    signals that carry nothing if they are set.
    """
    return {
        "ranks_per_node": ranks_per_domain,
        "max_open_puts": far_shape(num_ranks, ranks_per_domain, sizes, has_gateways).max_open_puts,
        "weak_signals": True,
    }


class EmulatedFarLowLatency(EmulatedLowLatency):
    """All ranks' slots and memory for NICs. The machine is one with `far_network`."""

    def __init__(
        self,
        machine: Any,
        kernels: Any,
        gpu: LowLatencyGpu,
        num_ranks: int,
        sizes: LowLatencySizes,
        *,
        ranks_per_domain: int,
        has_gateways: bool = False,
    ) -> None:
        self._shape = far_shape(num_ranks, ranks_per_domain, sizes, has_gateways)
        self._per_domain, self._has_gateways = ranks_per_domain, has_gateways
        super().__init__(machine, kernels, gpu, num_ranks, sizes)

    def _domains_relayed(self, rank: int) -> tuple[int, list[int]]:
        if not self._has_gateways:
            return 0, []
        number = self.num_ranks // self._per_domain
        return number, [domain for domain in range(number) if domain != rank // self._per_domain]

    def _make_domain(
        self, kernels: Any, sizes: LowLatencySizes, rank: int, heaps: list[int], state: int, fault: int
    ) -> Any:
        remote = self._allocate(f"remote slots@{rank}", "remote", rank, self._shape.remote_bytes)
        # Words alone: what is read before it is written shall be found out.
        self.machine.write(rank, remote, bytes(self._shape.control_bytes))
        for offset, value in self._shape.signals(self.gpu.calls_before):
            self.machine.write(rank, remote + offset, value.to_bytes(8, "little"))
        far_state = self._zeros(f"far state@{rank}", "device", rank, _emulator.FAR_STATE_BYTES)
        before = self.gpu.calls_before.to_bytes(8, "little")
        self.machine.write(rank, far_state, before * _emulator.FAR_COUNTERS)
        near = rank // self._per_domain
        return _emulator.FarLowLatencyDomain(
            machine=self.machine,
            kernels=kernels,
            num_threads=self.gpu.num_threads,
            shape=self._shape,
            rank=rank,
            heaps=[heap if r // self._per_domain == near else 0 for r, heap in enumerate(heaps)],
            remote=remote,
            far_state=far_state,
            state=state,
            fault=fault,
            timeout_seconds=self.gpu.timeout,
            bulk_copies=rank not in self.gpu.plain_copies,
        )
