"""Times of calls whose kernels only work, measure waits, or write time lines of their warps.

    PYTHONPATH=tests python -m harness.watched_times [--ranks 2] [--tokens 4096] [--decode-tokens 128]

Ranks are processes; those that share a GPU need CUDA MPS. The three forms take turns in every round, with the
same rows. By events on the device, from when all launches of a call are queued until its stream has its
outputs, L2 flushed; the slowest rank's, median (90th percentile) of the rounds, microseconds. Without a GPU
it runs on the emulator, by the host's clock, which says that it works and nothing about time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

FORMS = ("works", "measures waits", "writes time lines")


@contextlib.contextmanager
def watching(buffer: Any, form: str) -> Iterator[None]:
    if form == "measures waits":
        buffer.measure_waits()
        yield
        buffer.measure_waits(False)
    elif form == "writes time lines":
        with buffer.record_warps(calls=2):
            yield
    else:
        yield


def calls_of(buffer: Any, sizes: dict[str, int], device: torch.device) -> dict[str, Callable[[], Any]]:
    """By name, calls for which no host waits."""
    torch.manual_seed(buffer.rank)
    experts, topk = sizes["experts"], sizes["topk"]

    def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(tokens, sizes["hidden"], device=device).bfloat16()
        weights, idx = torch.rand(tokens, experts, device=device).topk(topk, dim=1)
        return x, idx, weights

    x, idx, weights = inputs(sizes["tokens"])
    few, few_idx, few_weights = inputs(sizes["decode_tokens"])
    sent = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=experts)
    came = buffer.low_latency_dispatch(few, few_idx, len(few), experts, use_fp8=False)
    rows = came.recv_x.clone()
    worst = sizes["tokens"] * buffer.group_size
    by_topk = {"topk_idx": idx, "topk_weights": weights, "num_experts": experts, "num_worst_tokens": worst}
    return {
        "dispatch by top-k": lambda: buffer.dispatch(x, **by_topk),
        "dispatch, cached": lambda: buffer.dispatch(x, handle=sent.handle),
        "combine": lambda: buffer.combine(sent.recv_x, sent.handle),
        "low-latency dispatch": lambda: buffer.low_latency_dispatch(
            few, few_idx, len(few), experts, use_fp8=False
        ),
        "low-latency combine": lambda: buffer.low_latency_combine(rows, few_idx, few_weights, came.handle),
    }


def measure(context: Any, sizes: dict[str, int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """On a rank: microseconds by call and form, one a round."""
    from deepep import Buffer
    from deepep.bench.timeline.record import meet

    device = context.device
    cuda = device.type == "cuda"
    flush = torch.empty(256 << 20 if cuda else 1, dtype=torch.uint8, device=device)

    def timed(call: Callable[[], Any]) -> float:
        meet(context.group, device)
        flush.fill_(1)
        if not cuda:
            began = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - began)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # until the launch is queued
        begin.record()
        kept = call()
        end.record()
        torch.cuda.synchronize()
        del kept
        return 1000 * begin.elapsed_time(end)

    with Buffer(
        context.group,
        backend=None if cuda else "emulator",
        device=device,
        low_latency_mode=True,
        timeout=30.0,
    ) as buffer:
        calls = calls_of(buffer, sizes, device)
        found: dict[str, dict[str, list[float]]] = {name: {form: [] for form in FORMS} for name in calls}
        for number in range(rounds + 3):
            for name, call in calls.items():
                for form in FORMS:
                    with watching(buffer, form):
                        took = timed(call)
                    if number >= 3:
                        found[name][form].append(took)
    return found


def main() -> None:
    """Prints a line for each call: its time in each form."""
    from deepep.sim import World

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    there = torch.cuda.is_available()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60 if there else 2)
    shape = {"tokens": 4096, "decode_tokens": 128, "hidden": 7168, "topk": 8, "experts": 256}
    small = {"tokens": 8, "decode_tokens": 4, "hidden": 256, "topk": 2, "experts": 4}
    for name, size in (shape if there else small).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    asked = vars(parser.parse_args())
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if there and asked["ranks"] > torch.cuda.device_count():
        os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(100 // asked["ranks"]))
    with World(asked["ranks"], backend="nccl" if there else "gloo", timeout=300.0) as world:
        by_rank = world.run(measure, {name: asked[name] for name in shape}, asked["rounds"])
    report: dict[str, dict[str, float]] = {}
    for name in by_rank[0]:
        parts = []
        for form in FORMS:
            slowest = sorted(max(times) for times in zip(*(of[name][form] for of in by_rank), strict=True))
            report.setdefault(name, {})[form] = statistics.median(slowest)
            parts.append(f"{form} {statistics.median(slowest):.1f} ({slowest[int(0.9 * len(slowest))]:.1f})")
        print(f"{name}: {', '.join(parts)}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
