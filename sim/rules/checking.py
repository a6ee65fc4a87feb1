"""Building blocks of properties: how a violation is reported, and the few facts that they start from.

The facts are worked out here from the routing alone, token by token in plain Python, without the reference
and without the core: properties judge those, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from deepep.sim.cases.case import Case
from deepep.sim.cases.values import inputs
from deepep.sim.rules.observed import Array, RankView, bits

Floats = npt.NDArray[np.float32]

BF16_NAN = 0x7FFF


class Violation(AssertionError):
    """A property does not hold.

    Attributes:
        rank: where it was seen, if at one rank.
        place: index in the field that it was seen in.
        rule: name of what does not hold, where whoever checks does not know.
    """

    def __init__(
        self, message: str, rank: int | None = None, place: tuple[int, ...] = (), rule: str = ""
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.place = place
        self.rule = rule


class Missing(Violation):
    """A rule needs something that the implementation does not give."""


@dataclass(frozen=True)
class Property:
    """A rule that every example has to keep.

    Attributes:
        name: for people, and for the list of what caught a defect.
        applies: whether it says anything about a case.
        check: `check(case, views)` raises Violation; `views` is what each rank got.
        derive: for rules about several examples: the other cases to run on the same implementation. `check`
            then gets their views as a third argument, a list in the same order.
    """

    name: str
    applies: Callable[[Case], bool]
    check: Callable[..., None]
    derive: Callable[[Case], list[Case]] | None = None

    def verify(self, case: Case, views: list[RankView], others: list[list[RankView]] | None = None) -> None:
        """Raises Violation if the rule does not hold; does nothing where it does not apply."""
        if self.applies(case):
            self.check(case, views) if self.derive is None else self.check(case, views, others)


def check_equal(what: str, rank: int, expected: Any, got: Any) -> None:
    """Raises Violation at the first element that differs; arrays are compared bit for bit."""
    want, have = np.asarray(expected), np.asarray(got)
    if want.shape != have.shape:
        raise Violation(f"rank {rank}: {what}: expected shape {want.shape}, got {have.shape}", rank)
    if not np.array_equal(want, have):
        place = tuple(int(i) for i in np.argwhere(want != have)[0])
        raise Violation(
            f"rank {rank}: {what}{list(place)}: expected {want[place]}, got {have[place]}", rank, place
        )


@dataclass(frozen=True)
class SentBits:
    """A rank's arguments as bits; see deepep.sim.cases.values.RankInputs."""

    x: Array
    scales: Array | None
    topk_weights: Array
    biases: tuple[Array, ...]
    tokens: Array


@lru_cache(maxsize=64)
def sent(case: Case, rank: int, again: bool = False) -> SentBits:
    """The inputs of `rank` (`again`: by handle). Made afresh: no implementation held these arrays."""
    made = inputs(case, rank, again=again)
    return SentBits(
        x=bits(made.x),
        scales=None if made.scales is None else bits(made.scales),
        topk_weights=bits(made.topk_weights),
        biases=tuple(bits(bias) for bias in made.biases),
        tokens=bits(made.tokens),
    )


@lru_cache(maxsize=64)
def arriving(case: Case, rank: int) -> list[tuple[int, int]]:
    """(source rank, source token) of every row that `rank` is to receive, in the order of the interface."""
    if rank in case.masked_at_dispatch:
        return []
    return [
        (source, token)
        for source in case.dispatch_members
        for token, choices in enumerate(case.topk_idx[source].tolist())
        if any(expert >= 0 and expert // case.num_local_experts == rank for expert in choices)
    ]


@lru_cache(maxsize=512)
def arriving_at_expert(case: Case, expert: int) -> list[tuple[int, int]]:
    """(source rank, source token) of every low-latency row of a global expert, in the interface's order."""
    if expert // case.num_local_experts in case.masked_at_dispatch:
        return []
    return [
        (source, token)
        for source in case.dispatch_members
        for token, choices in enumerate(case.topk_idx[source].tolist())
        if expert in choices
    ]


def destinations(case: Case, source: int, token: int) -> list[int]:
    """The living ranks that a token goes to, ascending."""
    owners = {e // case.num_local_experts for e in case.topk_idx[source][token].tolist() if e >= 0}
    return sorted(owners - set(case.masked))


def always(case: Case) -> bool:
    """Applies to every case."""
    return True


def need(array: Array | None, what: str = "a field") -> Array:
    """The array; Missing if the implementation did not give it."""
    if array is None:
        raise Missing(f"{what} is missing")
    return array


def floats(bf16_bits: Array) -> Floats:
    """bf16 bits as float32 values, exactly."""
    return (bf16_bits.astype(np.uint32) << 16).view(np.float32)


def bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """float32 rounded to bf16 bits, to nearest even; every NaN becomes 0x7FFF."""
    word = values.view(np.uint32)
    rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), BF16_NAN, rounded).astype(np.uint16)


def ordered_sum(terms: list[Floats], width: int) -> Floats:
    """Terms added in float32 from the first one on; no term gives +0.0."""
    if not terms:
        return np.zeros(width, dtype=np.float32)
    total = terms[0].copy()
    with np.errstate(all="ignore"):
        for term in terms[1:]:
            total += term
    return total
