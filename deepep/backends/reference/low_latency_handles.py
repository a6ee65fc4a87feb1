"""Checks of a low-latency combine against its dispatch: a handle's own values, and then, between the ranks,
that the rows which return are those that the top-k indices ask for.

A handle is a tuple that clients may take apart, and both calls are given top-k indices: nothing else says
that they belong together. Without this a token would get another's row, or the ranks would wait for rows
that nobody sends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.errors import ArgumentError, HandleError
from deepep.runtime.control.transport import Link
from deepep.runtime.requests import LowLatencyRoute

_FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)
"""Odd, of 64 bits: what a well-known mixer (SplitMix64) multiplies by."""


def check_handle(route: LowLatencyRoute) -> None:
    """The handle is one that a dispatch could have made: ranges without gaps, tokens ascending in each."""
    begin, count = route.ranges >> 32, route.ranges & 0xFFFFFFFF  # [L, R]
    most = route.num_max_tokens
    if (count > most).any() or not torch.equal(begin, count.cumsum(1) - count):
        raise HandleError(
            "handle[1]", "ranges that overlap, have gaps or are too long", "those of a dispatch"
        )
    room = torch.arange(route.source_index.shape[1], device=begin.device)
    filled = room < count.sum(1, keepdim=True)  # [L, R*M]
    token = route.source_index
    if (token[~filled] >= 0).any():
        raise HandleError("handle[1]", "ranges that leave out rows", "a dispatch's")
    first = torch.zeros_like(filled)
    first.scatter_(1, begin.clamp(max=room.numel() - 1), True)
    ascending = first[:, 1:] | (token[:, 1:] > token[:, :-1])
    if ((token < 0) | (token >= most))[filled].any() or not ascending[filled[:, 1:]].all():
        raise HandleError("handle[0]", "source tokens of no dispatch", f"ascending ones below {most}")


def check_rows(link: Link, topk_idx: Tensor, route: LowLatencyRoute, num_ranks: int) -> None:
    """Every rank holds the rows that the others' top-k indices ask for, and no more. Collective.

    Raises ArgumentError, the same on all ranks, for the lowest rank for which it is not so.
    """
    num_local = route.num_experts // num_ranks
    asked = torch.zeros(topk_idx.shape[0], route.num_experts + 1, dtype=torch.bool, device=topk_idx.device)
    asked.scatter_(1, topk_idx.long() % (route.num_experts + 1), True)  # -1: the last column
    token, expert = asked[:, :-1].nonzero(as_tuple=True)
    mine = _digests(expert // num_local, expert % num_local, token, route.num_max_tokens, num_ranks)

    count = route.ranges & 0xFFFFFFFF  # [L, R]
    sources = torch.arange(num_ranks, device=count.device).repeat(num_local)
    source = sources.repeat_interleave(count.flatten())
    experts = torch.arange(num_local, device=count.device).repeat_interleave(count.sum(1))
    room = torch.arange(route.source_index.shape[1], device=count.device)
    tokens = route.source_index[room < count.sum(1, keepdim=True)].long()
    held = _digests(source, experts, tokens, route.num_max_tokens, num_ranks)

    everyone = link.all_gather(torch.stack([mine, held]))
    both = {member: digests.tolist() for member, digests in everyone.items()}
    for owner in link.members:
        for other in link.members:
            if both[owner][0][other] != both[other][1][owner]:
                got = f"experts of rank {other} that its handle has no rows of, or not those"
                raise ArgumentError("topk_idx", got, "the top-k indices of the dispatch", owner)


def _digests(rank: Tensor, expert: Tensor, token: Tensor, most: int, num_ranks: int) -> Tensor:
    """[R] int64: of each rank's set of pairs of an expert there and a token."""
    value = expert * most + token + 1
    for factor in _FACTORS:
        value = value * factor
        value = value ^ (value >> 31)
    return torch.zeros(num_ranks, dtype=torch.int64, device=rank.device).index_add_(0, rank, value)
