"""The router of an MoE layer: a linear map to logits, a gate, and balancing by bias instead of an auxiliary
loss.

Balancing as in DeepSeek-V3: every expert carries a bias that only takes part in the selection. After a
step, experts that got more than the mean load have their bias lowered by a fixed rate, the others have it
raised. No gradient of a balancing loss disturbs the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepep.gate import Routing, sigmoid_topk

#: Maps logits [T, E], K and `bias=` [E] to a Routing: deepep.gate's functions, or a functools.partial of one.
Gate = Callable[..., Routing]


class Router(nn.Module):
    """Logits x W^T in float32 (float64 for float64 rows), then `gate(logits, num_topk, bias=self.bias)`.

    weight: [E, H] parameter. bias: [E] float32 buffer, saved with the model. load: [E] int64 buffer, top-k
    entries per expert since the last `rebalance`, of this rank's tokens, counted by every forward in
    training mode (a checkpoint's recomputation counts again); not saved.
    """

    bias: Tensor
    load: Tensor

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        num_topk: int,
        *,
        gate: Gate = sigmoid_topk,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_topk = num_topk
        self.gate = gate
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))
        self.register_buffer("bias", torch.zeros(num_experts, device=device))
        self.register_buffer(
            "load", torch.zeros(num_experts, device=device, dtype=torch.int64), persistent=False
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.weight.shape, generator=generator)
        self.weight.copy_(drawn / self.weight.shape[1] ** 0.5)
        self.bias.zero_()
        self.load.zero_()

    def forward(self, x: Tensor) -> Routing:
        """x [T, H] -> Routing: topk_idx [T, K] int64, topk_weights [T, K], scores [T, E]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = x.to(wide) @ self.weight.to(wide).t()  # [T, E]
        routing = self.gate(logits, self.num_topk, bias=self.bias)
        if self.training:
            entries = routing.topk_idx.flatten()
            self.load.scatter_add_(0, entries, torch.ones_like(entries))
        return routing

    @torch.no_grad()
    def rebalance(self, rate: float, group: Any = None) -> Tensor:
        """Moves every bias by `rate` towards an even load, and forgets the load.

        Collective over `group` (None: this rank's load alone), whose loads are added up first, so that all
        ranks keep the same biases. Returns that load, [E] int64. Loads are integers: the result does not
        depend on the order of the sum. DeepSeek-V3 used a rate of 0.001.
        """
        load = self.load.clone()
        if group is not None:
            dist.all_reduce(load, group=group)
        # sign(mean - load) without a division: sum - E * load has the same sign, exactly.
        self.bias += rate * torch.sign(load.sum() - load.numel() * load).to(self.bias.dtype)
        self.load.zero_()
        return load
