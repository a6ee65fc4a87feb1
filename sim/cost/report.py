"""Tables and a picture of what the model predicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepep.sim.cost.loads import RowCounts, count_rows, uniform_routing
from deepep.sim.cost.model import Cluster, Predicted, RowShape, low_latency, throughput
from deepep.sim.cost.picture import Curves, draw
from deepep.sim.cost.published import ROWS, TOLERANCE, compare

LOW_LATENCY_TOKENS = 128
_HEAD = f"{'':38} {'us':>9} {'NIC MB':>8} {'link MB':>8}  bound by"


@dataclass(frozen=True)
class Gate:
    """E, K, and the groups of experts that a token is limited to: `kept` of `groups`."""

    experts: int
    topk: int
    groups: int = 1
    kept: int = 1


def balanced(gate: Gate, ranks: int, cluster: Cluster) -> RowCounts:
    """Counts of every rank for one token of each, balanced routing: the mean of a sample.

    Raises ValueError for shapes that do not divide.
    """
    if not 1 <= gate.topk <= gate.experts or gate.experts % gate.groups or not 1 <= gate.kept <= gate.groups:
        got = ", ".join(map(str, (gate.experts, gate.topk, gate.groups, gate.kept)))
        raise ValueError(f"experts, topk, groups, kept: got {got}; allowed: whole groups, K up to E")
    if ranks < 1 or gate.experts % ranks:
        raise ValueError(f"ranks: got {ranks}; allowed: divisors of the {gate.experts} experts")
    routing = uniform_routing(ranks, gate.experts, gate.topk, num_groups=gate.groups, kept_groups=gate.kept)
    counts = count_rows(routing, gate.experts, cluster.ranks_per_domain)
    level = {name: np.full(ranks, value.mean()) for name, value in vars(counts).items()}
    return RowCounts(**level).scaled(1 / len(routing[0]))


def uniform_table(gate: Gate, ranks: int, tokens: int, cluster: Cluster, shape: RowShape) -> str:
    """Throughput for `tokens`, low latency for 128 tokens a rank. Raises ValueError for fewer than none."""
    if tokens < 0:
        raise ValueError(f"tokens: got {tokens}; allowed: at least 0")
    token = balanced(gate, ranks, cluster)
    many, few = token.scaled(tokens), token.scaled(LOW_LATENCY_TOKENS)
    lines = [_HEAD]
    for combine in (False, True):
        name = "combine" if combine else "dispatch"
        lines.append(_line(f"{name}, {tokens} tokens", throughput(many, cluster, shape, combine=combine)))
    several = ranks > cluster.ranks_per_domain
    for design in ("expert", "rank", "domain") if several else ("expert", "rank"):
        for combine in (False, True):
            name = f"low-latency {'combine' if combine else 'dispatch'}, a row a {design}"
            lines.append(_line(name, low_latency(few, cluster, shape, combine=combine, design=design)))
    return "\n".join(lines)


def trace_table(path: Path, ranks: int, cluster: Cluster, shape: RowShape) -> str:
    """Mean and slowest of a trace's batches, each dealt to `ranks` ranks; the slowest rank counts."""
    from deepep.trace import RoutingTrace

    trace = RoutingTrace.load(path)
    times: dict[str, list[float]] = {"dispatch": [], "combine": []}
    for batch in trace:
        indices = [idx.numpy() for idx in batch.reshard(ranks).topk_idx]
        counts = count_rows(indices, trace.num_experts, cluster.ranks_per_domain)
        for name, found in times.items():
            made = throughput(counts, cluster, shape, combine=name == "combine")
            found.append(made.microseconds)
    lines = [f"{len(times['dispatch'])} batches of {path}: mean and slowest, us"]
    lines += [f"{name:9} {np.mean(found):9.1f} {np.max(found):9.1f}" for name, found in times.items()]
    return "\n".join(lines)


def published_table() -> str:
    """DeepEP's figures, the model's, and the reason where they are further apart than a tenth."""
    lines = [f"{'':12} {'':8} {'unit':5} {'published':>9} {'model':>7} {'off':>6}"]
    for row in ROWS:
        for name, (figure, value, reason) in zip(("dispatch", "combine"), compare(row), strict=True):
            off = value / figure - 1
            why = f"  {reason}" if abs(off) > TOLERANCE else ""
            unit = "us" if row.latency else "GB/s"
            lines.append(f"{row.name:12} {name:8} {unit:5} {figure:9.0f} {value:7.1f} {off:+6.1%}{why}")
    return "\n".join(lines)


def draw_by_ranks(gate: Gate, tokens: int, cluster: Cluster, shape: RowShape, path: Path) -> None:
    """Times for 8 to 256 ranks, as far as the experts divide among them."""
    whole = [r for r in (8, 16, 32, 64, 128, 256) if gate.experts % r == 0]
    sizes = [r for r in whole if r % min(r, cluster.ranks_per_domain) == 0]
    token = {r: balanced(gate, r, cluster) for r in sizes}
    many = {r: token[r].scaled(tokens) for r in sizes}
    few = {r: token[r].scaled(LOW_LATENCY_TOKENS) for r in sizes}
    rate: Curves = {
        name: [(r, throughput(many[r], cluster, shape, combine=combine).microseconds) for r in sizes]
        for name, combine in (("dispatch", False), ("combine", True))
    }
    latency: Curves = {
        f"{name}, a row a {design}": [
            (r, low_latency(few[r], cluster, shape, combine=combine, design=design).microseconds)
            for r in sizes
        ]
        for design in ("expert", "domain")
        for name, combine in (("dispatch", False), ("combine", True))
    }
    draw({f"throughput, {tokens} tokens": rate, f"low latency, {LOW_LATENCY_TOKENS} tokens": latency}, path)


def _line(name: str, made: Predicted) -> str:
    return (
        f"{name:38} {made.microseconds:9.1f} {made.nic_bytes / 1e6:8.1f} {made.link_bytes / 1e6:8.1f}  "
        f"{made.bound}"
    )
