"""A low-latency combine has to fit its dispatch: other top-k indices, edited handles are refused by all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.rank_threads import Ranks, raised

import deepep
from deepep.errors import ArgumentError

RANKS, EXPERTS, TOKENS, MOST = 3, 6, 4, 5
Change = Callable[[Any], Any]


def at(tensor: torch.Tensor, *index: int, value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def exchanged(tensor: torch.Tensor) -> torch.Tensor:
    """The first two source tokens of the first expert change places."""
    changed = tensor.clone()
    changed[0, :2] = tensor[0, :2].flip(0)
    return changed


TOPK: dict[str, Change] = {
    "exchanged rows": lambda idx: idx.flip(0).contiguous(),
    "one entry dropped": lambda idx: at(idx, 0, 0, value=-1),
    "another expert": lambda idx: at(idx, 0, 0, value=(int(idx[0, 0]) + 3) % EXPERTS),
    "fewer tokens": lambda idx: idx[:-1].contiguous(),
}
HANDLES: dict[str, Change] = {
    "a token out of range": lambda h: (torch.full_like(h[0], 99999), *h[1:]),
    "a negative token": lambda h: (torch.full_like(h[0], -5), *h[1:]),
    "exchanged tokens": lambda h: (exchanged(h[0]), *h[1:]),
    "no ranges": lambda h: (h[0], torch.zeros_like(h[1]), *h[2:]),
    "too long a range": lambda h: (h[0], h[1] + 1, *h[2:]),
}


@pytest.mark.parametrize("reduction", ["exact", "expert_rank"])
@pytest.mark.parametrize("everyone", [False, True])
def test_what_does_not_fit_is_refused_by_all(everyone: bool, reduction: str) -> None:
    ranks = Ranks(RANKS)
    changes = [*((name, change, None) for name, change in TOPK.items())]
    changes += [*((name, None, change) for name, change in HANDLES.items())]

    def part(rank: int) -> list[BaseException | None]:
        buffer = deepep.Buffer(ranks.groups[rank], low_latency_mode=True, timeout=60.0, reduction=reduction)
        made = torch.Generator().manual_seed(rank)
        x = torch.randn(TOKENS, 128, generator=made).bfloat16()
        # Experts 0 and 1 get two tokens of every rank; the rest differs by rank.
        idx = torch.tensor([[0, 1], [0, 1], [2, 5], [3, 4]]).roll(rank, 1).contiguous()
        weights = torch.rand(TOKENS, 2, generator=made)
        found = []
        for _, topk, edit in changes:
            rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, use_fp8=False)
            right = buffer.low_latency_combine(rows, idx, weights, handle)[0]
            other, edited = idx, handle
            if everyone or rank == 0:
                other, edited = topk(idx) if topk else idx, edit(handle) if edit else handle

            def combine(other: Any = other, edited: Any = edited, rows: Any = rows) -> None:
                buffer.low_latency_combine(rows, other, weights[: len(other)], edited)

            found.append(raised(combine))
            again = buffer.low_latency_combine(rows, idx, weights, tuple(handle))[0]
            assert torch.equal(again, right)
        buffer.destroy()
        return found

    for (name, topk, _), *errors in zip(changes, *ranks.run(part), strict=True):
        assert {str(error) for error in errors} == {str(errors[0])}, name
        assert isinstance(errors[0], ArgumentError), (name, errors[0])
        assert ("topk_idx" if topk else "handle") in errors[0].argument, (name, errors[0])
