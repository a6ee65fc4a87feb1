"""Ranks of several NVLink domains on an emulated machine: two-level dispatch and combine.

As EmulatedDomain, whose calls it has; besides its heap, which its domain maps, every rank has memory that its
NIC knows and that others reach by puts alone. Who takes part is fixed: another mask needs other memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from deepep import _emulator
from deepep.sim.emulator.calls import Gpu
from deepep.sim.emulator.domain import Blocks, EmulatedDomain


def network(shape: _emulator.TwoLevelShape, ranks_per_domain: int) -> dict[str, Any]:
    """Arguments of a machine between domains: no mapping, as many open puts as the protocol may have, and
    signals that carry nothing if they are set.
    """
    return {
        "ranks_per_node": ranks_per_domain,
        "max_open_puts": shape.max_open_puts,
        "weak_signals": True,
    }


def shape_of(
    gpu: Gpu,
    *,
    num_ranks: int,
    ranks_per_domain: int,
    live: Sequence[int],
    max_local_experts: int,
    row_bytes: int,
    num_scales: int,
    num_topk: int,
) -> _emulator.TwoLevelShape:
    """Sizes of all memory: row_bytes, num_scales and num_topk are the most of any call."""
    return _emulator.TwoLevelShape(
        num_ranks=num_ranks,
        ranks_per_domain=ranks_per_domain,
        live=sum(1 << rank for rank in live),
        max_local_experts=max_local_experts,
        max_blocks=gpu.num_blocks,
        window=gpu.window,
        row_bytes=row_bytes,
        num_scales=num_scales,
        num_topk=num_topk,
    )


class EmulatedDomains(EmulatedDomain):
    """All ranks' heaps and memory for NICs. max_tokens: of any rank. slot_bytes: of each receive slot."""

    def __init__(
        self,
        machine: _emulator.Machine,
        kernels: _emulator.Kernels,
        gpu: Gpu,
        *,
        num_ranks: int,
        ranks_per_domain: int,
        shape: _emulator.TwoLevelShape,
        live: Sequence[int],
        max_local_experts: int,
        max_tokens: int,
        slot_bytes: int,
    ) -> None:
        self.machine = machine
        self.gpu = gpu
        self.num_ranks = num_ranks
        self._blocks = self._combine_blocks = Blocks(gpu.num_blocks, gpu.num_blocks, gpu.num_blocks)
        self._live = tuple(live)
        everyone = range(num_ranks)
        self._slots_begin = shape.heap_bytes
        self._slot_bytes = slot_bytes
        self._heaps = [
            self._allocate(f"heap@{r}", "symmetric", r, self._slots_begin + 2 * slot_bytes) for r in everyone
        ]
        remote = [self._allocate(f"remote@{r}", "remote", r, shape.remote_bytes) for r in everyone]
        counts_bytes = _emulator.host_counts_bytes(num_ranks, max_local_experts)
        self._counts = [self._zeros(f"counts@{r}", "host", r, counts_bytes) for r in everyone]
        windows_before = 2 * gpu.calls_before
        self._domains = []
        for rank in everyone:
            # Words alone: what is read before it is written shall be found out.
            machine.write(rank, self._heaps[rank], bytes(shape.words_end))
            for offset, value in shape.heap_words(windows_before):
                word = (value % 2**32).to_bytes(4, "little")
                machine.write(rank, self._heaps[rank] + offset, word)
            for offset, value in shape.remote_words(windows_before):
                machine.write(rank, remote[rank] + offset, value.to_bytes(8, "little"))
            state = self._zeros(f"state@{rank}", "device", rank, _emulator.STATE_BYTES)
            machine.write(rank, state, gpu.calls_before.to_bytes(4, "little") * _emulator.EPOCHS)
            rail_state = self._zeros(f"rail state@{rank}", "device", rank, _emulator.RAIL_STATE_BYTES)
            machine.write(rank, rail_state, windows_before.to_bytes(8, "little") * _emulator.RAIL_COUNTERS)
            first = rank - rank % ranks_per_domain
            near = range(first, min(first + ranks_per_domain, num_ranks))
            domain = _emulator.TwoLevelDomain(
                machine=machine,
                kernels=kernels,
                num_threads=gpu.num_threads,
                shape=shape,
                rank=rank,
                heaps=[self._heaps[r] if r in near else 0 for r in everyone],
                remote=remote[rank],
                before=self._allocate(
                    f"tokens before@{rank}", "device", rank, 4 * -(-max_tokens // 16) * num_ranks
                ),
                max_tokens=max_tokens,
                state=state,
                rail_state=rail_state,
                fault=self._zeros(f"fault@{rank}", "host", rank, _emulator.FAULT_BYTES),
                timeout_seconds=gpu.timeout,
            )
            # Barriers, masks and refusals apart it has the methods of one domain's.
            self._domains.append(cast(_emulator.Domain, domain))
        machine.meet()
        self._tickets = [0] * num_ranks
        self._slots_used = [0] * num_ranks

    def _set_live(self, rank: int, live: tuple[int, ...]) -> None:
        if tuple(live) != self._live:
            raise ValueError(f"live: got {live}; memory was made for {self._live}")

    def ce_doorbell_rung(self, rank: int) -> bool:
        """True: no copy engine has a part here."""
        return True
