"""Calls in a CUDA graph, as a decode step holds them."""

from __future__ import annotations

import torch

from deepep.bench.clock import Call, Timing


def capture(call: Call, times: int, device: torch.device) -> torch.cuda.CUDAGraph:
    """Records `call` so many times in a row. Raises what a call raises that cannot be captured."""
    call()  # what it sets up, it sets up before
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: NCCL's watchdog may ask for its events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(times):
            call()
    return graph


def each_of(timing: Timing, times: int) -> Timing:
    """The time of one call of a graph that holds so many."""
    return Timing(timing.median / times, timing.p99 / times, timing.host / times)
