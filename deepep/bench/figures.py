"""Figures that a run measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepep.bench.clock import Timing
from deepep.bench.floor import Copied
from deepep.bench.operations import TimedOperation
from deepep.bench.sweep import Dtype, Shape
from deepep.bench.workload import Skew

OURS = "deepep"


@dataclass(frozen=True)
class Figure:
    """One operation, measured. Times in microseconds, bytes of the busiest rank.

    by: whose operation, and which variant. sms: how many SMs it was given, None where it chooses itself.
    floor, floor_sms: the fastest plain push of the same bytes with no more SMs (any number where sms is
    None), and how many it took; None where nothing crosses between ranks, or there is nothing to push with.
    exchange, exchange_sms: the same of the bare exchange, which low latency is measured against. kernels: the
    time of its kernels alone, by torch's profiler, where that was asked for.
    """

    shape: Shape
    operation: str
    by: str
    dtype: Dtype | None
    sms: int | None
    median: float
    p99: float
    host: float
    wire_bytes: int = 0
    logical_bytes: int = 0
    floor: float | None = None
    floor_sms: int | None = None
    exchange: float | None = None
    exchange_sms: int | None = None
    kernels: float | None = None

    @staticmethod
    def of(
        shape: Shape,
        operation: TimedOperation,
        by: str,
        sms: int | None,
        timing: Timing,
        floor: Copied | None,
    ) -> Figure:
        moved = operation.traffic
        return Figure(
            shape,
            operation.name,
            f"{by} {operation.variant}".rstrip(),
            operation.dtype,
            sms,
            timing.median,
            timing.p99,
            timing.host,
            moved.wire if moved else 0,
            moved.logical if moved else 0,
            floor.timing.median if floor else None,
            floor.sms if floor else None,
        )

    @property
    def wire_gbs(self) -> float | None:
        """GB/s of what crosses between ranks; None where nothing does."""
        return self.wire_bytes / self.median / 1e3 if self.wire_bytes else None

    @property
    def logical_gbs(self) -> float | None:
        """GB/s as DeepEP states them, rank-local rows counted."""
        return self.logical_bytes / self.median / 1e3 if self.logical_bytes else None

    @property
    def ratio(self) -> float | None:
        """Time over the floor's."""
        return self.median / self.floor if self.floor else None

    @property
    def exchange_ratio(self) -> float | None:
        """Time over the bare exchange's."""
        return self.median / self.exchange if self.exchange else None

    def as_dict(self) -> dict[str, Any]:
        """All of it, flat."""
        plain = asdict(self)
        shape = plain.pop("shape")
        rates = {"wire_gbs": self.wire_gbs, "logical_gbs": self.logical_gbs, "floor_ratio": self.ratio}
        return {**shape, **plain, **rates, "exchange_ratio": self.exchange_ratio}


@dataclass
class BenchReport:
    """A run's figures.

    skews: of each shape's routing. problems: results that were wrong; the first ends the run. notes: whatever
    else.
    """

    environment: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    copies: list[Copied] = field(default_factory=list)
    skews: dict[Shape, Skew] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes it as JSON. Times in microseconds, rates in GB/s (1e9 bytes)."""
        plain = {
            "environment": self.environment,
            "notes": self.notes,
            "problems": self.problems,
            "skew": [{**asdict(shape), **asdict(skew)} for shape, skew in self.skews.items()],
            "figures": [figure.as_dict() for figure in self.figures],
            "copies": [{"wire_bytes": c.wire_bytes, "sms": c.sms, **asdict(c.timing)} for c in self.copies],
        }
        path.write_text(json.dumps(plain, indent=1) + "\n")
