"""The option space: everything an example can vary besides its routing.

`SPACE` lists each option's alternatives, the plainest first: drawing picks among them, shrinking moves
toward the front, and coverage counts which alternatives, and which pairs of alternatives of two options,
have been tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Options:
    """The options of one example. High-throughput and low-latency operations read the ones that concern them.

    Attributes:
        mode: which operations the example runs: "ht" (high throughput) or "ll" (low latency).
        values: what the rows hold: "ids" (each rank, token and channel its own), "normal" (random over forty
            binary orders of magnitude), "nonfinite" (NaN, infinities and signed zeros among them), "zeros"
            (of either sign).
        payload: dtype of x and of its scales; low-latency operations always take bf16.
        scale_layout: memory layout of the scales.
        scale_columns: P, scales per token.
        idx_dtype: of topk_idx.
        topk: whether top-k indices and weights travel with the dispatch; in low latency, only weights.
        cached: whether the dispatch is repeated, with other data, from the handle of the first.
        expert_alignment: of the reported counts, and of the expanded layout.
        worst: num_worst_tokens: not used, exactly the rows needed, or more.
        biases: how many.
        combine_rows: what the combine returns: the rows received ("same"), or other ones.
        combine_weights: whether top-k weights travel back.
        schedule: how calls return: completed, asynchronously, or with a receive hook (low latency only;
            elsewhere as "async").
        low_latency: dtype of low-latency rows and scales.
        spare_slots: M less the most tokens of any rank.
        logfmt, zero_copy, given_out: options of the low-latency combine.
        reduce: where a combine sums. Low latency: first on each expert's rank, or at the token alone. High
            throughput: at the token alone, or first in each domain of `ranks_per_node` ranks ("domain").
        stats: whether receive statistics are collected.
        ranks_per_node: ranks of a scale-up domain, for counts, two-level routing and sums by domain.
        skew: how ranks are delayed against each other: not, one of them, or each at random.
        mask_at: when masked ranks are left out: from the dispatch on, or from the combine on.
    """

    mode: str = "ht"
    values: str = "ids"
    payload: str = "bf16"
    scale_layout: str = "row"
    scale_columns: int = 1
    idx_dtype: str = "int64"
    topk: bool = True
    cached: bool = False
    expert_alignment: int = 1
    worst: str = "off"
    biases: int = 0
    combine_rows: str = "same"
    combine_weights: bool = False
    schedule: str = "sync"
    low_latency: str = "bf16"
    spare_slots: int = 0
    logfmt: bool = False
    zero_copy: bool = False
    given_out: bool = False
    reduce: str = "rank"
    stats: bool = False
    ranks_per_node: int = 8
    skew: str = "none"
    mask_at: str = "dispatch"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


SPACE: dict[str, tuple[Any, ...]] = {
    "mode": ("ht", "ll"),
    "values": ("ids", "normal", "nonfinite", "zeros"),
    "payload": ("bf16", "e4m3+float32", "e4m3+int32", "uint8+float32"),
    "scale_layout": ("row", "column", "padded", "every_other"),
    "scale_columns": (1, 2, 3, 7),
    "idx_dtype": ("int64", "int32"),
    "topk": (True, False),
    "cached": (False, True),
    "expert_alignment": (1, 2, 8, 128),
    "worst": ("off", "exact", "more"),
    "biases": (0, 1, 2),
    "combine_rows": ("same", "other"),
    "combine_weights": (False, True),
    "schedule": ("sync", "async", "hook"),
    "low_latency": ("bf16", "fp8", "fp8+rounded", "fp8+ue8m0"),
    "spare_slots": (0, 1, 5),
    "logfmt": (False, True),
    "zero_copy": (False, True),
    "given_out": (False, True),
    "reduce": ("rank", "token", "domain"),
    "stats": (False, True),
    "ranks_per_node": (8, 1, 2, 3, 4),
    "skew": ("none", "one", "all"),
    "mask_at": ("dispatch", "combine"),
}

assert tuple(SPACE) == tuple(f.name for f in fields(Options))

#: The options that hold a word, and the words.
WORDS: dict[str, tuple[str, ...]] = {n: words for n, words in SPACE.items() if isinstance(words[0], str)}


class Coverage:
    """Coverage of the option space: the alternatives, and the pairs of them, that some examples have tried.

    Args:
        space: option names and their alternatives. An example outside the space is not counted.
    """

    def __init__(self, space: dict[str, tuple[Any, ...]]) -> None:
        self.space = dict(space)
        self.seen: set[tuple[str, Any]] = set()
        self.seen_pairs: set[tuple[str, Any, str, Any]] = set()

    def add(self, example: dict[str, Any]) -> None:
        """Counts one example, given as a value for each option."""
        choices = [(n, example[n]) for n in self.space if n in example and example[n] in self.space[n]]
        self.seen.update(choices)
        self.seen_pairs.update((a, x, b, y) for (a, x), (b, y) in combinations(choices, 2))

    @property
    def total(self) -> int:
        return sum(len(alternatives) for alternatives in self.space.values())

    @property
    def total_pairs(self) -> int:
        sizes = [len(alternatives) for alternatives in self.space.values()]
        return sum(a * b for a, b in combinations(sizes, 2))

    def missing(self) -> Iterator[tuple[str, Any]]:
        """Alternatives that no example has tried."""
        for name, alternatives in self.space.items():
            yield from ((name, a) for a in alternatives if (name, a) not in self.seen)
