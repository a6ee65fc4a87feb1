"""Bytes that a dispatch and its combine put on each rank's links and NIC, counted from routing.

R ranks in D domains of P, E experts in contiguous blocks, T tokens of a rank, K top-k. Counts are those of
the library's rules: a token goes once to a rank, crosses once to a domain, to its gateway there
(docs/domains.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepep.sim.cases.routing import Indices, distinct

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowCounts:
    """Rows by rank; of a dispatch. A combine returns each of them, as a domain's sum where it crossed.

    cross: own tokens to other domains, once each. hold: foreign tokens that this rank is the gateway of.
    spread: rows that it writes to other ranks of its domain, its own and those it holds. receive: rows that
        other ranks of its domain write to it, and that it returns to them.
    per_rank: own tokens by destination rank, once each, and per_domain by domain, itself included.
    remote_ranks: the part of per_rank in other domains. choices: top-k entries of all experts, and
        remote_choices: of those in other domains. kept_ranks, kept_choices: the parts of per_rank and of
        choices that stay on the rank.
    """

    tokens: Counts
    cross: Counts
    hold: Counts
    spread: Counts
    receive: Counts
    per_rank: Counts
    per_domain: Counts
    remote_ranks: Counts
    remote_choices: Counts
    choices: Counts
    kept_ranks: Counts
    kept_choices: Counts

    def scaled(self, factor: float) -> RowCounts:
        """The counts of so many times the tokens."""
        return RowCounts(**{name: factor * value for name, value in vars(self).items()})


def count_rows(topk_idx: Sequence[Indices], num_experts: int, ranks_per_domain: int) -> RowCounts:
    """Counts of one dispatch. `topk_idx` by source rank: [T, K] global experts, -1 for none.

    Raises ValueError unless the experts divide among the ranks and the ranks among domains.
    """
    num_ranks = len(topk_idx)
    if ranks_per_domain < 1:
        raise ValueError(f"ranks_per_domain: got {ranks_per_domain}; allowed: at least 1")
    if num_experts % num_ranks or num_ranks % min(ranks_per_domain, num_ranks):
        got = f"{num_experts} experts, {num_ranks} ranks, {ranks_per_domain} ranks a domain"
        raise ValueError(f"experts, ranks, ranks_per_domain: got {got}; allowed: whole parts")
    size = min(ranks_per_domain, num_ranks)
    counts = {name: np.zeros(num_ranks) for name in RowCounts.__dataclass_fields__}
    for source, indices in enumerate(topk_idx):
        table = np.zeros((len(indices), num_ranks + 1), dtype=bool)
        owner = np.where(indices >= 0, indices // (num_experts // num_ranks), num_ranks)
        np.put_along_axis(table, owner, True, axis=1)
        to_rank = table[:, :num_ranks].reshape(len(indices), -1, size)  # [T, D, P]
        to_domain, own, local = to_rank.any(2), source // size, source % size
        gateways = np.arange(num_ranks // size) * size + local
        crossing = to_domain.sum(0).astype(np.float64)
        crossing[own] = 0
        rows = to_rank.sum(0)  # [D, P]
        kept = rows[:, local]  # rows for the gateways themselves
        counts["tokens"][source] += len(indices)
        counts["cross"][source] += crossing.sum()
        counts["hold"][gateways] += crossing
        counts["spread"][gateways] += rows.sum(1) - kept
        received = rows.astype(np.float64)
        received[:, local] = 0
        counts["receive"] += received.reshape(-1)
        counts["per_rank"][source] += rows.sum()
        counts["per_domain"][source] += to_domain.sum()
        counts["remote_ranks"][source] += rows.sum() - rows[own].sum()
        counts["choices"][source] += (owner < num_ranks).sum()
        counts["kept_ranks"][source] += rows[own, local]
        counts["kept_choices"][source] += (owner == source).sum()
        counts["remote_choices"][source] += ((owner < num_ranks) & (owner // size != own)).sum()
    return RowCounts(**counts)


def uniform_routing(
    num_ranks: int,
    num_experts: int,
    num_topk: int,
    *,
    num_groups: int = 1,
    kept_groups: int = 1,
    tokens: int = 4096,
    seed: int = 0,
) -> list[Indices]:
    """Distinct experts, all equally likely, for about `tokens` tokens of all ranks; by rank.

    num_groups, kept_groups: each token's experts lie in the best `kept_groups` of so many equal groups, by
    their best expert.
    """
    rng, each = np.random.default_rng(seed), -(-tokens // num_ranks)
    found = []
    for _ in range(num_ranks):
        scores = rng.random((each, num_experts))
        if kept_groups < num_groups:
            best = scores.reshape(each, num_groups, -1).max(2)
            cut = np.sort(best, axis=1)[:, num_groups - kept_groups]
            scores[np.repeat(best < cut[:, None], num_experts // num_groups, axis=1)] = -1.0
        found.append(distinct(scores, num_topk))
    return found
