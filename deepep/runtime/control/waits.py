"""Waits of one rank for the others, by operation, phase and peer, in nanoseconds of this host's clock.

No clock is compared with another's. Every control exchange lets all ranks go at nearly the same time, and in
the next each rank posts how long it has been busy since: the time that passed, less what it waited meanwhile.
Who was busy longer came later by the difference, and the others are charged that much with it, but no more
than they waited. So a rank that is late because its rows came late is not blamed for it; the link is, in the
phase in which rows travel.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch

#: The phase in which ranks wait for those that have not called the operation yet.
ARRIVE = "arrive"
NOT_MEASURED = -1
#: Operation and phase of each row of the throughput kernels' sums: `Waited` of csrc/kernels/common/args.hpp.
KERNEL_WAITS = (("dispatch", "metadata"), ("dispatch", "rows"), ("combine", "digest"), ("combine", "rows"))


def charges(busy: Mapping[int, int], rank: int, waited: int) -> dict[int, int]:
    """Nanoseconds that `rank` waited for each peer that came later, itself left out.

    busy: by rank, since the last exchange; NOT_MEASURED of those that do not say. waited: in this exchange,
    for all of them at once: several late peers are charged with the same time, each as if it were alone.
    """
    own = busy.get(rank, NOT_MEASURED)
    if own == NOT_MEASURED:
        return {}
    return {
        peer: min(waited, their - own)
        for peer, their in busy.items()
        if peer != rank and their != NOT_MEASURED and their > own
    }


class WaitRecorder:
    """One rank's sums, kept by its control plane. Off until it is asked to measure.

    asks: this rank wants waits measured. by_peer: some rank does, so rows of this operation travel peer by
    peer on all of them. rows: this engine's rows travel between hosts' memories, where a wait can be timed.
    on_change: is called with every change of `asks`, by an engine whose kernels measure.
    """

    on_change: Callable[[], None] | None = None

    def __init__(self, rank: int, num_ranks: int, rows: bool) -> None:
        self.rank, self.num_ranks, self.rows = rank, num_ranks, rows
        self.asks = self.by_peer = False
        self._sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * num_ranks)
        self._calls: dict[tuple[str, str], int] = defaultdict(int)
        self._kernels: dict[tuple[str, str], torch.Tensor] = {}
        self._throughput: torch.Tensor | None = None
        self._lock = threading.Lock()
        self._released = self._waited = 0

    def ask(self, on: bool) -> None:
        """Has waits measured from now on, or no longer."""
        self.asks = on
        if self.on_change is not None:
            self.on_change()

    def busy(self) -> int:
        """Nanoseconds since the last exchange in which this rank waited for nobody; NOT_MEASURED before the
        first, and where nobody asks.
        """
        if not self.asks or not self._released:
            return NOT_MEASURED
        return max(0, time.perf_counter_ns() - self._released - self._waited)

    def arrived(self, operation: str, busy: Mapping[int, int], asked: bool, waited: int) -> None:
        """An exchange is over, `waited` nanoseconds after this rank came to it. asked: by any rank."""
        self.by_peer = asked and self.rows
        if self.asks:
            self.add(operation, ARRIVE, charges(busy, self.rank, waited))
            self._released, self._waited = time.perf_counter_ns(), 0
        else:
            self._released = 0

    def waited_for(self, operation: str, phase: str, peer: int, nanoseconds: int) -> None:
        """Rows of a peer were waited for."""
        self._waited += nanoseconds
        if self.asks:
            self.add(operation, phase, {peer: nanoseconds}, calls=0)

    def waited_to_send(self, nanoseconds: int) -> None:
        """Rows of this rank's were waited for until they had left: no peer is charged, nor was it busy."""
        self._waited += nanoseconds

    def add(self, operation: str, phase: str, charged: Mapping[int, int], calls: int = 1) -> None:
        """Adds to the sums; `calls` to how often this was measured."""
        with self._lock:
            sums = self._sums[operation, phase]
            for peer, nanoseconds in charged.items():
                sums[peer] += nanoseconds
            self._calls[operation, phase] += calls

    def of_kernels(self, operation: str, device: torch.device) -> torch.Tensor:
        """[R] int64 on the device, to which an operation's kernels add what they wait for each rank."""
        key = operation, "kernels"
        if key not in self._kernels:
            self._kernels[key] = _zeros(self.num_ranks, device=device)
        return self._kernels[key]

    def of_throughput_kernels(self, device: torch.device) -> torch.Tensor:
        """[4, R] int64 on the device, to which throughput kernels add: rows as KERNEL_WAITS names them."""
        if self._throughput is None:
            self._throughput = _zeros(len(KERNEL_WAITS), self.num_ranks, device=device)
            self._kernels |= zip(KERNEL_WAITS, self._throughput, strict=True)
        return self._throughput

    def read(self, clear: bool) -> dict[tuple[str, str], tuple[list[int], int]]:
        """By operation and phase: [R] nanoseconds, and in how many calls; 0 where they are not counted.

        Waits for the current stream, if kernels have added to sums on a device.
        """
        with self._lock:
            found = {key: (list(sums), self._calls[key]) for key, sums in self._sums.items()}
            if clear:
                self._sums.clear()
                self._calls.clear()
        for key, waited in self._kernels.items():
            found[key] = (waited.tolist(), 0)
            if clear:
                waited.zero_()
        return found


def _zeros(*shape: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.int64, device=device)
