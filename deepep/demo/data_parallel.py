"""Data parallelism in the demo: its model trained by torch's own reduction, then by this library's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from deepep.api.buffer import Buffer
from deepep.collectives import Communicator
from deepep.collectives.cost import LinkSpeeds
from deepep.demo.compressed import float32_bytes, mean_of, training_steps
from deepep.demo.config import DemoConfig
from deepep.demo.model import ByteModel
from deepep.parallel.config import ParallelConfig
from deepep.parallel.ddp import DistributedDataParallel


@dataclass
class GradientRun:
    """One run, on one rank.

    By step: losses in nats per byte, means of all ranks; seconds of the backward; bytes of gradients that the
    rank has sent; codecs by bucket. plans: lines of (codec, size, plan in words, milliseconds).
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    codecs: list[list[str]] = field(default_factory=list)
    plans: list[tuple[str, int, str, float]] = field(default_factory=list)


def probe_links(group: dist.ProcessGroup) -> LinkSpeeds:
    """Speeds of the links between the ranks. Collective."""
    with Communicator(group, timeout=120.0) as comm:
        return comm.probe()


def train_gradients(
    group: dist.ProcessGroup, config: DemoConfig, compression: str, probe_seconds: float
) -> GradientRun:
    """Trains the demo's model. Collective.

    compression: an option of ParallelConfig's, or "torch" for torch's own all-reduce. probe_seconds: another.
    """
    torch.set_num_threads(1)
    run = GradientRun()
    options: dict[str, Any] = {"compression": compression, "min_compressed_bytes": 0}
    if compression == "torch":
        options = {"topology": "native", "reproducible": False}
    with Buffer(group, device="cpu", timeout=300.0) as buffer:
        model = ByteModel(buffer, config)
        parallel = ParallelConfig(**options, seed=config.seed, timeout=300.0, probe_seconds=probe_seconds)
        wrapped = DistributedDataParallel(model, process_group=group, config=parallel)
        before, whole = 0, float32_bytes(wrapped, config.num_ranks)
        if compression != "torch":
            before = wrapped.report()["bytes_sent"]  # of measuring
        for loss, seconds in training_steps(model, wrapped, config, buffer.rank):
            run.losses.append(mean_of(group, loss))
            run.seconds.append(seconds)
            if compression == "torch":
                run.bytes.append(whole)
                run.codecs.append(["float32"])
                continue
            report = wrapped.report()
            run.bytes.append(report["bytes_sent"] - before)
            before = report["bytes_sent"]
            run.codecs.append([plan["codec"] for _, plan in sorted(report["plans"].items())])
        if compression != "torch" and wrapped.plan is not None:
            for entry in wrapped.plan.entries:
                pieces = entry.plan.pieces
                words = f"{entry.plan.schedule} x{pieces}" if pieces > 1 else entry.plan.schedule
                run.plans.append((entry.plan.codec, entry.size, words, 1e3 * entry.seconds))
        wrapped.close()
    return run
