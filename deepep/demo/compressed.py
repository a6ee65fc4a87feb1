"""Convergence: the demo's model trained with gradients in several formats, the same but for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from deepep.api.buffer import Buffer
from deepep.demo.config import DemoConfig
from deepep.demo.model import ByteModel
from deepep.demo.text import TextShard
from deepep.demo.train import learning_rate, make_optimizer
from deepep.parallel.config import ParallelConfig
from deepep.parallel.ddp import DistributedDataParallel

CONTROL = "int2"
"""A format far too coarse, which a comparison that means anything has to tell from float32. Not offered."""
FORMATS = ("off", "bf16", "fp16", "fp8", CONTROL)
LAST = 16  # steps whose mean loss is compared


def train_with(group: dist.ProcessGroup, form: str, config: DemoConfig) -> list[float]:
    """Mean losses of all ranks by step, in nats per byte. Collective."""
    torch.set_num_threads(1)
    with Buffer(group, device="cpu", timeout=300.0) as buffer:
        model = ByteModel(buffer, config)
        options = ParallelConfig(
            compression="off" if form == CONTROL else form,
            min_compressed_bytes=0,
            reproducible=False,
            topology="native" if form == CONTROL else "direct",
            seed=config.seed,
            timeout=300.0,
        )
        wrapped = DistributedDataParallel(model, process_group=group, config=options)
        if form == CONTROL:
            wrapped.register_comm_hook(group, _control)
        losses = [mean_of(group, loss) for loss, _ in training_steps(model, wrapped, config, buffer.rank)]
        wrapped.close()
    return losses


def training_steps(
    model: ByteModel, wrapped: DistributedDataParallel, config: DemoConfig, rank: int
) -> Iterator[tuple[Tensor, float]]:
    """Trains step by step: this rank's loss, and the seconds of its backward."""
    optimizer, shard = make_optimizer(model), TextShard(config, rank)
    for step in range(config.steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(config, step)
        loss = wrapped(*shard.batch(step))
        started = time.perf_counter()
        loss.backward()
        seconds = time.perf_counter() - started
        optimizer.step()
        optimizer.zero_grad()
        for moe in model.moe_layers():
            moe.rebalance(config.balance_rate)
        yield loss.detach(), seconds


def mean_of(group: dist.ProcessGroup, loss: Tensor) -> float:
    """The mean of all ranks' losses. Collective."""
    mean = loss.double().reshape(1)
    dist.all_reduce(mean, group=group)
    return float(mean) / group.size()


def float32_bytes(wrapped: DistributedDataParallel, num_ranks: int) -> int:
    """Bytes that a rank sends a step of gradients in float32, by a ring or in parts to their owners."""
    ignored = wrapped.parameters_to_ignore
    count = sum(p.numel() for name, p in wrapped.module.named_parameters() if name not in ignored)
    return 2 * 4 * count * (num_ranks - 1) // num_ranks


def train_by_noise(group: dist.ProcessGroup, config: DemoConfig) -> list[dict[str, Any]]:
    """Trains with compression "auto". By step: `bytes` that this rank has sent, and `float32_bytes` that it
    would have sent; by bucket `codecs`, and the noise `ratios` of those in use two steps before. Collective.
    """
    torch.set_num_threads(1)
    steps: list[dict[str, Any]] = []
    with Buffer(group, device="cpu", timeout=300.0) as buffer:
        model = ByteModel(buffer, config)
        options = ParallelConfig("auto", "direct", min_compressed_bytes=0, seed=config.seed, timeout=300.0)
        wrapped = DistributedDataParallel(model, process_group=group, config=options)
        before, whole = 0, float32_bytes(wrapped, config.num_ranks)
        for step, _ in enumerate(training_steps(model, wrapped, config, buffer.rank)):
            report = wrapped.report()
            codecs = [plan["codec"] for _, plan in sorted(report["plans"].items())]
            used = steps[-2]["codecs"] if step > 1 else []
            ratios = [
                report["noise"][index][codec]
                for index, codec in enumerate(used)
                if codec in report["noise"].get(index, {})
            ]
            sent = report["bytes_sent"] - before
            before = report["bytes_sent"]
            steps.append({"bytes": sent, "float32_bytes": whole, "codecs": codecs, "ratios": ratios})
        wrapped.close()
    return steps


def last_mean(losses: list[float]) -> float:
    """The mean of the last steps' losses."""
    last = losses[-LAST:]
    return sum(last) / len(last)


def _control(group: dist.ProcessGroup, bucket: Any) -> Future[Tensor]:
    """Rounds addends to -1, 0 or 1 times a block's largest magnitude, averages them, and rounds again."""
    tensor = _two_bits(bucket.buffer())
    dist.all_reduce(tensor, group=group)
    bucket.buffer().copy_(_two_bits(tensor / group.size()))
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done


def _two_bits(values: Tensor) -> Tensor:
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % 128)).view(-1, 128)
    unit = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return ((blocks / unit).round() * unit).flatten()[: values.numel()]


_control.__annotations__.update({"bucket": dist.GradBucket, "return": Future[Tensor]})  # type: ignore[attr-defined]
