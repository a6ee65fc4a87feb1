"""The demo as a user runs it, small; and that its check of the losses can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from deepep.cli.demo import command
from deepep.demo.config import DemoConfig
from deepep.demo.report import Comparison, outcome
from deepep.demo.single import train_single
from deepep.demo.text import TextShard, library_text
from deepep.demo.train import TrainingOutcome
from deepep.trace import RoutingTrace

SMALL = replace(
    DemoConfig.for_ranks(2, 4),
    hidden=32,
    expert_hidden=16,
    shared_hidden=16,
    context=16,
    sequences=2,
    heads=2,
)


def run(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        check=False,
        env={**os.environ, "COLUMNS": "120", "GLOO_SOCKET_IFNAME": "lo", **environment},
    )


def test_the_command_trains_compares_and_writes(tmp_path: Path) -> None:
    ranks = 3
    done = run(
        sys.executable,
        "-m",
        "deepep",
        "demo",
        "--ranks",
        str(ranks),
        "--steps",
        "8",
        "--out",
        str(tmp_path / "o"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Equal: all 24 losses and all final weights of 3 processes" in " ".join(done.stdout.split())
    for word in ("tokens dispatched", "rows in", "MB out", "gradient sum", "Expert load", "8/8"):
        assert word in done.stdout
    files = {path.name for path in (tmp_path / "o").iterdir()}
    assert files == {"loss.png", "expert_load.png", "traffic.png", "routing.safetensors", "run.json"}
    for name in ("loss.png", "expert_load.png", "traffic.png"):
        assert (tmp_path / "o" / name).read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "o" / "run.json").read_text())
    losses = [sum(step) / ranks for step in written["between_processes"]["losses"]]
    assert written["between_processes"] == written["one_process"]
    assert losses[-1] < losses[0] - 0.5, "the loss falls"
    check_trace(RoutingTrace.load(tmp_path / "o" / "routing.safetensors"), written, done.stdout)


def check_trace(trace: RoutingTrace, written: Any, output: str) -> None:
    """The trace is that of the run: its rows, de-duplicated, are the rows the table shows."""
    config = written["config"]
    assert (trace.num_ranks, trace.num_layers) == (config["num_ranks"], config["layers"])
    assert (trace.num_experts, trace.num_topk, trace.num_steps) == (config["num_experts"], 4, config["steps"])
    local = trace.num_experts // trace.num_ranks
    choices, rows = 0, 0
    for batch in trace:
        for idx in batch.topk_idx:
            assert idx.shape == (config["sequences"] * config["context"], 4)
            assert ((idx >= 0) & (idx < trace.num_experts)).all()
            choices += idx.numel()
            owner = idx // local
            rows += sum(int((owner == r).any(1).sum()) for r in range(trace.num_ranks))
        # Sigmoid weights are normalised: four float32 terms and a division, each within 2^-24.
        for weights in batch.topk_weights:
            torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)), rtol=2.0**-20, atol=0.0)
    total = next(line for line in output.splitlines() if line.startswith("│ all"))
    assert [f"{choices:,}", f"{rows:,}"] == re.findall(r"[\d,]+,\d{3}", total)[1:3]


def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    done = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "deepep", "demo", "--steps", "2", "--out", str(tmp_path / "o"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Equal: all 4 losses") == 1
    assert (tmp_path / "o" / "routing.safetensors").exists()


@pytest.mark.parametrize(("option", "value", "named"), [("--ranks", "0", "ranks"), ("--steps", "1", "steps")])
def test_bad_options_are_refused(option: str, value: str, named: str) -> None:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [option, value])
    assert done.exit_code == 2
    assert f"{named}: got {value}" in done.output


def test_every_rank_reads_its_own_part_of_the_same_text() -> None:
    parts = [TextShard(SMALL, rank) for rank in range(SMALL.num_ranks)]
    text = library_text()
    assert b"def " in text
    assert bytes(torch.cat([p.bytes for p in parts]).tolist()[:1000]) == text[:1000]
    inputs, targets = parts[1].batch(3)
    assert torch.equal(inputs, parts[1].batch(3)[0])
    assert not torch.equal(inputs, parts[1].batch(4)[0])
    assert inputs.shape == targets.shape == (SMALL.sequences, SMALL.context)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[0].tolist()) in bytes(parts[1].bytes.tolist())


@pytest.mark.parametrize(
    ("parallel", "single", "worst"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], (0.0, 0, 0)),
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0 + 2.0**-40]], (2.0**-40, 1, 1)),
        ([[float("nan")]], [[1.0]], (float("inf"), 0, 0)),
        ([[float("nan")]], [[float("nan")]], (0.0, 0, 0)),
    ],
)
def test_any_difference_is_a_difference(parallel: Any, single: Any, worst: Any) -> None:
    comparison = Comparison(TrainingOutcome(parallel, ["w"]), TrainingOutcome(single, ["w"]))
    assert comparison.worst == worst
    assert comparison.equal == (worst[0] == 0.0)
    assert not Comparison(TrainingOutcome(parallel, ["w"]), TrainingOutcome(single, ["v"])).equal


def train_with_defect(context: Any, config: DemoConfig, defect: str) -> TrainingOutcome | None:
    """The ranks' run with something wrong in it; what it came to, on rank 0."""
    import deepep.demo.train as train
    import deepep.nn.exchange as exchange

    if defect == "gradients of one rank only":
        train.sum_gradients = lambda parameters, group: None
    elif defect == "gradients off by a millionth":
        real_sum = train.sum_gradients

        def nearly(parameters: Any, group: Any) -> None:
            real_sum(parameters, group)
            for parameter in parameters:
                parameter.grad.mul_(1 + 1e-6)

        train.sum_gradients = nearly
    elif defect == "a row too late in the sum":
        real = exchange._combine
        exchange._combine = lambda y, *rest: real(y.roll(1, 0), *rest)
    elif defect == "weights lost on the way home":
        real_backward = exchange._dispatch_backward

        def without_weights(*args: Any) -> Any:
            grad_x, grad_weights = real_backward(*args)
            return grad_x, torch.zeros_like(grad_weights)

        exchange._dispatch_backward = without_weights
    records = train.train_rank(context.group, config)
    return None if records is None else outcome(records)


@pytest.mark.parametrize(
    "defect",
    [
        "",
        "gradients of one rank only",
        "gradients off by a millionth",
        "a row too late in the sum",
        "weights lost on the way home",
    ],
)
def test_the_comparison_catches_what_is_wrong_with_the_exchange(world_of: Any, defect: str) -> None:
    world = world_of(2)
    try:
        parallel = world.run(train_with_defect, SMALL, defect)[0]
    finally:
        if defect:
            world.discard()  # its processes are spoilt
    assert Comparison(parallel, train_single(SMALL)).equal == (not defect)


def test_the_model_learns_the_same_on_one_rank_and_on_two(world_of: Any) -> None:
    """The same shards in one process with one rank, an all-gathered batch, against two ranks, in float64.

    Independent of the arrangement of sums that makes the demo's bits equal. Bound: gradients are sums of at
    most 2^12 float64 terms of order 1; AdamW divides a difference by no less than its epsilon, 1e-8, times
    at most the learning rate: 2^-53 * 2^12 / 1e-8 * 6e-3 is below 1e-6 per step where a gradient is nothing
    but noise. Top-k weights travel as float32 on both sides, from equal logits up to 2^-40, so they round
    apart now and then by 2^-24, 6e-8.
    """

    def train(context: Any, config: DemoConfig, shards: int) -> list[float]:
        import torch.distributed as dist

        from deepep import Buffer
        from deepep.demo.train import Trainer

        torch.set_default_dtype(torch.float64)
        buffer = Buffer(context.group, timeout=30.0)
        try:
            trainer = Trainer(buffer, config)
            if shards > 1:
                parts = [TextShard(replace(config, num_ranks=shards), rank) for rank in range(shards)]

                class Everything:
                    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
                        return tuple(map(torch.cat, zip(*(p.batch(step) for p in parts), strict=True)))

                trainer.shard = Everything()
            losses = torch.tensor([trainer.step(step) for step in range(config.steps)])
            dist.all_reduce(losses, group=context.group)
            return (losses / config.num_ranks).tolist()
        finally:
            buffer.destroy()
            torch.set_default_dtype(torch.float32)

    spread = world_of(2).run(train, SMALL, 1)[0]
    together = world_of(1).run(train, replace(SMALL, num_ranks=1), 2)[0]
    assert spread == pytest.approx(together, abs=1e-5)
    assert spread[-1] < spread[0]
