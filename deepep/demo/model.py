"""The demo's model: a small byte-level transformer whose feed-forward
layers are expert-parallel MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deepep.demo.config import DemoConfig
from deepep.nn import BufferLike, ExpertParallelMoE

VOCABULARY = 256


class Attention(nn.Module):
    """Causal self-attention. x [B, S, H]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, S, H/heads]
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """h + attention(norm(h)), then h + moe(norm(h))."""

    def __init__(self, buffer: BufferLike, config: DemoConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config.hidden, config.heads)
        self.moe_norm = nn.RMSNorm(config.hidden)
        self.moe = ExpertParallelMoE(
            buffer,
            hidden=config.hidden,
            expert_hidden=config.expert_hidden,
            num_experts=config.num_experts,
            num_topk=config.num_topk,
            shared_hidden=config.shared_hidden,
            seed=config.seed * 1009 + layer + 1,
        )

    def attend(self, h: Tensor) -> Tensor:
        """The half before the MoE layer: h [B, S, H] -> [B, S, H]."""
        return h + self.attention(self.attention_norm(h))

    def forward(self, h: Tensor) -> Tensor:
        h = self.attend(h)
        return h + self.moe(self.moe_norm(h))


class ByteModel(nn.Module):
    """Bytes to next-byte logits.

    Draws its weights from config.seed: replicated ones are equal on all ranks.
    """

    def __init__(self, buffer: BufferLike, config: DemoConfig) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.embedding = nn.Embedding(VOCABULARY, config.hidden)
        self.position = nn.Parameter(torch.randn(config.context, config.hidden) * 0.02)
        self.blocks = nn.ModuleList(Block(buffer, config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> [B, S, H]."""
        return self.embedding(tokens) + self.position

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the last block's output h [B, S, H]."""
        return nn.functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.loss(h, targets)

    def moe_layers(self) -> list[ExpertParallelMoE]:
        return [m for m in self.modules() if isinstance(m, ExpertParallelMoE)]

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that only this rank holds."""
        for moe in self.moe_layers():
            yield from moe.expert_parameters()

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Parameters that every rank holds; gradients have to be summed over ranks."""
        mine = set(self.expert_parameters())
        return [p for p in self.parameters() if p not in mine]
