"""Published figures of DeepEP beside what the model says of their designs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from deepep.sim.cost.loads import RowCounts, count_rows, uniform_routing
from deepep.sim.cost.model import H100, H800, Cluster, Predicted, RowShape, low_latency, throughput

EXPERTS, TOPK, HIDDEN = 256, 8, 7168
#: How far a row may be off that does not say why.
TOLERANCE = 0.10


@dataclass(frozen=True)
class PublishedRow:
    """A line of a published table: (dispatch, combine) in GB/s, or in microseconds for low latency.

    groups: as many groups of experts as domains, of which a token keeps so many; 0: no groups.
    reason: why the model may be further off.
    """

    name: str
    cluster: Cluster
    num_ranks: int
    tokens: int
    figures: tuple[float, float]
    latency: bool = False
    groups: int = 0
    fp8: bool = True
    reason: tuple[str, str] = ("", "")


_LINKS = "bound by links, where V1 copies each row three times (inferred)"
V1 = [
    PublishedRow("V1 EP8", H800, 8, 4096, (153, 158)),
    PublishedRow("V1 EP16", H800, 16, 4096, (43, 43), groups=4, reason=(_LINKS, _LINKS)),
    PublishedRow("V1 EP32", H800, 32, 4096, (58, 57), groups=4),
    PublishedRow("V1 EP64", H800, 64, 4096, (51, 50), groups=4),
]
V2 = [
    PublishedRow(
        "V2 EP8x2", H100, 16, 8192, (90, 81), reason=("", "V2 reduces in a kernel behind the rows (inferred)")
    ),
    PublishedRow("V2 EP8x4", H100, 32, 8192, (61, 61)),
]
LOW_LATENCY_V1 = [
    PublishedRow("V1 LL EP8", H800, 8, 128, (77, 114), latency=True),
    PublishedRow("V1 LL EP16", H800, 16, 128, (118, 195), latency=True),
    PublishedRow("V1 LL EP32", H800, 32, 128, (155, 273), latency=True),
    PublishedRow("V1 LL EP64", H800, 64, 128, (173, 314), latency=True),
    PublishedRow("V1 LL EP128", H800, 128, 128, (192, 369), latency=True),
    PublishedRow("V1 LL EP256", H800, 256, 128, (194, 360), latency=True),
]
ROWS = (*V1, *V2, *LOW_LATENCY_V1)


@lru_cache
def counts_of(row: PublishedRow) -> RowCounts:
    """Mean counts of a rank, for balanced routing: as many tokens as the row says."""
    domains = -(-row.num_ranks // row.cluster.ranks_per_domain)
    grouped = {"num_groups": domains, "kept_groups": min(row.groups, domains)} if row.groups else {}
    routing = uniform_routing(row.num_ranks, EXPERTS, TOPK, **grouped)
    counts = count_rows(routing, EXPERTS, row.cluster.ranks_per_domain)
    level = {name: np.full(row.num_ranks, value.mean()) for name, value in vars(counts).items()}
    return replace(counts, **level).scaled(row.tokens / len(routing[0]))


def predict_row(row: PublishedRow, *, combine: bool) -> Predicted:
    """The model of the published design: V1's and V2's throughput mode, V1's low latency."""
    shape, model = RowShape(HIDDEN, TOPK, row.fp8), low_latency if row.latency else throughput
    return model(counts_of(row), row.cluster, shape, combine=combine)


def compare(row: PublishedRow) -> list[tuple[float, float, str]]:
    """(published, model, reason) of dispatch and combine."""
    found = []
    for place, combine in enumerate((False, True)):
        made = predict_row(row, combine=combine)
        value = made.microseconds if row.latency else made.gigabytes_per_second
        found.append((row.figures[place], value, row.reason[place]))
    return found
