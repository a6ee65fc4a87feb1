"""The CUDA backend's ring in rank processes without CUDA: launches that copy and wait at once, on the host,
by words in heaps that the processes share. What kernels do otherwise is csrc/kernels/ring's.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

SEND, RECEIVE = 6, 7  # operations: csrc/kernels/common/args.hpp
DISAGREEMENT, OVERWRITTEN, CREDIT, TENSOR = 128, 256, 1024, 2048  # phases
WORDS = 5  # of a slot: filled, kind, taken; freed, sent. Behind all slots, of a way: overwritten


def ring_bytes(num_slots: int, slot_bytes: int) -> tuple[int, int]:
    """Bytes of the words, and of all memory."""
    words = 8 * (2 * num_slots * WORDS + 2)
    return words, words + 2 * num_slots * slot_bytes


class StubRing:
    """Launches of a domain. patience: seconds of a wait. fault: what the last ones have reported, or None:
    operation, phase, ranks missing as bits, expected, seen.
    """

    def __init__(self) -> None:
        self.patience = 60.0
        self.fault: tuple[int, ...] | None = None
        self._broken: set[tuple[object, int, int]] = set()

    def send(self, domain: Any, **call: Any) -> None:
        """A copy into the neighbour's slot, once that is free."""
        here, there = _Way(domain, call, own=True), _Way(domain, call, own=False)
        way = (domain, SEND, call["peer"])
        if way in self._broken or not self._wait(lambda: here.word(3) == here.word(4)):
            self._broken.add(way)
            there.set_overwritten()
            self._report(SEND, CREDIT, call, 1, 0)
        ctypes.memmove(there.tensor, call["tensor"], call["num_bytes"])
        if way in self._broken:
            return
        here.store(4, here.word(4) + 1)
        there.store(1, _kind(call))
        there.store(0, here.word(4))

    def receive(self, domain: Any, **call: Any) -> None:
        """A copy out of a slot here, once something is in it."""
        here, there = _Way(domain, call, own=True), _Way(domain, call, own=False)
        way = (domain, RECEIVE, call["peer"])
        if way in self._broken or not self._wait(lambda: here.word(0) == here.word(2) + 1):
            self._broken.add(way)
            self._report(RECEIVE, TENSOR, call, 1, 0)
        elif here.word(1) != _kind(call):
            self._report(RECEIVE, DISAGREEMENT, call, call["num_bytes"], here.word(1) >> 8)
        ctypes.memmove(call["tensor"], here.tensor, call["num_bytes"])
        if way in self._broken:
            return
        if here.is_overwritten():
            self._broken.add(way)
            self._report(RECEIVE, OVERWRITTEN, call, 1, 0)
            return
        here.store(2, here.word(2) + 1)
        there.store(3, here.word(2))

    def _report(self, operation: int, phase: int, call: Any, expected: int, seen: int) -> None:
        if self.fault is None:
            self.fault = operation, phase, 1 << call["peer"], expected, seen

    def _wait(self, came: Any) -> bool:
        end = time.monotonic() + self.patience
        while not came():
            if time.monotonic() > end:
                return False
            time.sleep(0.0002)
        return True


class _Way:
    """The slot of a call, in this rank's memory or the neighbour's."""

    def __init__(self, domain: Any, call: Any, *, own: bool) -> None:
        ranks = len(domain.heaps)
        rank, other = (domain.rank, call["peer"]) if own else (call["peer"], domain.rank)
        way = 0 if other == (rank - 1) % ranks else 1
        base, slots = domain.heaps[rank] + call["begin"], call["num_slots"]
        place = way * slots + call["slot"]
        self._words = base + 8 * WORDS * place
        self._overwritten = base + 8 * (2 * slots * WORDS + way)
        self.tensor = base + ring_bytes(slots, call["slot_bytes"])[0] + place * call["slot_bytes"]

    def word(self, i: int) -> int:
        return ctypes.c_uint64.from_address(self._words + 8 * i).value

    def store(self, i: int, value: int) -> None:
        ctypes.c_uint64.from_address(self._words + 8 * i).value = value

    def set_overwritten(self) -> None:
        ctypes.c_uint64.from_address(self._overwritten).value = 1

    def is_overwritten(self) -> bool:
        return ctypes.c_uint64.from_address(self._overwritten).value != 0


def _kind(call: Any) -> int:
    return int(call["num_bytes"]) << 8 | int(call["dtype"])
