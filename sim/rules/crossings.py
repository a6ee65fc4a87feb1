"""Crossings from one scale-up domain to another: a token once, and once the sum that a domain makes of it."""

from __future__ import annotations

import numpy as np

from deepep.sim.cases.case import Case
from deepep.sim.cases.values import inputs
from deepep.sim.rules.checking import Property, Violation
from deepep.sim.rules.observed import Array, RankView


def crossing_tokens(case: Case, masked_out: bool) -> Array:
    """[R, D]: tokens of each rank that go to a rank of each domain; masked_out: to a rank that combines."""
    counts = np.zeros((case.num_ranks, len(case.domains)), dtype=np.int64)
    members = case.members if masked_out else case.dispatch_members
    for source in members:
        for choices in case.topk_idx[source].tolist():
            going_to = {e // case.num_local_experts for e in choices if e >= 0} & set(members)
            counts[source] += [not going_to.isdisjoint(domain) for domain in case.domains]
    return counts


def a_token_crosses_once(case: Case, views: list[RankView]) -> None:
    """The bytes that a dispatch sends to another domain are those of each token that goes there, once.

    With each travels which of the domain's ranks it is for, a byte a rank.
    """
    counts = crossing_tokens(case, masked_out=False)
    width = case.options.ranks_per_node
    for rank in case.dispatch_members:
        given = inputs(case, rank)
        record = given.x.shape[1] * given.x.element_size() + 4 + width
        record += 0 if given.scales is None else 4 * given.scales.shape[1]
        if case.options.topk:
            record += case.num_topk * (given.topk_idx.element_size() + 4)
        expected = counts[rank] * record
        expected[rank // width] = 0
        got = views[rank].dispatch_crossing
        if got is not None and not np.array_equal(expected, got):
            raise Violation(f"rank {rank}: {got} bytes went to each domain, expected {expected}", rank)


def gateway_of(case: Case, domain: int, source: int) -> int | None:
    """The rank of a domain that the tokens of `source` pass and its sums come from; None: all are masked.

    It has the local index of `source`, modulo the domain's size; from a masked one on, the next.
    """
    ranks = list(case.domains[domain])
    start = source % case.options.ranks_per_node % len(ranks)
    living = [rank for rank in ranks[start:] + ranks[:start] if rank in case.members]
    return living[0] if living else None


def a_sum_crosses_once(case: Case, views: list[RankView]) -> None:
    """Combines send a gateway's sums to another domain, once a token, and what asks for them.

    A token's owner names the ranks whose rows are to be summed, a byte a rank.
    """
    counts = crossing_tokens(case, masked_out=True)
    width = case.options.ranks_per_node
    row = 2 * case.hidden + (4 * case.num_topk if case.options.combine_weights else 0)
    for rank in case.members:
        here, expected = rank // width, counts[rank] * width
        for owner in case.members:
            if gateway_of(case, here, owner) == rank:
                expected[owner // width] += counts[owner, here] * row
        expected[here] = 0
        got = views[rank].combine_crossing
        if got is not None and not np.array_equal(expected, got):
            raise Violation(f"rank {rank}: {got} bytes went to each domain, expected {expected}", rank)


def _between_domains(case: Case) -> bool:
    return case.sums_by_domain


CROSSINGS = (
    Property("a token crosses once", _between_domains, a_token_crosses_once),
    Property("a sum crosses once", _between_domains, a_sum_crosses_once),
)
