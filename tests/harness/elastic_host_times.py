"""Host time of ElasticBuffer's calls beside Buffer's, on the CUDA backend's stubs: microseconds of Python.

    cd tests && python -m harness.elastic_host_times [rounds]

The calls of a pair are made in turn, thousands of times; the medians are printed. Launches do nothing,
torch's own work is the CPU's. `host_times.py` has Buffer's own calls. A busy machine makes all of it longer,
the differences less so.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

EXPERTS = 64


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Microseconds of each call, made in turn; results are dropped between two calls."""
    took: dict[str, list[int]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(rounds // 10):
            call()
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter_ns()
            result = call()
            took[name].append(time.perf_counter_ns() - begin)
            del result
    gc.enable()
    return {name: statistics.median(times) / 1000 for name, times in took.items()}


def pairs(buffer: Any, elastic: Any) -> list[dict[str, Callable[[], object]]]:
    """The same calls of both: T = 8, H = 256, K = 2, E = L = 64."""
    import torch

    x, idx = torch.zeros((8, 256), dtype=torch.bfloat16), torch.zeros((8, 2), dtype=torch.int64)
    weights = torch.ones((8, 2))
    routing = {"topk_idx": idx, "topk_weights": weights, "num_experts": EXPERTS}
    sent, got = buffer.dispatch(x, **routing), elastic.dispatch(x, **routing)
    later, behind = {"async_finish": True}, {"async_with_compute_stream": True}
    rows, handle = sent[0], sent[4]
    return [
        {
            "Buffer.dispatch": lambda: buffer.dispatch(x, **routing),
            "ElasticBuffer.dispatch": lambda: elastic.dispatch(x, **routing),
            "the same, do_handle_copy=False": lambda: elastic.dispatch(x, **routing, do_handle_copy=False),
        },
        {
            "Buffer.dispatch, num_worst_tokens": lambda: buffer.dispatch(x, **routing, num_worst_tokens=8),
            "ElasticBuffer.dispatch, do_cpu_sync=False": lambda: elastic.dispatch(
                x, **routing, do_cpu_sync=False
            ),
        },
        {
            "Buffer.dispatch, cached": lambda: buffer.dispatch(x, handle=handle),
            "ElasticBuffer.dispatch, cached": lambda: elastic.dispatch(x, handle=got.handle),
        },
        {
            "Buffer.dispatch, with an event": lambda: buffer.dispatch(x, **routing, **later),
            "ElasticBuffer.dispatch, with an event": lambda: elastic.dispatch(x, **routing, **behind),
        },
        {
            "Buffer.combine": lambda: buffer.combine(rows, handle),
            "ElasticBuffer.combine": lambda: elastic.combine(got.recv_x, got.handle),
        },
        {
            "Buffer.combine, with an event": lambda: buffer.combine(rows, handle, **later),
            "ElasticBuffer.combine, with an event": lambda: elastic.combine(got.recv_x, got.handle, **behind),
        },
        {
            "Buffer.combine, weights": lambda: buffer.combine(rows, handle, sent[2]),
            "ElasticBuffer.combine, weights": lambda: elastic.combine(
                got.recv_x, got.handle, topk_weights=got.recv_topk_weights
            ),
        },
    ]


def main() -> None:
    """Prints the table."""
    os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(64 << 20)
    import torch

    from harness import stub_cuda

    torch.set_num_threads(1)
    stub_cuda.install(8)
    extension: Any = sys.modules["deepep._cuda"]
    extension.wait_counts = lambda *args: stub_cuda.Counts(0, 8, 8, 0, stub_cuda.Opaque(), [1] * EXPERTS)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    sizes = {"num_max_tokens_per_rank": 8, "hidden": 256}
    with stub_cuda.stub_buffer() as buffer, stub_cuda.stub_buffer(elastic=True, **sizes) as elastic:
        for calls in pairs(buffer, elastic):
            found = medians(calls, rounds)
            first = next(iter(found.values()))
            for name, microseconds in found.items():
                print(f"{name:44} {microseconds:6.1f} us {microseconds - first:+6.1f}")


if __name__ == "__main__":
    main()
