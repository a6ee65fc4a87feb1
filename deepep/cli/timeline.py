"""`deepep timeline`: pictures of what each rank does when, in a training step and in a decode step."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from deepep.cli.launcher import refusals_raised
from deepep.cli.terminal import demand_folder, make_console, misused
from deepep.errors import ArgumentError

TIMEOUT = 300.0
#: Seconds that a rank's kernels and host wait for another's.
PEER_TIMEOUT = 60.0


def command(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their spans.")] = Path("timeline"),
    ranks: Annotated[
        int | None, typer.Option(help="Processes. Default: a GPU's each, 2 at least.", min=1)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Backend of Buffer; else the one it would choose.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a rank, trained. [4096; on CPU 64]", min=1)
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option(help="Of each micro-batch. [128; on CPU 8]", min=1)
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="H. [7168; on CPU 256]", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Of a trained expert. [2048; on CPU 64]", min=1)] = None,
    topk: Annotated[int, typer.Option(help="K.", min=1)] = 4,
    experts: Annotated[int, typer.Option(help="Experts of a rank.", min=1)] = 4,
) -> None:
    """Records a step of training and one of decode on every rank: what the host called and, on GPUs, each
    stream's kernels, by torch's profiler. Ranks may share a GPU: they take turns on it, unless MPS runs.

    Writes training.png, decode.png and the spans of both as JSON.
    """
    from deepep.bench.timeline.picture import draw
    from deepep.bench.timeline.steps import StepShape
    from deepep.sim import World

    console = make_console()
    demand_folder("--out", out)
    there = torch.cuda.is_available()
    if device not in (None, "cpu", "cuda") or (device == "cuda" and not there):
        misused(f"--device: got {device}; allowed: cpu{', or cuda' if there else ''}")
    cuda = there and device != "cpu"
    size = ranks or (max(2, torch.cuda.device_count()) if cuda else 2)
    small = not cuda
    shape = StepShape(
        tokens=tokens or (64 if small else 4096),
        decode_tokens=decode_tokens or (8 if small else 128),
        hidden=hidden or (256 if small else 7168),
        width=width or (64 if small else 2048),
        topk=topk,
        experts=experts * size,
    )
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if cuda and size > torch.cuda.device_count():
        # Ranks that share a GPU must each find room for all blocks of a kernel: those wait for each other.
        share = 100 // -(-size // torch.cuda.device_count())
        os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(share))
    try:
        with World(size, backend="nccl" if cuda else "gloo", timeout=TIMEOUT) as world, refusals_raised():
            found: dict[str, Any] = world.run(record_both, shape, backend)[0]
    except ArgumentError as error:
        misused(error)
    out.mkdir(parents=True, exist_ok=True)
    on = torch.cuda.get_device_name() if cuda else "CPU"
    for name, spans in found.items():
        title = f"{name} step, {size} ranks, {on}"
        draw(spans, title, out / f"{name}.png")
        about = {"title": title, "date": str(date.today()), **asdict(shape)}
        plain = {**about, "ranks": [[asdict(span) for span in mine] for mine in spans]}
        (out / f"{name}.json").write_text(json.dumps(plain) + "\n")
        console.print(f"wrote {out / name}.png", soft_wrap=True)


def record_both(context: Any, shape: Any, backend: str | None) -> dict[str, Any]:
    """On a rank of a world (deepep.sim): the spans of both steps, by step, then by rank."""
    from deepep.api.buffer import Buffer
    from deepep.bench.timeline.record import record
    from deepep.bench.timeline.steps import decode_step, training_step

    group, device, found = context.group, context.device, {}

    def say(line: str) -> None:
        if context.rank == 0:
            print(f"deepep timeline: {line}", file=sys.stderr, flush=True)

    options: dict[str, Any] = {"low_latency_mode": True, "timeout": PEER_TIMEOUT}
    with Buffer(group, backend=backend, device=device, **options) as buffer:
        for name, make in (("training", training_step), ("decode", decode_step)):
            say(f"{name}: weights")
            step = make(buffer, shape, device)
            found[name] = record(group, device, step, say=say)
    return found
