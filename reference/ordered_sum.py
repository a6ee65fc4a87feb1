"""Sums in a fixed order, for the global view."""

from __future__ import annotations

import torch
from torch import Tensor


class OrderedSum:
    """One running sum per token. Its first term is taken as it is: 0.0 + -0.0 would lose the sign."""

    def __init__(self, num_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.value = torch.zeros(num_tokens, hidden, dtype=dtype, device=device)
        self.started = torch.zeros(num_tokens, 1, dtype=torch.bool, device=device)

    @classmethod
    def like(cls, other: OrderedSum) -> OrderedSum:
        """Sums of as many tokens, of the same width and dtype, without a term."""
        num_tokens, hidden = other.value.shape
        return cls(num_tokens, hidden, other.value.dtype, other.value.device)

    def add(self, tokens: Tensor, rows: Tensor) -> None:
        """Add `rows` [n, H] to the sums of `tokens` [n], all different."""
        terms = rows.to(self.value.dtype)
        self.value[tokens] = torch.where(self.started[tokens], self.value[tokens] + terms, terms)
        self.started[tokens] = True

    def add_weighted(self, rows: Tensor, weights: Tensor, present: Tensor) -> None:
        """Add weights[t, k] * rows[t, k] to sum t for k ascending, where present[t, k].

        `rows` [T, K, H] float32, `weights` [T, K] float32, `present` [T, K] bool. The product is rounded
        before it is added: two torch operations, never one fused one.
        """
        for k in range(weights.shape[1]):
            tokens = present[:, k].nonzero().flatten()
            self.add(tokens, weights[tokens, k].unsqueeze(1) * rows[tokens, k])
