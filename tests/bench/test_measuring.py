"""Clock, floor and peers: by hand, and CUDA's parts on stand-ins."""

from __future__ import annotations

import ctypes
import sys
import weakref
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import deepep
from deepep.bench import clock as clock_module
from deepep.bench import floor as floor_module
from deepep.bench import peers
from deepep.bench.clock import Clock, CudaClock, Timing, percentile
from deepep.bench.floor import Floor, pushes


def test_percentiles_are_samples() -> None:
    samples = [float(n) for n in range(100, 0, -1)]
    assert percentile(samples, 99) == 99.0
    assert percentile(samples[:60], 99) == 100.0
    assert percentile([7.0], 99) == 7.0


class Scripted(Clock):
    """A clock that has its samples written down."""

    def __init__(self, group: Any, samples: list[tuple[float, float]], warmup: int = 0) -> None:
        super().__init__(group, torch.device("cpu"), len(samples) - warmup, warmup)
        self._samples = iter(samples)

    def sample(self, call: Any) -> tuple[float, float]:
        call()
        return next(self._samples)


def test_a_sample_is_the_slowest_ranks(world_of: Any) -> None:
    """Ranks are slow in turn: each one's median is 1, the slowest's is 10. Warm-up does not count."""

    def measure(context: Any) -> Timing:
        slow = [(1.0, 5.0 + context.rank), (10.0, 5.0 + context.rank)]
        first, second = slow if context.rank == 0 else slow[::-1]
        samples = [(1e9, 1e9)] * 2 + [first, second] * 3
        return Scripted(context.group, samples, warmup=2).measure(lambda: None)

    assert world_of(2).run(measure) == [Timing(median=10.0, p99=10.0, host=6.0)] * 2


# CUDA's parts, on stand-ins


def test_cuda_samples_are_taken_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush, head start, alignment, start, call, end, wait; the result lives until then, and no longer."""
    log: list[str] = []
    results: list[weakref.ref[Any]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 2.0  # ms

    def synchronize(device: Any) -> None:
        held = any(r() is not None for r in results)
        log.append("wait, held" if held else "wait")

    monkeypatch.setattr(clock_module, "FLUSH_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles}"))
    timer = CudaClock(None, torch.device("cpu"), 50, 0, lambda: log.append("align"))
    log.clear()
    timer._flush.fill_(1)

    class Result:
        pass

    def call() -> Result:
        log.append("call")
        result = Result()
        results.append(weakref.ref(result))
        return result

    complete, host = timer.sample(call)
    # 2,000,000 cycles took 2 ms on the stand-in, so 200 us are 200,000.
    timed = ["sleep 200000", "align", "record", "call", "record", "wait, held"]
    calls = ["call"] * clock_module.HOST_CALLS
    assert log == [*timed, "align", "wait", *calls, "wait, held"]
    assert complete == 2000.0
    assert 0 < host < 1e6
    assert not timer._flush.any()
    assert [r() for r in results] == [None] * (1 + len(calls))


PAIRS = ((7, 160, 320), (48, 9, 33), (16, 0, 5))


def test_pushes_do_not_collide() -> None:
    region = 320
    plans = [pushes(PAIRS, rank, region) for rank in range(3)]
    assert [[p.to for p in plan] for plan in plans] == [[1, 2], [2, 0], [0]]
    assert [[p.num_bytes for p in plan] for plan in plans] == [[160, 320], [48, 48], [16]]  # whole vectors
    written = [(p.to, at) for plan in plans for p in plan for at in range(p.target, p.target + p.num_bytes)]
    assert len(set(written)) == len(written)
    assert all(at < 3 * region for _, at in written)
    assert pushes(((5,),), 0, 16) == []


def test_the_floor_copies_the_bytes_and_takes_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of three, memmove for the kernel: 8 SMs are the fastest, and each count is measured once."""
    calls: list[int] = []
    heaps: list[torch.Tensor] = []

    def copy(source: int, target: int, num_bytes: int, sms: int, stream: int) -> None:
        assert stream == 77
        calls.append(sms)
        ctypes.memmove(target, source, num_bytes)

    def share(own: torch.Tensor, rank: int, gather: Any) -> Any:
        heaps.extend([own, torch.zeros_like(own), torch.zeros_like(own)])
        return SimpleNamespace(addresses=[heap.data_ptr() for heap in heaps])

    class ByCount(Clock):
        def sample(self, call: Any) -> tuple[float, float]:
            call()
            return abs(8 - calls[-1]) + 100.0, 0.0

        def largest(self, values: Any) -> list[float]:
            return list(values)

    kernels = ModuleType("deepep._cuda")
    kernels.__dict__["copy"] = copy
    monkeypatch.setitem(sys.modules, "deepep._cuda", kernels)
    monkeypatch.setattr(floor_module, "share_heap", share)
    monkeypatch.setattr(floor_module, "gather_over", lambda group: lambda mine: [mine] * 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    cpu = torch.device("cpu")
    floor = Floor(ByCount(None, cpu, 1, 0), None, 0, cpu, 313)  # rounded up to 320
    assert floor.all_sms == 132
    floor._source.copy_(torch.arange(floor._source.numel()) % 251)
    best = floor.best(PAIRS, 480, 24)
    assert best is not None
    assert (best.sms, best.timing.median, best.wire_bytes) == (8, 100.0, 480)
    assert sorted(set(calls)) == [1, 2, 4, 6, 8, 12, 16, 24]
    for to, size in ((1, 160), (2, 320)):
        assert torch.equal(heaps[to][:size], floor._source[to * 320 : to * 320 + size])
        assert not heaps[to][size:].any()
    assert not heaps[0].any()
    del calls[:]
    fewer = floor.best(PAIRS, 480, 7)
    assert fewer is not None
    assert fewer.sms == 7
    assert set(calls) == {7}, "the others are known"
    assert floor.best(((5,),), 0, 24) is None
    assert len(floor.measured) == 9


def test_deep_ep_is_opened_with_room_for_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sized:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
            return self.factor * hidden_bytes * ranks * FakeBuffer.sms

    class FakeBuffer:
        sms = 0

        def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
            self.sizes = (num_nvl_bytes, num_rdma_bytes)

        @staticmethod
        def set_num_sms(sms: int) -> None:
            FakeBuffer.sms = sms

        get_dispatch_config = staticmethod(lambda ranks: Sized(1))
        get_combine_config = staticmethod(lambda ranks: Sized(2))

    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(peers, "gather_over", lambda group: lambda mine: [mine, mine])
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert peers.open_deep_ep(group, 100, 24) == (None, "deep_ep: deep_ep is not installed")
    monkeypatch.setitem(sys.modules, "deep_ep", deepep)
    assert "this library" in peers.open_deep_ep(group, 100, 24)[1]
    other = ModuleType("deep_ep")
    monkeypatch.setitem(sys.modules, "deep_ep", other)
    assert "no Buffer" in peers.open_deep_ep(group, 100, 24)[1]
    other.__dict__["Buffer"] = FakeBuffer
    assert "not for 3 ranks" in peers.open_deep_ep(SimpleNamespace(size=lambda: 3), 100, 24)[1]
    buffer, why = peers.open_deep_ep(group, 100, 25)
    assert why == ""
    assert buffer.sizes == (2 * 200 * 2 * 24, 0)
    monkeypatch.setattr(peers, "gather_over", lambda group: lambda mine: [mine, b"not there"])
    assert peers.open_deep_ep(group, 100, 24) == (None, "not there")
