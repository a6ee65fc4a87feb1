"""PlanTable: a reduction plan for every format and size: measured, or pinned; the same on all ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deepep.collectives.codecs import FIXED, LOSSY, PLAIN
from deepep.collectives.cost import LinkSpeeds, predicted
from deepep.collectives.plan import ONE_ROUNDING, ReductionPlan, checked_groups, groups_among
from deepep.collectives.traffic import traffic_of
from deepep.errors import RangeError

SIZES = (4 << 10, 256 << 10, 4 << 20)
"""Bytes of float32 at which plans are compared; each stands for sizes up to the middle of the next, by ratio.
"""
TIMED = 3
"""Candidates that are timed, besides the transport's own."""
LEAST_GAIN = 0.10
"""Share by which another plan has to be faster to take the place of the one in use."""
_VERSION = 2


@dataclass(frozen=True)
class PlanEntry:
    """The plan of messages of `size` bytes of float32 and sizes near it; seconds: measured, or predicted."""

    size: int
    plan: ReductionPlan
    seconds: float
    is_measured: bool = False


@dataclass(frozen=True)
class PlanTable:
    """Plans by codec and size, for R ranks in `groups`. version: how often ranks have chosen again."""

    groups: tuple[tuple[int, ...], ...]
    entries: tuple[PlanEntry, ...]
    version: int = 0

    def entry_for(self, codec: str, num_bytes: int) -> PlanEntry:
        """The entry whose size is nearest by ratio. Raises RangeError for a codec that has none."""
        fitting = [entry for entry in self.entries if entry.plan.codec == codec]
        if not fitting:
            held = sorted({entry.plan.codec for entry in self.entries})
            raise RangeError("compression", repr(codec), f"codecs of the plan: {', '.join(held)}")
        return min(fitting, key=lambda entry: (_ratio(entry.size, num_bytes), entry.size))

    def expected_seconds(self, codec: str, num_bytes: int) -> float:
        """Time of `num_bytes` of float32, between entries by their sizes, beyond them in proportion."""
        fitting = sorted((e.size, e.seconds) for e in self.entries if e.plan.codec == codec)
        for (a, low), (b, high) in itertools.pairwise(fitting):
            if num_bytes <= b:
                return low + (high - low) * max(0.0, (num_bytes - a) / (b - a))
        size, seconds = fitting[-1]
        return seconds * max(1.0, num_bytes / size)

    def among(self, places: Sequence[int]) -> PlanTable:
        """The same plans between those of their ranks that are at `places`, counted anew in this order."""
        entries = tuple(replace(entry, plan=entry.plan.among(places)) for entry in self.entries)
        return replace(self, groups=groups_among(self.groups, places), entries=entries)

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON, for `load` and `topology=path`."""
        Path(path).write_text(self.encode() + "\n")

    def encode(self) -> str:
        """The table as JSON, for `decode`."""
        return json.dumps({"version": _VERSION, "table": asdict(self)}, indent=1)

    @classmethod
    def load(cls, path: str | Path) -> PlanTable:
        """Reads what `save` wrote. Raises RangeError for anything else, OSError for no file."""
        return cls.decode(Path(path).read_text(), str(path))

    @classmethod
    def decode(cls, text: str, source: str = "text") -> PlanTable:
        """The table that `encode` made a text of. Raises RangeError, with where it is from, for any other."""
        try:
            stored = json.loads(text)
            table = stored["table"]
            entries = tuple(
                PlanEntry(
                    size=int(entry["size"]),
                    plan=ReductionPlan(**entry["plan"]),
                    seconds=float(entry["seconds"]),
                    is_measured=bool(entry["is_measured"]),
                )
                for entry in table["entries"]
            )
            made = cls(checked_groups(table["groups"]), entries, int(table["version"]))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise RangeError("plan", f"{source}: {error}", "a file that PlanTable.save wrote") from None
        if stored.get("version") != _VERSION or not entries:
            raise RangeError("plan", f"{source}: version {stored.get('version')}", f"version {_VERSION}")
        return made


def load_plan(path: str | Path) -> ReductionPlan | PlanTable:
    """Reads what `save` of either wrote. Raises RangeError for anything else, OSError for no file."""
    try:
        is_table = "table" in json.loads(Path(path).read_text())
    except (ValueError, TypeError):
        is_table = False
    return PlanTable.load(path) if is_table else ReductionPlan.load(path)


def candidates(
    codec: str, groups: tuple[tuple[int, ...], ...], schedule: str = "auto"
) -> list[ReductionPlan]:
    """Plans that are worth comparing for a codec, without those of another schedule than asked for."""
    lossy = codec in LOSSY
    everyone = tuple(rank for group in groups for rank in group)
    kinds: list[ReductionPlan] = [
        ReductionPlan("oneshot", codec),
        *(ReductionPlan("direct", codec, pieces=pieces) for pieces in (1, 4)),
    ]
    if 1 < len(groups) < len(everyone):
        inners = ("", "bf16") if codec == "fp8" else ("",)
        kinds += [
            ReductionPlan("hierarchical", codec, inner, groups, pieces)
            for inner in inners
            for pieces in (1, 4)
        ]
    if not lossy:
        kinds += [ReductionPlan("ring", codec, "", groups, pieces) for pieces in (1, 2)]
        kinds.append(ReductionPlan("tree", codec, "", groups))
        kinds += [ReductionPlan("chain", codec, "", _line(groups), pieces) for pieces in (4, 16)]
        kinds.append(ReductionPlan("native", codec))
    kinds = [plan for plan in kinds if schedule in ("auto", plan.schedule)]
    if not kinds:  # hierarchical, and all ranks are near each other: one group of all
        kinds = [ReductionPlan(schedule, codec, "", groups)]
    return kinds


def _line(groups: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Groups for a chain: the smallest at its end, where the least passes."""
    return tuple(sorted(groups, key=len, reverse=True))


def shortlist(plans: Sequence[ReductionPlan], num_bytes: int, speeds: LinkSpeeds) -> list[PlanEntry]:
    """The plans that are predicted to be fastest, and the transport's own, with predicted seconds."""
    entries = []
    for plan in plans:
        seconds = predicted(traffic_of(plan, num_bytes // 4, speeds.num_ranks), speeds)
        entries.append(PlanEntry(num_bytes, plan, seconds))
    ranked = sorted(entries, key=lambda entry: entry.seconds)
    return ranked[:TIMED] + [entry for entry in ranked[TIMED:] if entry.plan.schedule == "native"]


def settled(listed: Sequence[PlanEntry], times: Sequence[float], current: ReductionPlan | None) -> PlanEntry:
    """The fastest by measured times; the one in use, unless another is faster by `LEAST_GAIN`."""
    measured = [
        PlanEntry(entry.size, entry.plan, seconds, True) for entry, seconds in zip(listed, times, strict=True)
    ]
    best = min(measured, key=lambda entry: entry.seconds)
    for entry in measured:
        if entry.plan == current and entry.seconds * (1 - LEAST_GAIN) <= best.seconds:
            return entry
    return best


def codecs_of(compression: str, reproducible: bool) -> tuple[str, ...]:
    """Codecs that gradients may have under these options: what is lossy, and the exact one for the rest."""
    exact = FIXED if reproducible else PLAIN
    if compression == "auto":
        return ("fp8", "bf16", exact)
    return (exact,) if compression == "off" else (compression, exact)


def is_for(plan: ReductionPlan, codec: str) -> bool:
    """True if a plan can carry a codec: a lossy one goes with `ONE_ROUNDING` alone."""
    return plan.codec == codec and (codec not in LOSSY or plan.schedule in ONE_ROUNDING)


def _ratio(a: int, b: int) -> float:
    low, high = sorted((max(a, 1), max(b, 1)))
    return high / low
