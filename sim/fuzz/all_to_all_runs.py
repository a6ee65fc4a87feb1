"""Runs a case through the reference's all_to_all implementation; what one rank does."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deepep.sim.cases.case import Case
from deepep.sim.cases.values import RankInputs, inputs
from deepep.sim.rules.observed import (
    RankView,
    array,
    fill_again,
    fill_combine,
    fill_dispatch,
    fill_layout,
    fill_low_latency,
)
from deepep.sim.rules.oracle import expert_rows, returned_rows, worst_tokens
from deepep.sim.worlds.rank_process import RankContext

#: Delays of skewed examples: long enough for any other rank to overtake on loopback, short enough to fuzz.
LONGEST_DELAY = 0.002


@dataclass(frozen=True)
class Implementation:
    """The modules of the all_to_all implementation: the reference's own, or changed ones."""

    wire: ModuleType
    layout: ModuleType
    high_throughput: ModuleType
    low_latency: ModuleType
    two_level: ModuleType


def reference_implementation() -> Implementation:
    """The implementation as it is installed."""
    from deepep.reference import all_to_all, all_to_all_low_latency, layout, two_level, wire

    return Implementation(wire, layout, all_to_all, all_to_all_low_latency, two_level)


def run_all_to_all(ctx: RankContext, case: Case, implementation: Implementation | None = None) -> RankView:
    """One rank's part of a case, on the ranks that are not masked. Collective over all ranks of the world."""
    modules = implementation or reference_implementation()
    groups = [group_of_members(ctx, ranks) for ranks in (case.dispatch_members, case.members)]
    if ctx.rank in case.masked_at_dispatch:
        return RankView()
    view = RankView()
    wires = Wires(
        modules.wire.Wire(groups[0], ctx.rank, case.num_ranks, case.dispatch_members),
        None
        if ctx.rank in case.masked
        else modules.wire.Wire(groups[1], ctx.rank, case.num_ranks, case.members),
    )
    mine = inputs(case, ctx.rank).to(ctx.device)
    layout = modules.layout.dispatch_layout(
        mine.topk_idx, case.num_experts, case.num_ranks, ranks_per_node=case.options.ranks_per_node
    )
    per_rank, per_expert = layout.num_tokens_per_rank, layout.num_tokens_per_expert
    fill_layout(view, per_rank, layout.num_tokens_per_node, per_expert, layout.is_token_in_rank)
    if case.options.mode == "ht":
        _high_throughput(case, mine, layout, wires, modules, view)
    else:
        _low_latency(case, mine, wires, modules.low_latency, view)
    return view


@dataclass(frozen=True)
class Wires:
    """A rank's wire of each operation; none for a combine that it is masked in."""

    dispatch: Any
    combine: Any


class CountingWire:
    """A reference's wire that counts the bytes of rows that leave this rank's domain."""

    def __init__(self, wire: Any, case: Case) -> None:
        self._wire, self._domains = wire, case.domains
        self.crossed = np.zeros(len(case.domains), dtype=np.int64)  # [D]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)

    def all_to_all_rows(self, rows: torch.Tensor, send_counts: Any, recv_counts: Any) -> torch.Tensor:
        """Rows of `rows` [S, ...] to each rank, as the wire sends them."""
        width = math.prod(rows.shape[1:]) * rows.element_size()
        for place, domain in enumerate(self._domains):
            if self._wire.rank not in domain:
                self.crossed[place] += width * sum(send_counts[rank] for rank in domain)
        received: torch.Tensor = self._wire.all_to_all_rows(rows, send_counts, recv_counts)
        return received


def group_of_members(ctx: RankContext, members: tuple[int, ...]) -> Any:
    """The process group of some of the world's ranks; made once. Collective over all ranks of the world."""
    if len(members) == ctx.num_ranks:
        return ctx.group
    groups = ctx.scratch.setdefault("groups", {})
    if members not in groups:
        groups[members] = dist.new_group(list(members))
    return groups[members]


def pause(case: Case, rank: int, step: int) -> None:
    """Delays a rank before a step of the example, as the case's skew says."""
    rng = np.random.default_rng((case.seed, step))
    late = int(rng.integers(case.num_ranks))
    delays = rng.random(case.num_ranks) * LONGEST_DELAY
    if case.options.skew == "all" or (case.options.skew == "one" and rank == late):
        time.sleep(delays[rank])


def _high_throughput(
    case: Case, mine: RankInputs, layout: Any, wires: Wires, modules: Implementation, view: RankView
) -> None:
    ht: Any = modules.high_throughput
    wire = wires.dispatch
    if case.sums_by_domain:
        exchange = modules.two_level.TwoLevelExchange(case.options.ranks_per_node)
        wire = CountingWire(wire, case)
    else:
        exchange = ht
    options, rank = case.options, wire.rank
    pause(case, rank, 0)
    plan = exchange.exchange_counts(wire, layout.is_token_in_rank, layout.num_tokens_per_expert)
    received = plan.num_recv_tokens
    topk = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights} if options.topk else {}
    worst = worst_tokens(case)
    out = ht.allocate(plan, mine.x, scales=mine.scales, **topk, num_worst_tokens=worst)
    pause(case, rank, 1)
    got = exchange.dispatch(
        wire, plan, mine.x, scales=mine.scales, **topk, num_experts=case.num_experts, out=out
    )
    if case.sums_by_domain:
        view.dispatch_crossing = wire.crossed.copy()
    alignment = options.expert_alignment
    counts = [] if worst else [-(-n // alignment) * alignment for n in plan.num_recv_tokens_per_expert]
    fill_dispatch(view, got.x, got.scales, got.topk_idx, got.topk_weights, counts, received)
    view.src_rank, view.src_token = array(plan.src_rank), array(plan.src_token)
    pause(case, rank, 2)
    if options.cached:
        second = inputs(case, rank, again=True).to(mine.x.device)
        again = exchange.dispatch(wire, plan, second.x, scales=second.scales)
        fill_again(view, again.x, again.scales, received)
    if wires.combine is None:
        return
    back = CountingWire(wires.combine, case) if case.sums_by_domain else wires.combine
    combined = exchange.combine(
        back,
        plan,
        returned_rows(case, rank, got.x),
        topk_weights=got.topk_weights if options.combine_weights else None,
        biases=mine.biases,
    )
    fill_combine(view, combined.x, combined.topk_weights)
    if case.sums_by_domain:
        view.combine_crossing = back.crossed


def _low_latency(case: Case, mine: RankInputs, wires: Wires, ll: ModuleType, view: RankView) -> None:
    wire = wires.dispatch
    options, rank = case.options, wire.rank
    sizes = {"num_max_tokens": case.num_max_tokens, "num_experts": case.num_experts}
    pause(case, rank, 0)
    underway = ll.start_dispatch(
        wire,
        mine.tokens,
        mine.topk_idx,
        **sizes,
        fp8=options.low_latency != "bf16",
        round_scale=options.low_latency in ("fp8+rounded", "fp8+ue8m0"),
        ue8m0=options.low_latency == "fp8+ue8m0",
    )
    pause(case, rank, 1)
    got = underway.finish()
    fill_low_latency(view, got.recv_x, got.recv_scales, got.recv_count, got.recv_src_info, got.layout_range)
    if options.stats:
        view.stats = array(got.recv_count)
    pause(case, rank, 2)
    if wires.combine is None:
        return
    sent = ll.start_combine(
        wires.combine,
        expert_rows(case, rank, got.recv_x, got.recv_count),
        mine.topk_idx,
        mine.topk_weights,
        got.recv_src_info,
        got.layout_range,
        **sizes,
        logfmt=options.logfmt,
        reduce=options.reduce,
    )
    pause(case, rank, 3)
    out = torch.empty_like(mine.tokens) if options.given_out else None
    fill_combine(view, sent.finish(out), None)
