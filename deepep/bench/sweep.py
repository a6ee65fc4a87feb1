"""Dimensions of a run: shapes, dtypes, SM counts, routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepep.errors import ArgumentError, RangeError

Dtype = Literal["bf16", "fp8"]
#: an FP8 row has one float32 scale for so many channels
SCALE_GROUP = 128
DTYPES: tuple[Dtype, ...] = ("bf16", "fp8")
MODES = ("throughput", "elastic", "low-latency", "layer", "overlap")
ROUTINGS = ("uniform", "zipf", "trace")
SCALES = ("row-major", "column-major")
PEERS = ("all_to_all", "deep_ep")
#: fewer samples have no 99th percentile to speak of
MIN_ITERATIONS = 50


@dataclass(frozen=True)
class Shape:
    """tokens: T, the same on every rank. hidden: H. topk: K. experts: E, of all ranks."""

    tokens: int
    hidden: int
    topk: int
    experts: int

    def row_bytes(self, dtype: Dtype) -> int:
        """Bytes of a row as it is sent: values, and scales if it has any."""
        return self.hidden * 2 if dtype == "bf16" else self.hidden + self.hidden // SCALE_GROUP * 4

    def __str__(self) -> str:
        return f"T={self.tokens} H={self.hidden} K={self.topk} E={self.experts}"


@dataclass(frozen=True)
class Sweep:
    """All that a run measures. Every rank gets the same.

    mode: whose operations; elastic: ElasticBuffer's; low latency chooses its SM counts itself, and casts to
    FP8 itself; a layer chooses them, too; overlap puts those of throughput beside products. width: of a
    layer's experts, of the products. sms: SM counts, ascending; empty where there are none to choose (CPU).
    trace: a routing trace file, and layer the layer of it, for the routing "trace". scales: how FP8 scales
    [T, P] lie in memory. peers: what else is measured. backend: of Buffer; None: its own choice. iterations:
    samples of each figure.

    Raises ArgumentError for what cannot be measured.
    """

    num_ranks: int
    shapes: tuple[Shape, ...]
    dtypes: tuple[Dtype, ...] = DTYPES
    sms: tuple[int, ...] = ()
    routing: str = "uniform"
    trace: str | None = None
    layer: int = 0
    scales: str = "row-major"
    peers: tuple[str, ...] = PEERS
    backend: str | None = None
    check: bool = True
    iterations: int = 60
    warmup: int = 10
    seed: int = 0
    mode: str = "throughput"
    width: int = 2048

    def __post_init__(self) -> None:
        _at_least("ranks", self.num_ranks, 1)
        _at_least("iterations", self.iterations, MIN_ITERATIONS)
        _at_least("warmup", self.warmup, 0)
        for sms in self.sms:
            _at_least("sms", sms, 1)
        for name, got, allowed in (
            ("mode", (self.mode,), MODES),
            ("dtype", self.dtypes, DTYPES),
            ("routing", (self.routing,), ROUTINGS),
            ("scales", (self.scales,), SCALES),
            ("peers", self.peers, PEERS),
        ):
            for value in got:
                if value not in allowed:
                    raise ArgumentError(name, value, " or ".join(allowed))
        if (self.routing == "trace") != (self.trace is not None):
            raise ArgumentError("trace", str(self.trace), "a file with --routing trace, and only then")
        if self.mode == "low-latency" and self.sms:
            raise ArgumentError("sms", str(self.sms), "none: low latency takes as many as pay")
        _at_least("width", self.width, 8)
        if self.width % 8:
            raise RangeError("width", str(self.width), "a multiple of 8")
        if self.mode == "layer" and self.sms:
            raise ArgumentError("sms", str(self.sms), "none: the layer's exchanges take as many as pay")
        if self.mode == "layer" and self.routing != "uniform":
            raise ArgumentError("routing", self.routing, "uniform: the layer has a router of its own")
        if self.mode == "low-latency" and self.scales != "row-major":
            raise ArgumentError("scales", self.scales, "none: low latency makes them itself")
        for shape in self.shapes:
            self._check_shape(shape)

    def _check_shape(self, shape: Shape) -> None:
        _at_least("tokens", shape.tokens, 1)
        _at_least("hidden", shape.hidden, 1)
        _at_least("topk", shape.topk, 1)
        multiple = SCALE_GROUP if "fp8" in self.dtypes else 8  # a scale's channels; or rows of 16 bytes
        if shape.hidden % multiple:
            raise RangeError("hidden", str(shape.hidden), f"a multiple of {multiple} with these dtypes")
        if shape.experts < 1 or shape.experts % self.num_ranks:
            ranks = f"the {self.num_ranks} ranks"
            raise RangeError("experts", str(shape.experts), f"a positive multiple of {ranks}")
        if shape.topk > shape.experts:
            raise RangeError("topk", str(shape.topk), f"at most the {shape.experts} experts")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise RangeError(name, str(value), f"{least} or more")
