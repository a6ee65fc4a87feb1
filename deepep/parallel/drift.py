"""Drift: whether reductions take other times than before, so that plans are to be measured again. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

SLOWER, FASTER = 1.5, 0.7
"""By which times have to differ from those of before, in proportion."""
PATIENCE = 20
"""Reductions that make up "before", and that in a row have to differ from it."""


@dataclass
class DriftDetector:
    """Watches times in proportion to what was expected, whatever that is: gradients share the processor with
    the backward, and the plans were timed without one.
    """

    before: list[float] = field(default_factory=list)
    in_a_row: int = 0
    _is_slower: bool = False

    def observe(self, seconds: float, expected: float) -> bool:
        """Takes a reduction's time; True if as many as `PATIENCE` in a row were off the same way."""
        ratio = seconds / max(expected, 1e-9)
        if len(self.before) < PATIENCE:
            self.before.append(ratio)
            return False
        usual = statistics.median(self.before)
        is_slower, is_faster = ratio > SLOWER * usual, ratio < FASTER * usual
        if not (is_slower or is_faster):
            self.in_a_row = 0
            return False
        self.in_a_row = self.in_a_row + 1 if is_slower == self._is_slower else 1
        self._is_slower = is_slower
        return self.in_a_row >= PATIENCE

    def restart(self) -> None:
        """Forgets what was: plans have changed."""
        self.before, self.in_a_row = [], 0
