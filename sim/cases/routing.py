"""Routing patterns: which experts the tokens of all ranks choose.

Every pattern is a function of (shape, numpy generator) that fills one [n, K] matrix for the n tokens of
all ranks together; `PATTERNS` lists them. They are what a router does on a good day (uniform,
group-limited), on a bad one (Zipf, one expert, one rank, a starved rank) and what breaks layout code (every
token to a neighbour, all of a token's choices on one rank, or each on another).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RoutingShape:
    """Sizes a pattern needs. R ranks, E experts (a multiple of R), K choices per token; tokens by rank."""

    num_ranks: int
    num_experts: int
    num_topk: int
    num_tokens: tuple[int, ...]

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def total_tokens(self) -> int:
        return sum(self.num_tokens)

    def token_rank(self) -> Indices:
        """[n]: the source rank of each row of a pattern's matrix."""
        return np.repeat(np.arange(self.num_ranks), self.num_tokens)


Pattern = Callable[[RoutingShape, np.random.Generator], Indices]


def distinct(scores: npt.NDArray[np.float64], num_topk: int) -> Indices:
    """[n, K]: the K best columns of each row, best first; what a top-k gate does. -1 past the columns."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :num_topk].astype(np.int64)
    missing = num_topk - order.shape[1]
    return np.pad(order, ((0, 0), (0, missing)), constant_values=-1) if missing > 0 else order


def uniform(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """Each token's experts are distinct, all equally likely."""
    return distinct(rng.random((shape.total_tokens, shape.num_experts)), shape.num_topk)


def repeated(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """Each entry on its own: an expert may be chosen several times by one token."""
    return rng.integers(0, shape.num_experts, (shape.total_tokens, shape.num_topk))


def zipf(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """Distinct experts, the i-th most popular with weight 1 / i^1.2 (Gumbel top-k)."""
    popularity = rng.permutation(shape.num_experts) + 1.0
    noise = rng.gumbel(size=(shape.total_tokens, shape.num_experts))
    return distinct(noise - 1.2 * np.log(popularity), shape.num_topk)


def one_expert(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """Every token wants the same expert, and nothing else."""
    indices = np.full((shape.total_tokens, shape.num_topk), -1, dtype=np.int64)
    indices[:, rng.integers(shape.num_topk)] = rng.integers(shape.num_experts)
    return indices


def one_rank(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """All choices lie on one rank, which receives every token of the world."""
    first = int(rng.integers(shape.num_ranks)) * shape.num_local_experts
    return first + rng.integers(0, shape.num_local_experts, (shape.total_tokens, shape.num_topk))


def starved(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """One rank receives nothing."""
    scores = rng.random((shape.total_tokens, shape.num_ranks, shape.num_local_experts))
    hungry = int(rng.integers(shape.num_ranks))
    scores[:, hungry] = -1.0
    indices = distinct(scores.reshape(shape.total_tokens, shape.num_experts), shape.num_topk)
    return np.where(indices // shape.num_local_experts == hungry, -1, indices)


def group_limited(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """Each token's experts come from few of several equal groups, as DeepSeek-V3 routes to few nodes."""
    divisors = [g for g in range(2, shape.num_experts + 1) if shape.num_experts % g == 0] or [1]
    num_groups = int(rng.choice(divisors))
    kept = int(rng.integers(1, num_groups + 1))
    groups = rng.random((shape.total_tokens, num_groups))
    cut = np.sort(groups, axis=1)[:, num_groups - kept : num_groups - kept + 1]
    scores = rng.random((shape.total_tokens, num_groups, shape.num_experts // num_groups))
    scores[groups < cut] = -1.0
    flat = scores.reshape(shape.total_tokens, shape.num_experts)
    indices = distinct(flat, shape.num_topk)
    chosen = np.take_along_axis(flat, np.maximum(indices, 0), axis=1)
    return np.where(chosen < 0, -1, indices)


def neighbour(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """Every token of rank r goes to one rank: r plus a constant. Zero keeps everything at home."""
    target = (shape.token_rank() + rng.integers(shape.num_ranks)) % shape.num_ranks
    local = rng.integers(0, shape.num_local_experts, (shape.total_tokens, shape.num_topk))
    return target[:, None] * shape.num_local_experts + local


def spread(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """A token's choices lie on as many different ranks as there are, in turn."""
    turn = rng.integers(0, shape.num_ranks, (shape.total_tokens, 1)) + np.arange(shape.num_topk)
    local = rng.integers(0, shape.num_local_experts, (shape.total_tokens, shape.num_topk))
    return turn % shape.num_ranks * shape.num_local_experts + local


def nothing(shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """No token goes anywhere."""
    return np.full((shape.total_tokens, shape.num_topk), -1, dtype=np.int64)


PATTERNS: dict[str, Pattern] = {
    "uniform": uniform,
    "repeated": repeated,
    "zipf": zipf,
    "one_expert": one_expert,
    "one_rank": one_rank,
    "starved": starved,
    "group_limited": group_limited,
    "neighbour": neighbour,
    "spread": spread,
    "nothing": nothing,
}


# Twists: what may be done to any pattern's matrix afterwards.


def drop_entries(indices: Indices, shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """A third of the entries become -1."""
    return np.where(rng.random(indices.shape) < 1 / 3, -1, indices)


def drop_tokens(indices: Indices, shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """A third of the tokens choose nothing."""
    return np.where(rng.random((len(indices), 1)) < 1 / 3, -1, indices)


def drop_rank(indices: Indices, shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """No token of one rank chooses anything."""
    silent = shape.token_rank() == rng.integers(shape.num_ranks)
    return np.where(silent[:, None], -1, indices)


def double(indices: Indices, shape: RoutingShape, rng: np.random.Generator) -> Indices:
    """In half of the tokens one entry is repeated at another place."""
    if indices.size == 0:
        return indices
    source, target = rng.integers(0, shape.num_topk, (2, len(indices)))
    rows = np.arange(len(indices))
    doubled = indices.copy()
    doubled[rows, target] = indices[rows, source]
    return np.where(rng.random((len(indices), 1)) < 0.5, doubled, indices)


TWISTS: dict[str, Callable[[Indices, RoutingShape, np.random.Generator], Indices]] = {
    "drop_entries": drop_entries,
    "drop_tokens": drop_tokens,
    "drop_rank": drop_rank,
    "double": double,
}
