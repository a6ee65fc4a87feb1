"""Time lines of warps of emulated kernels: from the machine to the rank that asked for them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from deepep.runtime.control.lines import Launch, LineRecorder

LAUNCHES = 2
"""Of an operation on one machine: both halves of a low-latency call."""


class RankLines(NamedTuple):
    """A rank's launches, and the words [W] int64 that their warps have written."""

    launches: list[Launch]
    words: Tensor


def asks_for(lines: LineRecorder | None) -> bool:
    """True if a rank's next operation is to record."""
    return lines is not None and lines.asks


def add_lines(lines: LineRecorder | None, found: RankLines | None) -> None:
    """Adds what an operation has recorded."""
    if lines is not None and found is not None:
        lines.add(found.launches, found.words)
