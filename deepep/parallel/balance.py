"""Balance: how much of a step each rank takes, by its speed and what it can hold. Pure, but for the meter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

QUANTUM = 1 / 16
"""Weights are whole numbers of it, the slowest rank's being 1."""
LEAST_GAIN = 1 / 32
"""Share of a step's time that other weights have to save, or those in use stay."""
DECAY = 0.9
"""What a rank's speed so far counts against a new step's."""
WARM_UP = 2
"""First steps of a rank, whose times say how long things take to begin."""


def parts_of(total: int, weights: Sequence[float], most: Sequence[int] | None = None) -> list[int]:
    """Sizes of the parts of `total` in proportion to weights, each less than one off.

    most: above which a part does not grow; the others share what it leaves, and where all are full, some of
    `total` is left out.
    """
    exact = [Fraction(weight) for weight in weights]
    limits = [total] * len(exact) if most is None else list(most)
    goals = [Fraction(limit) for limit in limits]
    left, growing = Fraction(min(total, sum(limits))), set(range(len(exact)))
    while growing:
        whole = sum(exact[i] for i in growing)
        full = {i for i in growing if left * exact[i] >= limits[i] * whole}
        if not full:
            break
        left -= sum(limits[i] for i in full)
        growing -= full
    for i in growing:
        goals[i] = left * exact[i] / whole
    parts, so_far, end = [], Fraction(0), 0
    for goal in goals:
        so_far += goal
        begin, end = end, int(so_far + Fraction(1, 2))
        parts.append(end - begin)
    return parts


def weights_of(speeds: Mapping[int, float]) -> dict[int, float]:
    """Weights by rank in proportion to speeds, which are positive."""
    slowest = min(speeds.values())
    return {rank: round(speed / slowest / QUANTUM) * QUANTUM for rank, speed in speeds.items()}


def step_seconds(parts: Mapping[int, int], speeds: Mapping[int, float]) -> float:
    """Time of a step in which each rank of `speeds` takes its part: the slowest one's."""
    return max(parts[rank] / speed for rank, speed in speeds.items())


class SpeedMeter:
    """Samples per second of a rank's own part of its steps: from the first forward to the last gradient,
    without what comes after and waits for others. speed: so far, or 0.0 if not known yet.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.speed = 0.0
        self._clock = clock
        self._began: float | None = None
        self._accumulates = False
        self._steps = 0

    def begin(self, accumulates: bool) -> None:
        """A forward begins; of those that accumulate gradients for one step, the first counts."""
        if self._began is None or not self._accumulates:
            self._began = self._clock()
        self._accumulates = accumulates

    def end(self, samples: int) -> None:
        """The step's last gradient is there."""
        began, self._began, self._accumulates = self._began, None, False
        if began is None or samples == 0:
            return
        self._steps += 1
        speed = samples / max(self._clock() - began, 1e-9)
        if self._steps > WARM_UP:
            self.speed = DECAY * self.speed + (1 - DECAY) * speed if self.speed else speed
