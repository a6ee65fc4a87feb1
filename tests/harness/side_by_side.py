"""Explorations on all cores: one in each of several threads, which the emulator lets run at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

AnyTally = TypeVar("AnyTally")


def explore_side_by_side(
    explore: Callable[..., AnyTally], *, runs: int, first_seed: int = 0, **options: Any
) -> list[AnyTally]:
    """`runs` runs in all, from as many first seeds as there are cores; the tally of each."""
    workers = os.cpu_count() or 1
    share = -(-runs // workers)
    seeds = [first_seed + worker * share for worker in range(workers)]  # no scenario twice
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda seed: explore(first_seed=seed, runs=share, **options), seeds))
