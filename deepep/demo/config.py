"""Configuration of a demo run."""

from __future__ import annotations

from dataclasses import dataclass

from deepep.errors import RangeError


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the model, the data and the run.

    num_experts is rounded up to a multiple of num_ranks by `for_ranks`. sequences: per rank and step, each
    of `context` bytes. Everything random comes from `seed`.
    """

    num_ranks: int = 4
    steps: int = 120
    num_experts: int = 16
    num_topk: int = 4
    layers: int = 2
    hidden: int = 96
    expert_hidden: int = 96
    shared_hidden: int = 96
    heads: int = 4
    context: int = 128
    sequences: int = 6
    learning_rate: float = 6e-3
    balance_rate: float = 1e-2
    seed: int = 0

    @classmethod
    def for_ranks(
        cls,
        num_ranks: int,
        steps: int,
        seed: int = 0,
        *,
        num_experts: int = num_experts,
        num_topk: int = num_topk,
    ) -> DemoConfig:
        """The model on `num_ranks` ranks, by default with its own numbers of experts. Raises RangeError."""
        if not 1 <= num_ranks <= 64:
            raise RangeError("ranks", str(num_ranks), "1 to 64")
        if steps < 2:
            raise RangeError("steps", str(steps), "2 or more")
        if num_experts < 1:
            raise RangeError("experts", str(num_experts), "1 or more")
        if not 1 <= num_topk <= num_experts:
            raise RangeError("topk", str(num_topk), f"1 to the {num_experts} experts")
        experts = -(-num_experts // num_ranks) * num_ranks
        return cls(num_ranks=num_ranks, steps=steps, num_experts=experts, num_topk=num_topk, seed=seed)

    @property
    def tokens_per_rank(self) -> int:
        """T: tokens a rank dispatches in one layer of one step."""
        return self.sequences * self.context
