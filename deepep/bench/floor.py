"""The floor: the best time in which a plain copy pushes the same bytes between the same GPUs.

A copy kernel of a few SMs writes them contiguously into the peers' memory, all ranks at once, timed as the
operations are. With several peers every rank goes round them, each at another one at any time.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from deepep.backends.cuda.memory.ipc import gather_over, share_heap
from deepep.bench.clock import Clock, Timing
from deepep.bench.workload import Matrix

#: SM counts that are tried; a few can be faster than many
SM_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 96, 132)
#: the kernel copies whole vectors of so many bytes
VECTOR = 16


@dataclass(frozen=True)
class Push:
    """One copy to a peer. Offsets are into the sender's source and the peer's heap."""

    to: int
    source: int
    target: int
    num_bytes: int


def pushes(pairs: Matrix, rank: int, region: int) -> list[Push]:
    """Copies that `rank` sends, in order.

    pairs[s][d]: bytes; region: bytes that each pair has in either memory.
    Sources write to regions of their own, and no two ranks push to the same peer in the same turn.
    """
    ranks = len(pairs)
    turns = [(rank + turn) % ranks for turn in range(1, ranks)]
    return [
        Push(to, to * region, rank * region, whole_vectors(pairs[rank][to]))
        for to in turns
        if pairs[rank][to]
    ]


def whole_vectors(num_bytes: int) -> int:
    """num_bytes, rounded up to what the kernel can copy."""
    return -(-num_bytes // VECTOR) * VECTOR


@dataclass(frozen=True)
class Copied:
    """One measurement of the copy: wire_bytes through the busiest port, with so many SMs."""

    wire_bytes: int
    sms: int
    timing: Timing


class Floor:
    """Measures copies between the GPUs of a group, each once. Collective, as are its methods.

    most_bytes: the most that any rank will push to any other.
    """

    def __init__(self, clock: Clock, group: Any, rank: int, device: torch.device, most_bytes: int) -> None:
        gather = gather_over(group)
        self._kernels: Any = importlib.import_module("deepep._cuda")
        ranks = len(gather(b""))
        self._clock = clock
        self._rank = rank
        self._region = whole_vectors(most_bytes)
        self._source = torch.zeros(ranks * self._region, dtype=torch.uint8, device=device)
        self._heap = share_heap(torch.zeros_like(self._source), rank, gather)
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.all_sms = -int(clock.largest([-sms])[0])  # the ranks try the same counts
        self._copied: dict[tuple[Matrix, int], Copied] = {}

    @property
    def measured(self) -> list[Copied]:
        """All copies measured so far."""
        return list(self._copied.values())

    def best(self, pairs: Matrix, wire_bytes: int, most_sms: int) -> Copied | None:
        """The fastest push of these bytes with no more than most_sms SMs. None where nothing is sent."""
        if wire_bytes == 0:
            return None
        counts = sorted({n for n in SM_COUNTS if n < most_sms} | {most_sms})
        tried = [self._measure(pairs, wire_bytes, n) for n in counts]
        return min(tried, key=lambda copied: copied.timing.median)

    def _measure(self, pairs: Matrix, wire_bytes: int, sms: int) -> Copied:
        if (pairs, sms) not in self._copied:
            source, targets = self._source.data_ptr(), self._heap.addresses
            stream = torch.cuda.current_stream().cuda_stream
            todo = pushes(pairs, self._rank, self._region)

            def push() -> None:
                for part in todo:
                    self._kernels.copy(
                        source + part.source, targets[part.to] + part.target, part.num_bytes, sms, stream
                    )

            self._copied[pairs, sms] = Copied(wire_bytes, sms, self._clock.measure(push))
        return self._copied[pairs, sms]
