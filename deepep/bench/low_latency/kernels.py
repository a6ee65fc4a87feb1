"""Time of a call's kernels, by torch's profiler: what it costs the GPU, wherever it waits in between."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from deepep.bench.clock import Stage

#: how the profiler's regions are called: with the call, and with what comes before it alone
CALL, ALONE = "deepep bench: call", "deepep bench: alignment alone"
SAMPLES = 20


def kernel_time(stage: Stage, align: Callable[[], None], device: torch.device) -> float:
    """Microseconds that the kernels of a stage take on this rank, median. Collective.

    align: queues a barrier of all ranks' current streams, with room for the host to launch behind it.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(ALONE):
            align()
            torch.cuda.synchronize(device)
        for _ in range(SAMPLES):
            timed = stage.begin()
            torch.cuda.synchronize(device)
            with record_function(CALL):
                align()
                result = timed()
                torch.cuda.synchronize(device)
            stage.end(result)
            del result, timed
    return statistics.median(sums_of_calls(profiler.events() or ()))


def sums_of_calls(events: Iterable[Any]) -> list[float]:
    """Of each region of a call, the time of its kernels; those of the alignment are left out.

    events: torch's profiler's, with name, device_type and time_range in microseconds. A region waits for its
    kernels, so they lie within it.
    """
    regions: dict[str, list[Any]] = {CALL: [], ALONE: []}
    kernels = []
    for event in events:
        if event.name in regions:
            if event.device_type.name == "CPU":  # the profiler draws it on the device as well
                regions[event.name].append(event.time_range)
        elif event.device_type.name == "CUDA":
            kernels.append(event)
    alignment = {k.name for k in kernels if any(_within(k.time_range, alone) for alone in regions[ALONE])}
    others = [k.time_range for k in kernels if k.name not in alignment]
    return [
        sum(span.end - span.start for span in others if _within(span, region)) for region in regions[CALL]
    ]


def _within(span: Any, region: Any) -> bool:
    return bool(region.start <= span.start <= region.end)
