"""Combines of expanded rows on virtual ranks: a row's entries are summed while they are read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from deepep.reference import high_throughput as oracle
from deepep.sim.explore.expanded_rows import EntryRows, summed

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Shape:
    """tokens: of each rank; each goes to every rank with the same probability."""

    tokens: tuple[int, ...]
    hidden: int = 1024
    topk: int = 8
    num_sms: int = 0
    weighted: bool = False
    returns_weights: bool = True
    biases: int = 0
    share: float = 0.8


SHAPES = [
    Shape((96, 96), num_sms=24),
    Shape((700, 650), hidden=7168, num_sms=24, weighted=True),
    Shape((700, 650), hidden=7168, num_sms=64),
    Shape((1500, 900), hidden=512, num_sms=12, biases=2),
    Shape((1200, 1200), hidden=264, num_sms=20, weighted=True, topk=3),
    Shape((40, 0, 600), hidden=136, topk=32, returns_weights=False),
    Shape((128,) * 8, hidden=2048, weighted=True, biases=1),
    Shape((600,) * 8, hidden=256, share=0.4),
    Shape((333,), hidden=768, share=1.0),
    Shape((50, 60), share=0.0),
]


def draw(num_rows: int, shape: Shape, seed: int) -> EntryRows:
    """Three in five entries have a row, at a place of its own among more; those of no entry are NaN."""
    generator = torch.Generator().manual_seed(seed)
    room = num_rows * shape.topk
    place = torch.randperm(room + 3, generator=generator)[:room].view(num_rows, shape.topk)
    slots = torch.where(torch.rand(place.shape, generator=generator) < 0.4, -1, place)
    x = torch.full((room + 3, shape.hidden), torch.nan, dtype=torch.bfloat16)
    used = slots[slots >= 0]
    x[used] = torch.randn(len(used), shape.hidden, generator=generator).bfloat16()
    weights = torch.rand(room + 3, generator=generator)
    factors = torch.randn(place.shape, generator=generator) if shape.weighted else None
    return EntryRows(x=x, weights=weights, slots=slots, factors=factors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entries_are_summed_as_they_are_read(shape: Shape) -> None:
    from harness.virtual_ranks import RankInputs, VirtualDomain

    ranks = len(shape.tokens)
    domain = VirtualDomain(ranks, num_sms=shape.num_sms)
    generator = torch.Generator().manual_seed(5)
    tables = [torch.rand(tokens, ranks, generator=generator) < shape.share for tokens in shape.tokens]
    inputs = [
        RankInputs(
            x=torch.zeros(len(table), shape.hidden, dtype=torch.bfloat16, device="cuda"),
            is_token_in_rank=table.cuda(),
            tokens_per_rank=table.sum(0).to(torch.int32).cuda(),
            tokens_per_expert=table.sum(0).to(torch.int32).cuda(),
        )
        for table in tables
    ]
    plans = [a.plan for a in domain.dispatch(inputs, capacity=sum(shape.tokens), num_experts=ranks)]
    rows = [draw(plan.num_rows, shape, seed) for seed, plan in enumerate(plans)]
    biases = [
        tuple(torch.randn(t, shape.hidden, generator=generator).bfloat16() for _ in range(shape.biases))
        for t in shape.tokens
    ]
    sums = [summed(each) for each in rows]
    want = oracle.combine(
        [x for x, _ in sums],
        tables,
        topk_weights=[weights for _, weights in sums] if shape.returns_weights else None,
        biases=biases,
    )
    for _ in range(2):
        got = domain.combine(
            [each.x.cuda() for each in rows],
            plans,
            hidden=shape.hidden,
            topk_weights=[each.weights.cuda() for each in rows] if shape.returns_weights else None,
            biases=[tuple(bias.cuda() for bias in pair) for pair in biases],
            slots=[each.slots.cuda() for each in rows],
            factors=[each.factors.cuda() for each in rows if each.factors is not None] or None,
        )
        for (x, weights), expected in zip(got, want, strict=True):
            assert torch.equal(x.cpu().view(torch.int16), expected.x.view(torch.int16))
            if shape.returns_weights:
                assert weights is not None
                assert torch.equal(weights.cpu(), expected.topk_weights)
