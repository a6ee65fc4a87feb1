"""Host time of a call: microseconds that it keeps the calling thread.

    python tests/harness/host_times.py [--cuda] [--calls N] [--only TEXT]

On stubs of the extension and of torch.cuda (harness.stub_cuda), on any machine: Python, and torch's part with
tensors of the CPU; a launch costs what a function of Python does. Or on a GPU, a group of one rank, with
launches as they are. For comparing two commits: interleave runs, on one core (`taskset -c 1`).

By kind of call: 10th percentile, median and 90th of all calls; what `torch.empty` takes for the tensors that
the call returns; launches a call. Halves of a hooked call are timed apart. No test reads these times.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import stub_cuda

IN_A_ROW = 20
"""Calls between two waits for the device: fewer than its queue holds."""

Call = Callable[[], Any]


def kinds(buffer: Any, device: str, tokens: int, hidden: int, experts: int) -> dict[str, tuple[Call, Call]]:
    """By name: the timed call, and what has to follow what it returned, untimed."""
    topk = min(8, experts)
    x = torch.zeros((tokens, hidden), dtype=torch.bfloat16, device=device)
    rows = torch.zeros((tokens, hidden), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scales = torch.ones((tokens, hidden // 128), dtype=torch.float32, device=device)
    topk_idx = torch.arange(tokens * topk, dtype=torch.int64, device=device).view(tokens, topk) % experts
    weights = torch.ones((tokens, topk), dtype=torch.float32, device=device)
    sizes, by_topk = (tokens, experts), {"topk_idx": topk_idx, "topk_weights": weights}
    worst = {**by_topk, "num_experts": experts, "num_worst_tokens": tokens}

    def low_latency(**options: Any) -> Any:
        return buffer.low_latency_dispatch(x, topk_idx, *sizes, **options)

    slots, _, handle, _, _ = low_latency(use_fp8=False)
    slots.zero_()

    def low_latency_combine(**options: Any) -> Any:
        return buffer.low_latency_combine(slots, topk_idx, weights, handle, **options)

    def nothing(result: Any) -> None: ...

    def receive(result: Any) -> None:
        result[-1]()

    def wait(result: Any) -> None:
        result.event.current_stream_wait()

    received, _, _, _, route, _ = buffer.dispatch(x, **worst)
    received.zero_()
    return {
        "low-latency dispatch, BF16": (lambda: low_latency(use_fp8=False), nothing),
        "low-latency dispatch, FP8": (low_latency, nothing),
        "low-latency dispatch, FP8, weights": (lambda: low_latency(topk_weights=weights), nothing),
        "low-latency dispatch, FP8, send half": (lambda: low_latency(return_recv_hook=True), receive),
        "low-latency dispatch, FP8, event": (lambda: low_latency(async_finish=True), wait),
        "low-latency combine": (low_latency_combine, nothing),
        "low-latency combine, send half": (lambda: low_latency_combine(return_recv_hook=True), receive),
        "low-latency combine, event": (lambda: low_latency_combine(async_finish=True), wait),
        "dispatch by top-k, worst case, BF16": (lambda: buffer.dispatch(x, **worst), nothing),
        "dispatch by top-k, worst case, FP8": (lambda: buffer.dispatch((rows, scales), **worst), nothing),
        "dispatch by top-k, worst case, event": (
            lambda: buffer.dispatch(x, **worst, async_finish=True),
            wait,
        ),
        "dispatch, cached, BF16": (lambda: buffer.dispatch(x, handle=route), nothing),
        "dispatch, cached, FP8": (lambda: buffer.dispatch((rows, scales), handle=route), nothing),
        "dispatch, cached, event": (lambda: buffer.dispatch(x, handle=route, async_finish=True), wait),
        "combine": (lambda: buffer.combine(received, route), nothing),
        "combine, weights": (lambda: buffer.combine(received, route, weights), nothing),
        "combine, event": (lambda: buffer.combine(received, route, async_finish=True), wait),
    }


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Those in a result's tuples and handles."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in tensors_of(part)]
    return []


def measure(call: Call, follow: Call, calls: int, synchronize: Callable[[], None]) -> dict[str, list[float]]:
    """Microseconds of each call, and of what follows a hooked one."""
    times: dict[str, list[float]] = {"": [], "hook": []}
    clock = time.perf_counter_ns
    for number in range(calls + 10 * IN_A_ROW):
        if number % IN_A_ROW == 0:
            synchronize()
        begin = clock()
        result = call()
        end = clock()
        times[""].append((end - begin) / 1000)
        if getattr(result, "hook", None) is not None:
            begin = clock()
            follow(result)
            times["hook"].append((clock() - begin) / 1000)
        else:
            follow(result)
    synchronize()
    return {name: sorted(values[10 * IN_A_ROW :]) for name, values in times.items() if values}


def of_allocations(tensors: list[torch.Tensor], calls: int) -> float:
    """Microseconds that `torch.empty` takes for tensors like these."""
    like = [(tuple(t.shape), t.dtype, t.device) for t in tensors]
    times = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in like]
        times.append((time.perf_counter_ns() - begin) / 1000)
        del made
    return statistics.median(times)


@contextlib.contextmanager
def on_stubs(launches: list[str]) -> Iterator[Any]:
    """A buffer of one rank whose kernels do nothing."""
    stub_cuda.install(8)
    stub_cuda.Domain.launched = staticmethod(launches.append)
    with stub_cuda.stub_buffer(symmetric_bytes=64 << 20) as buffer:
        yield buffer


@contextlib.contextmanager
def on_cuda() -> Iterator[Any]:
    """A buffer of one rank on this process's GPU."""
    import torch.distributed as dist

    import deepep

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with deepep.Buffer(dist.group.WORLD, backend="cuda", low_latency_mode=True) as buffer:
        yield buffer
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of each kind of call, microseconds.")
    parser.add_argument("--cuda", action="store_true", help="on a GPU, not on stubs")
    parser.add_argument("--calls", type=int, default=2000, help="of each kind")
    parser.add_argument("--only", default="", help="kinds whose names hold this")
    given = parser.parse_args()
    launches: list[str] = []
    device, sizes = ("cuda", (128, 7168, 256)) if given.cuda else ("cpu", (8, 128, 8))
    synchronize = torch.cuda.synchronize if given.cuda else lambda: None
    with on_cuda() if given.cuda else on_stubs(launches) as buffer:
        print(f"{'microseconds':42} {'p10':>7} {'median':>7} {'p90':>7} {'empty':>7} {'launches':>8}")
        for name, (call, follow) in kinds(buffer, device, *sizes).items():
            if given.only not in name:
                continue
            allocations = of_allocations(tensors_of(call_through(call, follow)), 200)
            launches.clear()
            times = measure(call, follow, given.calls, synchronize)
            each = "" if given.cuda else f"{len(launches) / (given.calls + 10 * IN_A_ROW):8.2f}"
            for part, values in times.items():
                shown = f"{name}: {part}" if part else name
                rest = f"{allocations:7.1f} {each}" if not part else ""
                p10, p90 = values[len(values) // 10], values[len(values) * 9 // 10]
                print(f"{shown:42} {p10:7.1f} {statistics.median(values):7.1f} {p90:7.1f} {rest}", flush=True)


def call_through(call: Call, follow: Call) -> Any:
    """Makes the call and what follows it; returns its result."""
    result = call()
    follow(result)
    return result


if __name__ == "__main__":
    main()
