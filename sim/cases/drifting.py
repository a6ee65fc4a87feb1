"""Drawn routing traces whose experts are unevenly popular, and not always the same ones."""

from __future__ import annotations

import numpy as np
import torch

from deepep.sim.cases.routing import distinct
from deepep.trace import RoutingTrace, TraceWriter


def drifting_trace(
    *,
    num_steps: int,
    num_layers: int,
    num_ranks: int,
    num_experts: int,
    num_topk: int,
    tokens: int,
    skew: float = 1.0,
    drift: float = 0.02,
    seed: int = 0,
) -> RoutingTrace:
    """A trace of `tokens` tokens a rank in every step and layer.

    skew: standard deviation of the logarithm of an expert's popularity. drift: the part of that which is
    drawn anew in a step: its correlation with that of n steps before is (1 - drift)^(n / 2). 0: it never
    changes. A token's experts are distinct, drawn in proportion to popularity (Gumbel top-k).

    Raises ValueError for drift outside 0 to 1 or a negative skew; sizes as TraceWriter does.
    """
    if not 0 <= drift <= 1 or not 0 <= skew < 100:
        raise ValueError(f"skew, drift: got {skew}, {drift}; allowed: from 0 below 100, from 0 to 1")
    if tokens < 0 or num_steps < 0:
        raise ValueError(f"tokens, num_steps: got {tokens}, {num_steps}; allowed: from 0")
    if num_topk > num_experts:
        raise ValueError(f"num_topk: got {num_topk}; allowed: at most {num_experts}, the experts")
    notes = {"drawn": f"skew {skew}, drift {drift}, seed {seed}"}
    writer = TraceWriter(
        num_layers=num_layers, num_ranks=num_ranks, num_experts=num_experts, num_topk=num_topk, notes=notes
    )
    rng = np.random.default_rng(seed)
    popularity = skew * rng.standard_normal((num_layers, num_experts))
    for step in range(num_steps):
        if step:
            fresh = skew * rng.standard_normal(popularity.shape)
            popularity = np.sqrt(1 - drift) * popularity + np.sqrt(drift) * fresh
        for layer in range(num_layers):
            scores = popularity[layer] + rng.gumbel(size=(num_ranks * tokens, num_experts))
            chosen = distinct(scores, num_topk)
            weights = np.take_along_axis(scores, chosen, axis=1)
            weights = np.exp(weights - weights.max(axis=1, keepdims=True)) if weights.size else weights
            weights /= weights.sum(axis=1, keepdims=True)
            of_ranks = [torch.from_numpy(part).split(tokens or 1) for part in (chosen, weights)]
            if not tokens:
                of_ranks = [[torch.from_numpy(part)] * num_ranks for part in (chosen, weights)]
            writer.add(step, layer, list(of_ranks[0]), list(of_ranks[1]))
    return writer.finish()
