"""The same training in one process, without any communication: what the demo compares its losses with.

One model per rank, all in this process, taken through each layer side by side. What `Buffer` does between
processes is done here by deepep.reference's global view: pure functions from all ranks' inputs to all
ranks' outputs.

Bound on the difference: zero. Every operation works on tensors of the same shape and content as in the rank
processes (the same shards, the same rows in the same order in each expert's matrix product), on one thread,
and every sum over ranks runs in ascending order in both runs: combine by its contract, gradients by
`sum_gradients`, loads because they are integers. Nothing is left that could round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep.demo.config import DemoConfig
from deepep.demo.model import ByteModel
from deepep.demo.text import TextShard
from deepep.demo.train import TrainingOutcome, digest, learning_rate, make_optimizer
from deepep.nn import apply_experts
from deepep.nn.moe import ExpertParallelMoE
from deepep.reference.high_throughput import DispatchInput
from deepep.reference.high_throughput import combine as combine_all
from deepep.reference.high_throughput import dispatch as dispatch_all
from deepep.reference.layout import dispatch_layout


@dataclass(eq=False)
class LoneRank:
    """A stand-in for Buffer, as far as a layer needs one, for a rank that has none."""

    rank: int
    group_size: int
    group: Any = None


class _GlobalDispatch(torch.autograd.Function):
    """(x_0 .. x_R-1, weights_0 .. weights_R-1) -> (received x by rank,
    received weights by rank); indices by `routes`.
    """

    @staticmethod
    def forward(ctx: Any, routes: Routes, *fields: Tensor) -> tuple[Tensor, ...]:
        ctx.routes = routes
        num_ranks = len(routes.tables)
        outputs = dispatch_all(
            [
                DispatchInput(x, table, topk_idx=idx, topk_weights=weights)
                for x, weights, table, idx in zip(
                    fields[:num_ranks], fields[num_ranks:], routes.tables, routes.topk_idx, strict=True
                )
            ],
            routes.num_experts,
        )
        routes.received_idx = [_present(out.recv_topk_idx) for out in outputs]
        return (*(out.recv_x for out in outputs), *(_present(out.recv_topk_weights) for out in outputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        num_ranks = len(ctx.routes.tables)
        sums = combine_all(grads[:num_ranks], ctx.routes.tables, topk_weights=grads[num_ranks:])
        return (None, *(s.x for s in sums), *(_present(s.topk_weights) for s in sums))


class _GlobalCombine(torch.autograd.Function):
    """(rows by rank) -> (tokens by rank)."""

    @staticmethod
    def forward(ctx: Any, routes: Routes, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.routes = routes
        return tuple(out.x for out in combine_all(rows, routes.tables))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs = [DispatchInput(grad, table) for grad, table in zip(grads, ctx.routes.tables, strict=True)]
        return (None, *(out.recv_x for out in dispatch_all(inputs, ctx.routes.num_experts)))


@dataclass
class Routes:
    """One layer's routing in one step, of all ranks."""

    topk_idx: list[Tensor]
    num_experts: int
    tables: list[Tensor]
    received_idx: list[Tensor]


def moe_of_all_ranks(layers: Sequence[ExpertParallelMoE], xs: Sequence[Tensor]) -> list[Tensor]:
    """The MoE layer of every rank on that rank's tokens: x_r [B, S, H] -> the same."""
    num_ranks, num_experts = len(layers), layers[0].num_experts
    tokens = [x.reshape(-1, x.shape[-1]) for x in xs]
    routing = [layer.router(t) for layer, t in zip(layers, tokens, strict=True)]
    tables = [dispatch_layout(r.topk_idx, num_experts, num_ranks).is_token_in_rank for r in routing]
    routes = Routes([r.topk_idx for r in routing], num_experts, tables, [])
    received = _GlobalDispatch.apply(routes, *tokens, *(r.topk_weights for r in routing))
    rows = [
        apply_experts(layer.experts, received[rank], routes.received_idx[rank], received[num_ranks + rank])
        for rank, layer in enumerate(layers)
    ]
    ys = list(_GlobalCombine.apply(routes, *rows))
    for rank, layer in enumerate(layers):
        if layer.shared is not None:
            ys[rank] = ys[rank] + layer.shared(tokens[rank])
    return [y.view_as(x) for y, x in zip(ys, xs, strict=True)]


class SingleProcessTrainer:
    """All ranks' models, optimizers and shards in this process."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        ranks = range(config.num_ranks)
        self.models = [ByteModel(LoneRank(rank, config.num_ranks), config) for rank in ranks]
        self.optimizers = [make_optimizer(model) for model in self.models]
        self.shards = [TextShard(config, rank) for rank in ranks]

    def step(self, step: int) -> list[float]:
        """One training step. Returns every rank's loss."""
        batches = [shard.batch(step) for shard in self.shards]
        hs = [model.embed(tokens) for model, (tokens, _) in zip(self.models, batches, strict=True)]
        for blocks in zip(*(model.blocks for model in self.models), strict=True):
            hs = [block.attend(h) for block, h in zip(blocks, hs, strict=True)]
            normed = [block.moe_norm(h) for block, h in zip(blocks, hs, strict=True)]
            ys = moe_of_all_ranks([block.moe for block in blocks], normed)
            hs = [h + y for h, y in zip(hs, ys, strict=True)]
        losses = [m.loss(h, t) for m, h, (_, t) in zip(self.models, hs, batches, strict=True)]
        torch.autograd.backward([loss / self.config.num_ranks for loss in losses])
        for copies in zip(*(model.replicated_parameters() for model in self.models), strict=True):
            total = _present(copies[0].grad).clone()
            for copy in copies[1:]:
                total += _present(copy.grad)
            for copy in copies:
                copy.grad = total.clone()
        for optimizer in self.optimizers:
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(self.config, step)
            optimizer.step()
            optimizer.zero_grad()
        for routers in zip(*([moe.router for moe in m.moe_layers()] for m in self.models), strict=True):
            load = torch.stack([router.load for router in routers]).sum(0)
            for router in routers:
                router.load.copy_(load)
                router.rebalance(self.config.balance_rate)
        return [loss.item() for loss in losses]


def train_single(config: DemoConfig, on_step: Callable[[int, float], None] | None = None) -> TrainingOutcome:
    """The whole run in this process. Uses one thread, and puts the number back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = SingleProcessTrainer(config)
        history = []
        for step in range(config.steps):
            history.append(trainer.step(step))
            if on_step is not None:
                on_step(step, sum(history[-1]) / config.num_ranks)
    finally:
        torch.set_num_threads(threads)
    return TrainingOutcome(history, [digest(model) for model in trainer.models])


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
