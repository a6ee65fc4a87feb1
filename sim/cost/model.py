"""Times from bytes: what the slowest of a rank's links takes, and a constant.

Throughput: t = max(bytes of the NIC / rate, bytes of the links / rate) + start. Low latency: the bytes that a
design sends, and a constant an operation. Fitted to published figures are two numbers a mode (`THROUGHPUT`,
`LOW_LATENCY`); all else is counted, or a rate that somebody measured with plain copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from deepep.layout import RecordSizes
from deepep.sim.cost.loads import RowCounts


@dataclass(frozen=True)
class Cluster:
    """Rates in GB/s (10^9), each direction, of one rank.

    link: a plain copy between two GPUs of a domain. nic: of the wire. start: microseconds of a throughput
    call beside its bytes, an assumption: nothing published says it.
    """

    name: str
    ranks_per_domain: int
    link: float
    nic: float
    start: float = 20.0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers of which there are no times."""
        for name in ("ranks_per_domain", "link", "nic"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: more than 0")
        if not 0 <= self.start < inf:
            raise ValueError(f"start: got {self.start}; allowed: at least 0")


H800 = Cluster("H800, 8 a node, CX7", 8, 160.0, 50.0)
H100 = Cluster("H100, 8 a node, CX7", 8, 396.0, 50.0)
H200 = Cluster("H200, 8 a node, CX7", 8, 396.0, 50.0)


@dataclass(frozen=True)
class Fitted:
    """The two constants of a mode."""

    first: float
    second: float


#: Shares of the NIC's and of the links' rates that kernels reach.
THROUGHPUT = Fitted(first=0.92, second=0.875)
#: Microseconds of a dispatch and of a combine beside their bytes, at the throughput mode's share of the NIC.
LOW_LATENCY = Fitted(first=33.0, second=35.0)

FP8_GROUP = 128


@dataclass(frozen=True)
class RowShape:
    """H, K, and how rows travel: there in FP8 (with float32 scales of 128 channels) or BF16, back in BF16."""

    hidden: int = 7168
    num_topk: int = 8
    fp8: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a row of no size, or in FP8 of parts of scales' groups."""
        whole = FP8_GROUP if self.fp8 else 1
        if self.hidden < 1 or self.hidden % whole or self.num_topk < 1:
            got = f"{self.hidden}, {self.num_topk}"
            raise ValueError(f"hidden, topk: got {got}; allowed: multiples of {whole}, at least 1")

    def sent_bytes(self) -> int:
        """A dispatched row with its scales."""
        return self.hidden + 4 * (self.hidden // FP8_GROUP) if self.fp8 else 2 * self.hidden

    def returned_bytes(self) -> int:
        """A row of a combine."""
        return 2 * self.hidden

    def crossing_bytes(self, ranks_per_domain: int) -> int:
        """This library's record of a token between domains."""
        row = self.hidden if self.fp8 else 2 * self.hidden
        scales = self.hidden // FP8_GROUP if self.fp8 else 0
        return RecordSizes(row, scales, ranks_per_domain, self.num_topk).bytes()

    def crossing_sum_bytes(self) -> int:
        """This library's record of a domain's sum."""
        return RecordSizes(2 * self.hidden, 0, 1, self.num_topk).return_bytes()


@dataclass(frozen=True)
class Predicted:
    """One operation: its time, the most bytes that a rank's NIC and links move in one direction, what binds.

    logical: bytes as DeepEP counts them for its GB/s: what a token sends to each domain (each rank, inside
    one domain), its own included; of the mean rank.
    """

    microseconds: float
    nic_bytes: float
    link_bytes: float
    bound: str
    logical: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.logical / self.microseconds / 1e3


def throughput(counts: RowCounts, cluster: Cluster, shape: RowShape, *, combine: bool) -> Predicted:
    """A dispatch, or the combine that returns its rows, in two levels; in one inside a domain."""
    if combine:
        crossing, row = shape.crossing_sum_bytes(), shape.returned_bytes()
        nic = np.maximum(counts.hold, counts.cross) * crossing
        link = np.maximum(counts.receive, counts.spread) * row
    else:
        crossing, row = shape.crossing_bytes(cluster.ranks_per_domain), shape.sent_bytes()
        nic = np.maximum(counts.cross, counts.hold) * crossing
        link = np.maximum(counts.spread, counts.receive) * row
    several = len(counts.tokens) > cluster.ranks_per_domain
    logical = float((counts.per_domain if several else counts.per_rank).mean()) * row
    return _predict(nic, link, cluster, THROUGHPUT.second * cluster.link, cluster.start, logical)


def low_latency(
    counts: RowCounts, cluster: Cluster, shape: RowShape, *, combine: bool, design: str = "expert"
) -> Predicted:
    """A low-latency operation.

    design: what crosses: "expert", a row for each top-k entry, as DeepEP V1's; "rank", one for each rank;
    "domain", one for each domain, where gateways spread it. Inside one domain all goes by links.
    """
    row = shape.returned_bytes() if combine else shape.sent_bytes() + 16
    if design == "expert":
        remote = counts.remote_choices
        near = counts.choices - remote - counts.kept_choices
    elif design == "rank":
        remote = counts.remote_ranks
        near = counts.per_rank - remote - counts.kept_ranks
    else:
        remote, near = counts.cross, counts.spread
    constant = LOW_LATENCY.second if combine else LOW_LATENCY.first
    logical = float(counts.choices.mean()) * row
    return _predict(remote * row, near * row, cluster, cluster.link, constant, logical)


def _predict(
    nic: np.ndarray, link: np.ndarray, cluster: Cluster, link_rate: float, constant: float, logical: float
) -> Predicted:
    """The slowest rank's slowest link."""
    by_nic = float(nic.max()) / (THROUGHPUT.first * cluster.nic) / 1e3
    by_link = float(link.max()) / link_rate / 1e3
    return Predicted(
        microseconds=max(by_nic, by_link) + constant,
        nic_bytes=float(nic.max()),
        link_bytes=float(link.max()),
        bound="NIC" if by_nic > by_link else "links",
        logical=logical,
    )
