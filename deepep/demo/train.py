"""One rank's training, as a user's own loop with deepep.nn would do it, and the numbers shown of it."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepep.api.buffer import Buffer
from deepep.demo.config import DemoConfig
from deepep.demo.model import ByteModel
from deepep.demo.text import TextShard
from deepep.gate import Routing
from deepep.nn import Exchange, observe
from deepep.runtime.control.transport import gather_bytes


def learning_rate(config: DemoConfig, step: int) -> float:
    """Ten steps of warm-up, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / 10)
    return config.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of both runs. Elementwise, so a sharded parameter gets the same update as a whole one."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)


@dataclass(frozen=True)
class TrainingOutcome:
    """The outcome of a run, in a form that two runs can be compared in.

    losses: [steps][R], each rank's mean loss in nats per byte. weights: by rank, the digest of its final
    weights.
    """

    losses: list[list[float]]
    weights: list[str]


@dataclass
class RankRecord:
    """One rank's record of a whole run.

    weights: digest of all this rank's weights after the last step. losses: this rank's mean loss, per step.
    loads: [layers, E] int64 per step, top-k entries per expert of all ranks. routing: indices and weights,
    per step and layer. rows_sent, bytes_sent: by exchange, [R] int64 to each rank. entries_sent: [R] int64,
    top-k entries of this rank's tokens that live on each rank. seconds: by phase, all steps.
    """

    weights: str = ""
    losses: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)
    routing: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    rows_sent: dict[str, Tensor] = field(default_factory=dict)
    bytes_sent: dict[str, Tensor] = field(default_factory=dict)
    entries_sent: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def pack(self) -> bytes:
        """The record as bytes that need no trust to be read: tensors, lists and numbers."""
        raw = io.BytesIO()
        torch.save(vars(self), raw)
        return raw.getvalue()

    @staticmethod
    def unpack(raw: bytes) -> RankRecord:
        """The record that `pack` wrote."""
        return RankRecord(**torch.load(io.BytesIO(raw), weights_only=True))


class Trainer:
    """A model, its optimizer and its data on one rank of a Buffer's group."""

    def __init__(self, buffer: Buffer, config: DemoConfig) -> None:
        self.config, self.group = config, buffer.group
        self.model = ByteModel(buffer, config)
        self.optimizer = make_optimizer(self.model)
        self.shard = TextShard(config, buffer.rank)
        self.record = RankRecord(entries_sent=torch.zeros(config.num_ranks, dtype=torch.int64))
        self._exchange_seconds = 0.0
        self._routing: list[tuple[Tensor, Tensor]] = []
        for moe in self.model.moe_layers():
            moe.router.register_forward_hook(self._on_route)
            self._time_module(moe.experts, "experts, forward")

    def step(self, step: int) -> float:
        """One training step. Returns this rank's loss."""
        self._routing = []
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(self.config, step)
        with observe(self._on_exchange):
            with self._phase("forward"):
                loss = self.model(*self.shard.batch(step))
            with self._phase("backward"):
                # Every rank divides, so that experts, which sum over all ranks' tokens, follow the mean loss.
                (loss / self.config.num_ranks).backward()
        with self._phase("gradient sum"):
            sum_gradients(self.model.replicated_parameters(), self.group)
        with self._phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        with self._phase("balancing"):
            loads = [moe.rebalance(self.config.balance_rate) for moe in self.model.moe_layers()]
        self.record.losses.append(loss.item())
        self.record.loads.append(torch.stack(loads))
        self.record.routing.append(self._routing)
        return loss.item()

    def _on_route(self, _module: nn.Module, _inputs: Any, routing: Routing) -> None:
        self._routing.append((routing.topk_idx.to(torch.int16), routing.topk_weights.detach()))
        owner = routing.topk_idx.flatten() // (self.config.num_experts // self.config.num_ranks)
        assert self.record.entries_sent is not None
        self.record.entries_sent += torch.bincount(owner, minlength=self.config.num_ranks)

    def _on_exchange(self, exchange: Exchange) -> None:
        rows = torch.tensor(exchange.rows_sent)
        for table, values in (
            (self.record.rows_sent, rows),
            (self.record.bytes_sent, rows * exchange.row_bytes),
        ):
            table[exchange.name] = table.get(exchange.name, 0) + values
        direction = "backward" if exchange.name.endswith("backward") else "forward"
        self.record.seconds[f"{exchange.name.removesuffix('_backward')}, {direction}"] += exchange.seconds

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.record.seconds[name] += time.perf_counter() - started

    def _time_module(self, module: nn.Module, name: str) -> None:
        started = 0.0

        def begin(*_: Any) -> None:
            nonlocal started
            started = time.perf_counter()

        def end(*_: Any) -> None:
            self.record.seconds[name] += time.perf_counter() - started

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def digest(model: nn.Module) -> str:
    """SHA-256 over the bytes of all parameters and buffers: equal bits, equal digest."""
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def sum_gradients(parameters: list[nn.Parameter], group: Any) -> None:
    """Sums gradients over the ranks, ascending: the order, and so the bits, of the run in one process.

    An all_reduce would do for training; its order of summation is its own.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, flat, group=group)
    total = everyone[0]
    for other in everyone[1:]:
        total += other
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train_rank(
    group: Any, config: DemoConfig, on_step: Callable[[int, float], None] | None = None
) -> list[RankRecord] | None:
    """Trains on this rank; collective over `group`. Rank 0 gets all ranks' records, the others None.

    on_step(step, mean loss of all ranks) is called after each step on rank 0.
    """
    torch.set_num_threads(1)
    buffer = Buffer(group, explicitly_destroy=True, device="cpu")
    trainer = Trainer(buffer, config)
    for step in range(config.steps):
        losses = [torch.empty(1, dtype=torch.float64) for _ in range(config.num_ranks)]
        dist.all_gather(losses, torch.tensor([trainer.step(step)], dtype=torch.float64), group=group)
        if on_step is not None and buffer.rank == 0:
            on_step(step, float(sum(losses)) / config.num_ranks)
    trainer.record.seconds = dict(trainer.record.seconds)
    trainer.record.weights = digest(trainer.model)
    everyone = gather_bytes(group, trainer.record.pack())
    buffer.destroy()
    return [RankRecord.unpack(raw) for raw in everyone] if buffer.rank == 0 else None
