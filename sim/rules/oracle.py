"""Runs a case through the reference's global view: what all other implementations must give, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deepep.reference import formats, high_throughput, layout, logfmt, low_latency
from deepep.sim.cases.case import Case
from deepep.sim.cases.values import RankInputs, inputs, other_rows
from deepep.sim.rules.observed import (
    Array,
    RankView,
    array,
    bits,
    fill_again,
    fill_combine,
    fill_dispatch,
    fill_layout,
    fill_low_latency,
)

#: What a row that must not be read is filled with: a NaN that no input holds.
POISON = 0x7FA5


@dataclass(frozen=True)
class GlobalView:
    """The modules of the global view: the reference's own, or changed ones."""

    layout: ModuleType = layout
    high_throughput: ModuleType = high_throughput
    low_latency: ModuleType = low_latency
    formats: ModuleType = formats
    logfmt: ModuleType = logfmt


REFERENCE = GlobalView()


def observe(case: Case, modules: GlobalView = REFERENCE, ranks_per_domain: int = 0) -> list[RankView]:
    """Results of each rank, by rank; a masked rank gets nothing from then on.

    ranks_per_domain: those whose rows a low-latency combine sums and rounds first; 0: as the case says.
    """
    given = [inputs(case, rank) for rank in range(case.num_ranks)]
    views = [_layout(case, mine, modules.layout) for mine in given]
    if case.options.mode == "ht":
        _high_throughput(case, given, views, modules.high_throughput)
    else:
        _low_latency(case, given, views, modules.low_latency, ranks_per_domain)
    for rank in case.masked:
        if rank in case.masked_at_dispatch:
            views[rank] = RankView()
        else:
            views[rank].combined_x = views[rank].combined_weights = None
    return views


def _layout(case: Case, mine: RankInputs, rules: ModuleType) -> RankView:
    layout = rules.dispatch_layout(
        mine.topk_idx, case.num_experts, case.num_ranks, ranks_per_node=case.options.ranks_per_node
    )
    view = RankView()
    per_rank, per_expert = layout.num_tokens_per_rank, layout.num_tokens_per_expert
    fill_layout(view, per_rank, layout.num_tokens_per_node, per_expert, layout.is_token_in_rank)
    return view


def worst_tokens(case: Case) -> int:
    """The num_worst_tokens of a case, on all ranks: 0, the most rows any rank gets, or three more."""
    if case.options.worst == "off":
        return 0
    arriving = [
        sum(int(case.is_token_in_rank(s)[:, rank].sum()) for s in case.dispatch_members)
        for rank in case.dispatch_members
    ]
    # Zero would mean that no worst case is given.
    return max(1, max(arriving)) + (3 if case.options.worst == "more" else 0)


def _high_throughput(case: Case, given: list[RankInputs], views: list[RankView], ht: ModuleType) -> None:
    options = case.options
    tables = [torch.from_numpy(_of(view.is_token_in_rank)) for view in views]

    def dispatch(ranks: list[RankInputs], topk: bool) -> list[Any]:
        calls = [
            ht.DispatchInput(
                x=mine.x,
                is_token_in_rank=table,
                scales=mine.scales,
                topk_idx=mine.topk_idx if topk else None,
                topk_weights=mine.topk_weights if topk else None,
                num_tokens_per_expert=torch.from_numpy(_of(view.num_tokens_per_expert)),
            )
            for mine, table, view in zip(ranks, tables, views, strict=True)
        ]
        return list(
            ht.dispatch(
                calls,
                case.num_experts,
                expert_alignment=options.expert_alignment,
                num_worst_tokens=worst_tokens(case),
                masked=case.masked_at_dispatch,
            )
        )

    outputs = dispatch(given, options.topk)
    for view, output in zip(views, outputs, strict=True):
        fill_dispatch(
            view,
            output.recv_x,
            output.recv_scales,
            output.recv_topk_idx,
            output.recv_topk_weights,
            output.num_recv_tokens_per_expert,
            len(output.src_rank),
        )
        view.src_rank, view.src_token = array(output.src_rank), array(output.src_token)
    if options.cached:
        again = [inputs(case, rank, again=True) for rank in range(case.num_ranks)]
        for view, output in zip(views, dispatch(again, topk=False), strict=True):
            fill_again(view, output.recv_x, output.recv_scales, len(output.src_rank))
    rows = [returned_rows(case, rank, output.recv_x) for rank, output in enumerate(outputs)]
    weights = [_tensor(o.recv_topk_weights) for o in outputs] if options.combine_weights else None
    combine(case, views, tables, rows, weights, ht)


def combine(
    case: Case,
    views: list[RankView],
    tables: list[Tensor],
    rows: list[Tensor],
    weights: list[Tensor] | None,
    ht: ModuleType = high_throughput,
) -> None:
    """Fills in what a combine gives. tables, rows, weights: of each rank, token-in-rank, and what returns."""
    combined = ht.combine(
        rows,
        tables,
        topk_weights=weights,
        biases=[inputs(case, rank).biases for rank in range(case.num_ranks)],
        masked=case.masked,
        masked_at_dispatch=case.masked_at_dispatch,
        ranks_per_domain=case.options.ranks_per_node if case.sums_by_domain else None,
    )
    for view, result in zip(views, combined, strict=True):
        fill_combine(view, result.x, result.topk_weights)


def _low_latency(
    case: Case,
    given: list[RankInputs],
    views: list[RankView],
    ll: ModuleType,
    ranks_per_domain: int,
) -> None:
    options = case.options
    reduce = "domain" if ranks_per_domain else "rank" if options.reduce == "rank" else "token"
    between = {"ranks_per_domain": ranks_per_domain} if ranks_per_domain else {}
    layouts = ll.dispatch(
        [mine.tokens for mine in given],
        [mine.topk_idx for mine in given],
        case.num_max_tokens,
        case.num_experts,
        fp8=options.low_latency != "bf16",
        round_scale=options.low_latency in ("fp8+rounded", "fp8+ue8m0"),
        ue8m0=options.low_latency == "fp8+ue8m0",
        masked=case.masked_at_dispatch,
    )
    for view, output in zip(views, layouts, strict=True):
        fill_low_latency(
            view,
            output.recv_x,
            output.recv_scales,
            output.recv_count,
            output.recv_src_info,
            output.layout_range,
        )
        if options.stats:
            view.stats = array(output.recv_count)
    combined = ll.combine(
        [expert_rows(case, rank, output.recv_x, output.recv_count) for rank, output in enumerate(layouts)],
        [mine.topk_idx for mine in given],
        [mine.topk_weights for mine in given],
        layouts,
        num_max_tokens=case.num_max_tokens,
        num_experts=case.num_experts,
        logfmt=options.logfmt,
        reduce=reduce,
        masked=case.masked,
        **between,
    )
    for view, result in zip(views, combined, strict=True):
        view.combined_x = bits(result)


def returned_rows(case: Case, rank: int, recv_x: Tensor) -> Tensor:
    """Rows that `rank` hands to a high-throughput combine: the rows it received, or others."""
    if case.options.combine_rows == "same":
        return recv_x
    return other_rows(case, rank, len(recv_x)).to(recv_x.device)


def expert_rows(case: Case, rank: int, recv_x: Tensor, recv_count: Tensor) -> Tensor:
    """[L, R*M, H] bf16: what `rank` hands to a low-latency combine: the rows it received, or others.

    Rows past the counts are poisoned.
    """
    room = case.num_ranks * case.num_max_tokens
    shape = (len(recv_count), room, case.hidden)
    rows = torch.full(shape, POISON, dtype=torch.int16, device=recv_x.device).view(torch.bfloat16)
    counts = recv_count.tolist()
    filled = other_rows(case, rank, sum(counts)).to(recv_x.device).split(counts)
    for expert, (count, others) in enumerate(zip(counts, filled, strict=True)):
        rows[expert, :count] = recv_x[expert, :count] if case.options.combine_rows == "same" else others
    return rows


def _of(array: Array | None) -> Array:
    assert array is not None
    return array


def _tensor(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
