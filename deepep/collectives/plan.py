"""Plans: which schedule moves a reduction, between which groups, in which formats; and their files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deepep.collectives.codecs import FIXED, LOSSY, NAMES, PLAIN
from deepep.errors import ArgumentTypeError, RangeError
from deepep.runtime.checks import check_int

SCHEDULES = ("oneshot", "direct", "hierarchical", "ring", "chain", "tree", "native", "nvlink")
ONE_ROUNDING = ("oneshot", "direct", "hierarchical", "nvlink")
ALL_ADDENDS = ("oneshot", "direct", "nvlink")
"""Schedules that round an addend and a sum once, however many ranks there are; and those in which whoever
sums has all ranks' addends.
"""
_VERSION = 1


@dataclass(frozen=True)
class ReductionPlan:
    """The way of a reduction; all ranks have to pass the same.

    schedule: one of `SCHEDULES`. codec: one of codecs.NAMES; inner: that of addends inside groups, if
    another. groups: the ranks by group, () for one group of all; "hierarchical" sums inside them first,
    "ring", "chain" and "tree" go through the ranks in this order. pieces: parts that are under way at a
    time.

    Raises RangeError or ArgumentTypeError. A lossy codec goes with `ONE_ROUNDING` alone: a ring would round
    R - 1 times, and no transport sums FP8.
    """

    schedule: str = "direct"
    codec: str = FIXED
    inner: str = ""
    groups: tuple[tuple[int, ...], ...] = ()
    pieces: int = 1

    def __post_init__(self) -> None:
        _check_name("schedule", self.schedule, SCHEDULES)
        _check_name("codec", self.codec, NAMES)
        if self.inner:
            _check_name("inner", self.inner, NAMES)
        object.__setattr__(self, "pieces", check_int("pieces", self.pieces, 1, 64))
        object.__setattr__(self, "groups", checked_groups(self.groups))
        lossy = self.codec in LOSSY or self.inner in LOSSY
        if lossy and self.schedule not in ONE_ROUNDING:
            allowed = f"{PLAIN} or {FIXED}: {self.schedule} rounds at every rank, or cannot sum it"
            raise RangeError("codec", repr(self.inner or self.codec), allowed)
        if self.inner and self.inner != self.codec and (self.codec not in LOSSY or self.inner == FIXED):
            allowed = f"{', '.join((PLAIN, *LOSSY))} beneath a lossy codec, else the codec itself"
            raise RangeError("inner", repr(self.inner), allowed)

    def for_ranks(self, num_ranks: int) -> ReductionPlan:
        """The same with its groups spelt out. Raises RangeError unless they hold each of the ranks once."""
        groups = self.groups or (tuple(range(num_ranks)),)
        if sorted(rank for group in groups for rank in group) != list(range(num_ranks)):
            raise RangeError("groups", str(self.groups), f"each of the {num_ranks} ranks once")
        return ReductionPlan(self.schedule, self.codec, self.inner, groups, self.pieces)

    def among(self, places: Sequence[int]) -> ReductionPlan:
        """The same between those of its ranks that are at `places`, counted anew in this order."""
        return replace(self, groups=groups_among(self.groups, places))

    @property
    def order(self) -> tuple[int, ...]:
        """The ranks in the order of the groups."""
        return tuple(rank for group in self.groups for rank in group)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, for `load` and `topology=path`."""
        Path(path).write_text(json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ReductionPlan:
        """Reads what `save` wrote. Raises RangeError for anything else, OSError for no file."""
        try:
            stored = json.loads(Path(path).read_text())
            version = stored.pop("version")
            plan = cls(**stored)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise RangeError("plan", f"{path}: {error}", "a file that ReductionPlan.save wrote") from None
        if version != _VERSION:
            raise RangeError("plan", f"{path}: version {version}", f"version {_VERSION}")
        return plan


def checked_groups(groups: object) -> tuple[tuple[int, ...], ...]:
    """Lists of ranks as tuples. Raises ArgumentTypeError or RangeError."""
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise ArgumentTypeError("groups", type(groups).__name__, "lists of ranks")
    made = []
    for group in groups:
        if not isinstance(group, Sequence) or isinstance(group, str) or not group:
            raise ArgumentTypeError("groups", repr(group)[:100], "lists of ranks, none of them empty")
        made.append(tuple(check_int("groups", rank, 0, 1 << 20) for rank in group))
    return tuple(made)


def groups_among(groups: Sequence[Sequence[int]], places: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Groups of those ranks that are at `places`, counted anew in this order; a group of none is left out."""
    number = {place: index for index, place in enumerate(places)}
    kept = (tuple(number[rank] for rank in group if rank in number) for group in groups)
    return tuple(group for group in kept if group)


def _check_name(argument: str, name: object, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise RangeError(argument, repr(name), ", ".join(allowed))
