"""Measuring as clients import it from `deep_ep.utils.testing`: a function's time, by events or by the clock.

`python -m deepep bench` measures better: ranks aligned, the slowest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from deepep.runtime.checks import check_int
from deepep.utils.math import calc_diff

__all__ = ["bench", "calc_diff"]


def bench(
    fn: Callable[[], object],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], object] | None = None,
) -> tuple[float, float, float]:
    """Seconds of a call of `fn`: (mean, least, most), but for the first. post_fn: called after each."""
    warm, tests = check_int("num_warmups", num_warmups, 0), check_int("num_tests", num_tests, 1)
    cuda = torch.cuda.is_available()

    def timed() -> float:
        if not cuda:
            begun = time.perf_counter()
            fn()
            return time.perf_counter() - begun
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    for _ in range(warm):
        fn()
    taken = []
    for _ in range(tests + 1):
        taken.append(timed())
        if post_fn is not None:
            post_fn()
    kept = taken[1:]
    return sum(kept) / len(kept), min(kept), max(kept)
