"""Sums by domain against single floats, and what a two-hop exchange may leave out.

That the two hops deliver what one does, and that bytes cross once, is for tests/sim/rules/test_crossings.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepep.reference.high_throughput import combine

SameBits = Callable[[Tensor, Tensor], bool]


def rounded(value: float) -> float:
    """A float32 to bfloat16 and back, in integers."""
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32))


# 1 + 2^-8 is half-way between two bfloat16 numbers: what is rounded, and where, shows in sums of such.
TERMS = [2**-8, 2**-9, 3 * 2**-8, 1.0, 2**-9, 2**-9]


def sums(
    terms: list[float], ranks_per_domain: int | None, bias: float | None = None, owner: int = 0
) -> float:
    """The sum for a token of `owner` that goes to every rank, each of which returns one of `terms`."""
    num_ranks = len(terms)
    tables = [torch.zeros(int(rank == owner), num_ranks, dtype=torch.bool) for rank in range(num_ranks)]
    tables[owner][:] = True
    rows = [torch.tensor([[term]]).bfloat16() for term in terms]
    biases: Any = None
    if bias is not None:
        biases = [(torch.tensor([[bias]]).bfloat16(),) if r == owner else () for r in range(num_ranks)]
    return float(combine(rows, tables, biases=biases, ranks_per_domain=ranks_per_domain)[owner].x[0, 0])


@pytest.mark.parametrize("owner", range(6))
@pytest.mark.parametrize("ranks_per_domain", [1, 2, 3, 4, 5])
def test_each_domain_rounds_its_own_sum(ranks_per_domain: int, owner: int) -> None:
    total = np.float32(2**-9)
    for first in range(0, len(TERMS), ranks_per_domain):
        domain = np.float32(0)
        for term in TERMS[first : first + ranks_per_domain]:
            domain += np.float32(term)
        total += np.float32(rounded(float(domain)))
    assert sums(TERMS, ranks_per_domain, bias=2**-9, owner=owner) == rounded(float(total))


def test_where_the_rounding_happens_shows() -> None:
    assert len({sums(TERMS, size, bias=2**-9) for size in (None, 2, 3)}) == 3


@pytest.mark.parametrize("ranks_per_domain", [6, 7, 64])
def test_one_domain_is_summed_as_ever(ranks_per_domain: int) -> None:
    assert sums(TERMS, ranks_per_domain, bias=2**-8) == sums(TERMS, None, bias=2**-8)


def test_a_lone_row_crosses_unchanged(same_bits: SameBits) -> None:
    table = torch.tensor([[False, False, False, True]])
    row = torch.tensor([[-0.0, float("-inf"), 2**-133]]).bfloat16()
    rows = [row.new_empty(0, 3)] * 3 + [row]
    tables = [table, *[table.new_empty(0, 4)] * 3]
    assert same_bits(combine(rows, tables, ranks_per_domain=2)[0].x, row)


def test_wide_rows_are_grouped_and_not_rounded() -> None:
    terms = [1e8, 1.0, -1e8, 1.0]
    tables = [torch.ones(1, 4, dtype=torch.bool), *[torch.ones(0, 4, dtype=torch.bool)] * 3]
    rows = [torch.tensor([[term]]) for term in terms]
    assert combine(rows, tables, ranks_per_domain=2)[0].x.item() == 0.0  # (1e8 + 1) + (-1e8 + 1)
    assert combine(rows, tables)[0].x.item() == 1.0


def test_no_rank_is_no_domain() -> None:
    with pytest.raises(ValueError, match="ranks_per_domain: got 0"):
        sums(TERMS, 0)
