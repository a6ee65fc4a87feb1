"""The bare exchange: the best time in which kernels push the same bytes, raise flags and wait for all.

It knows everything beforehand, and what comes lies where it came: the least that a low-latency operation can
take. For combine, the rows that came are also read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deepep.backends.cuda.memory.ipc import gather_over, share_heap
from deepep.bench.clock import Clock, Timing
from deepep.bench.floor import SM_COUNTS, whole_vectors
from deepep.bench.workload import Matrix

#: warps of a block of the kernel
WARPS = 32


@dataclass(frozen=True)
class Exchanged:
    """One measurement of an exchange, with so many SMs on every rank."""

    sms: int
    timing: Timing


class BareExchange:
    """Exchanges between the GPUs of a group. Collective, as are `best` and what `call` returns.

    most_bytes: the most that any rank pushes to any other. timeout: seconds that a kernel waits for a peer.
    """

    def __init__(self, group: Any, rank: int, device: torch.device, most_bytes: int, timeout: float) -> None:
        kernels: Any = importlib.import_module("deepep._cuda")
        gather = gather_over(group)
        ranks, room = group.size(), whole_vectors(max(most_bytes, 1))
        memory = torch.zeros(kernels.exchange_bytes(ranks, room), dtype=torch.uint8, device=device)
        self._rank = rank
        self._heap = share_heap(memory, rank, gather)
        self._state = torch.zeros(kernels.EXCHANGE_STATE_WORDS, dtype=torch.int32, device=device)
        self._missing = kernels.EXCHANGE_MISSING
        self._exchange = kernels.Exchange(
            rank=rank,
            heaps=self._heap.addresses,
            pair_bytes=room,
            state=self._state.data_ptr(),
            timeout_seconds=timeout,
        )
        self._source = torch.zeros(ranks * self._exchange.pair_bytes, dtype=torch.uint8, device=device)
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._sums = torch.zeros(sms * WARPS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        gather(b"")  # nobody pushes before all have zeroed their flags

    def call(self, pairs: Matrix, sms: int, *, reads: bool) -> Callable[[], None]:
        """One exchange of pairs[s][d] bytes, on the current stream. reads: what came is read as well."""
        sent = [whole_vectors(n) for n in pairs[self._rank]]
        received = [whole_vectors(row[self._rank]) for row in pairs]
        source, sums = self._source.data_ptr(), self._sums.data_ptr() if reads else 0

        def exchange() -> None:
            self._exchange.launch(
                source=source,
                sent=sent,
                received=received,
                sums=sums,
                num_blocks=sms,
                stream=torch.cuda.current_stream().cuda_stream,
            )

        return exchange

    def best(self, clock: Clock, pairs: Matrix, most_sms: int, *, reads: bool) -> Exchanged:
        """The fastest with no more than most_sms SMs. Raises TimeoutError if a peer did not come."""
        counts = sorted({n for n in SM_COUNTS if n < most_sms} | {most_sms})
        tried = [Exchanged(n, clock.measure(self.call(pairs, n, reads=reads))) for n in counts]
        self.check()
        return min(tried, key=lambda exchanged: exchanged.timing.median)

    def check(self) -> None:
        """Raises TimeoutError if a rank was waited for in vain since this was made."""
        missing = int(self._state[self._missing])
        if missing:
            ranks = [r for r in range(len(self._heap.mapped)) if missing >> r & 1]
            raise TimeoutError(f"bare exchange: ranks {ranks} did not come in time")
