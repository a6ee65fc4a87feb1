"""Expanded rows that a combine sums: drawn for received rows, and what has to come of them.

Shapes: N rows received, K top-k, X expanded rows, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepep.reference.numerics import round_to
from deepep.sim.cases.case import Case
from deepep.sim.cases.values import other_rows
from deepep.sim.rules import oracle
from deepep.sim.rules.observed import RankView


@dataclass(frozen=True)
class EntryRows:
    """x [X, H] bf16, weights [X] float32; slots [N, K] int64: an entry's row, -1 for none; factors [N, K]
    float32 of each entry's row, or None.
    """

    x: Tensor
    weights: Tensor
    slots: Tensor
    factors: Tensor | None


def draw(case: Case, rank: int, num_rows: int, *, weighted: bool) -> EntryRows:
    """Of a rank that receives so many rows: some of their entries have rows, in any order, with gaps."""
    generator = torch.Generator().manual_seed(case.seed * 64 + rank)
    num_topk = max(1, case.num_topk)
    room = num_rows * num_topk
    place = torch.randperm(room + 2, generator=generator)[:room].view(num_rows, num_topk)
    has_none = torch.rand(num_rows, num_topk, generator=generator) < 0.4
    drawn = torch.randn(num_rows, num_topk, generator=generator)
    return EntryRows(
        x=other_rows(case, rank, room + 2, "expanded rows"),
        weights=torch.randn(room + 2, generator=generator),
        slots=torch.where(has_none, -1, place),
        factors=drawn if weighted else None,
    )


def summed(rows: EntryRows) -> tuple[Tensor, Tensor]:
    """x [N, H] bf16 and weights [N, K] float32: the received rows that these are a combine of.

    Each entry's row, times its factor in bf16 and rounded, is added in float32, k ascending; rounded once.
    """
    total = torch.zeros(len(rows.slots), rows.x.shape[1])
    for k, slots in enumerate(rows.slots.unbind(1)):
        term = rows.x[slots.clamp(min=0)]
        if rows.factors is not None:
            term = term * rows.factors[:, k : k + 1].bfloat16()
        total = torch.where((slots >= 0).unsqueeze(1), total + term.float(), total)
    weights = torch.where(rows.slots >= 0, rows.weights[rows.slots.clamp(min=0)], 0.0)
    return round_to(total, torch.bfloat16), weights


def expect(case: Case, views: list[RankView], *, weighted: bool) -> None:
    """Fills in what ranks get of a combine of `draw`'s rows; views are those of the oracle."""
    made = []
    for rank, view in enumerate(views):
        num_rows = 0 if view.recv_x is None else len(view.recv_x)
        made.append(summed(draw(case, rank, num_rows, weighted=weighted)))
    tables = [torch.from_numpy(case.is_token_in_rank(rank)) for rank in range(case.num_ranks)]
    weights = [weights for _, weights in made] if case.options.combine_weights else None
    oracle.combine(case, views, tables, [rows for rows, _ in made], weights)
    for rank in case.masked:
        views[rank].combined_x = views[rank].combined_weights = None
