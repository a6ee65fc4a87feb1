"""Time lines of warps: the steps that each warp of a kernel came to, and when.

Kernels write them where somebody asks (csrc/kernels/common/lines.hpp); here they are read. Times are
nanoseconds of the GPU's clock, or of the emulated machine's, modulo 2^56.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

#: `Step` of csrc/kernels/common/steps.hpp, by number.
STEPS = (
    *("end", "start", "count", "post", "wait for metadata", "push rows", "local rows", "signal"),
    *("wait for credit", "wait for weights", "wait for rows", "reduce", "spread", "finish"),
)
END = STEPS[0]
LINE_WORDS = 128
TIME_BITS = 56


@dataclass(frozen=True)
class WarpSpan:
    """Something that a warp was at. step: of STEPS. begin, end: nanoseconds."""

    step: str
    begin: int
    end: int

    @property
    def waits(self) -> bool:
        """True if the warp waited for another rank, or for another warp that does."""
        return self.step.startswith("wait")


@dataclass(frozen=True)
class WarpLine:
    """One warp of a launch. sm: the number of its SM. dropped: steps past those that a warp keeps."""

    block: int
    warp: int
    sm: int
    spans: tuple[WarpSpan, ...]
    dropped: int = 0


@dataclass(frozen=True)
class CallLines:
    """One call of one rank. warps: none of a launch without a form that records, or without room."""

    operation: str
    rank: int
    warps: tuple[WarpLine, ...]


Launch = tuple[str, int, int, int]
"""A launch as `close_lines` of an extension's domain names it: operation, blocks, warps of each, first word
or -1."""


class LineRecorder:
    """One rank's recordings, kept by its engine. Off until it is asked to record.

    asks: the calls to come record. num_calls: so many, by memory that is set aside.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.asks = False
        self.num_calls = 0
        self._calls: list[CallLines] = []

    def begin(self, num_calls: int) -> None:
        """Has calls record from now on."""
        self.asks, self.num_calls, self._calls = True, num_calls, []

    def add(self, launches: Sequence[Launch], words: Tensor) -> None:
        """Reads what launches have written to words [W] int64, on the CPU."""
        for operation, num_blocks, num_warps, first in launches:
            warps: tuple[WarpLine, ...] = ()
            if first >= 0:
                num_words = num_blocks * num_warps * LINE_WORDS
                warps = read_lines(words[first : first + num_words].view(num_blocks, num_warps, LINE_WORDS))
            self._calls.append(CallLines(operation, self.rank, warps))

    def end(self) -> list[CallLines]:
        """No longer. The calls meanwhile, of each mode in their order."""
        self.asks = False
        calls, self._calls = self._calls, []
        return calls


def read_lines(words: Tensor) -> tuple[WarpLine, ...]:
    """The warps of one launch; words [blocks, warps, LINE_WORDS] int64, on the CPU."""
    found = []
    for block, of_block in enumerate(words.tolist()):
        for warp, (head, *steps) in enumerate(of_block):
            count = head & 0xFFFFFFFF
            kept = [(word >> TIME_BITS, word & ((1 << TIME_BITS) - 1)) for word in steps[:count]]
            spans = [
                WarpSpan(STEPS[step], begin, end) for (step, begin), (_, end) in itertools.pairwise(kept)
            ]
            found.append(WarpLine(block, warp, head >> 32, tuple(spans), max(0, count - len(steps))))
    return tuple(found)
