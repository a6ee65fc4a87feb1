"""Timing of a call: from the call to the point after which the caller may use its outputs.

Ranks are aligned before every sample, a sample is the slowest rank's, and samples give a median and a 99th
percentile. Host time is sampled beside it: how long a call keeps the calling thread, of many in a row.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

#: more than any L2 holds
FLUSH_BYTES = 256 << 20
#: how long the device is kept busy before a timed call, so that the host's launches are queued by then
HEAD_START_US = 200.0
#: calls in a row whose host time is taken together: the first ones after a rest are slower than a program's
HOST_CALLS = 20

Call = Callable[[], object]


@dataclass(frozen=True)
class Stage:
    """A call that is one part of something. begin: what comes before it, untimed, and gives the call. end:
    what has to follow, untimed, with what the call returned.
    """

    begin: Callable[[], Call]
    end: Callable[[Any], object] = lambda result: None


def _staged(call: Call | Stage) -> tuple[Call, Callable[[Any], object]]:
    """Does what comes before a call; returns the part that is timed, and what has to follow."""
    return (call.begin(), call.end) if isinstance(call, Stage) else (call, lambda result: None)


@dataclass(frozen=True)
class Timing:
    """Microseconds. median, p99: of the slowest rank's samples. host: the largest of the ranks' medians."""

    median: float
    p99: float
    host: float


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that `percent` % of the samples do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


class Clock(ABC):
    """Times calls that all ranks of a group make together."""

    def __init__(self, group: Any, device: torch.device, iterations: int, warmup: int) -> None:
        self._group = group
        self._device = device
        self._iterations = iterations
        self._warmup = warmup

    @abstractmethod
    def sample(self, call: Call | Stage) -> tuple[float, float]:
        """(operation-complete, host) microseconds of a call on this rank. What it returned is freed."""

    def measure(self, call: Call | Stage) -> Timing:
        """Collective."""
        for _ in range(self._warmup):
            self.sample(call)
        complete, host = zip(*(self.sample(call) for _ in range(self._iterations)), strict=True)
        *slowest, slowest_host = self.largest([*complete, statistics.median(host)])
        return Timing(statistics.median(slowest), percentile(slowest, 99), slowest_host)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' values, place by place. Collective."""
        shared = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return shared.tolist()


class HostClock(Clock):
    """For CPU tensors, where a call returns when it is through."""

    def sample(self, call: Call | Stage) -> tuple[float, float]:
        timed, end = _staged(call)
        dist.barrier(group=self._group)
        begin = time.perf_counter()
        result = timed()
        elapsed = (time.perf_counter() - begin) * 1e6
        end(result)
        del result
        return elapsed, elapsed


class CudaClock(Clock):
    """For CUDA tensors: between two events on the current stream.

    align: queues a barrier of all ranks' current streams. host_calls: see HOST_CALLS.
    """

    def __init__(
        self, group: Any, device: torch.device, iterations: int, warmup: int, align: Callable[[], None]
    ) -> None:
        super().__init__(group, device, iterations, warmup)
        self._align = align
        self.host_calls = HOST_CALLS
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._begin, self._end = _event(), _event()
        self._head_start = self._cycles(HEAD_START_US)

    def sample(self, call: Call | Stage) -> tuple[float, float]:
        return self._complete(call), self._host(call)

    def lead_in(self) -> None:
        """Queues what comes before a sample: the flush, a head start for the host, the barrier."""
        self._flush.zero_()
        torch.cuda._sleep(self._head_start)
        self._align()

    def _complete(self, call: Call | Stage) -> float:
        timed, end = _staged(call)
        self.lead_in()
        self._begin.record()
        result = timed()
        self._end.record()
        torch.cuda.synchronize(self._device)
        end(result)
        del result
        return self._begin.elapsed_time(self._end) * 1e3

    def _host(self, call: Call | Stage) -> float:
        # Nothing is queued before the calls: a dispatch that waits for its counts waits for those alone.
        self._align()
        torch.cuda.synchronize(self._device)
        elapsed = 0.0
        for _ in range(self.host_calls):
            timed, end = _staged(call)
            begin = time.perf_counter()
            result = timed()
            elapsed += (time.perf_counter() - begin) * 1e6
            end(result)
        torch.cuda.synchronize(self._device)
        del result
        return elapsed / self.host_calls

    def _cycles(self, microseconds: float) -> int:
        """Cycles that `torch.cuda._sleep` takes for so long, by this device's own clock."""
        trial = 2_000_000
        for _ in range(3):  # the first wakes the device up, and makes the events: that takes 20 us
            self._begin.record()
            torch.cuda._sleep(trial)
            self._end.record()
            torch.cuda.synchronize(self._device)
        return round(trial * microseconds / (self._begin.elapsed_time(self._end) * 1e3))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
