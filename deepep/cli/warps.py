"""`deepep warps`: time lines of the kernels' warps, recorded in one call of each kind and drawn."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from deepep.api.warp_lines import calls_of, trace_of
from deepep.cli.launcher import refusals_raised
from deepep.cli.terminal import demand_folder, make_console, misused
from deepep.errors import ArgumentError

TIMEOUT = 300.0
#: Seconds that a rank's kernels and host wait for another's.
PEER_TIMEOUT = 60.0


def command(
    traces: Annotated[
        list[Path] | None, typer.Argument(help="Traces that record_warps has saved, to draw. None: record.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the trace.")] = Path("warps"),
    ranks: Annotated[
        int | None, typer.Option(help="Processes. Default: a GPU's each, 2 at least.", min=1)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="T of the throughput mode. [4096; on CPU 16]", min=1)
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option(help="T of low latency. [128; on CPU 8]", min=1)
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="H. [7168; on CPU 512]", min=1)] = None,
    topk: Annotated[int, typer.Option(help="K.", min=1)] = 4,
    experts: Annotated[int, typer.Option(help="Experts of a rank.", min=1)] = 4,
    late: Annotated[int | None, typer.Option(help="A rank that comes late to each call.", min=0)] = None,
    late_ms: Annotated[float, typer.Option(help="By so much; on GPUs.", min=0.0)] = 1.0,
) -> None:
    """Records what each warp of the kernels does when, in a dispatch and a combine of each mode, and
    draws it; or draws traces that a program has saved. Without a GPU on the emulator, in its machine's time.

    Writes a picture of each call and, where it records, trace.json, for ui.perfetto.dev.
    """
    from deepep.bench.timeline.warps import draw

    console = make_console()
    demand_folder("--out", out)
    if traces:
        calls, on = [call for path in traces for call in _read(path)], "as saved"
    else:
        there = torch.cuda.is_available()
        if device not in (None, "cpu", "cuda") or (device == "cuda" and not there):
            misused(f"--device: got {device}; allowed: cpu{', or cuda' if there else ''}")
        cuda = there and device != "cpu"
        size = ranks or (max(2, torch.cuda.device_count()) if cuda else 2)
        if late is not None and (late >= size or not cuda):
            misused(f"--late: got {late}; allowed: {f'0 to {size - 1}' if cuda else 'on GPUs alone'}")
        shape = {
            "tokens": tokens or (4096 if cuda else 16),
            "decode_tokens": decode_tokens or (128 if cuda else 8),
            "hidden": hidden or (7168 if cuda else 512),
            "topk": topk,
            "experts": experts * size,
        }
        calls = _record(size, cuda, shape, late, late_ms)
        on = torch.cuda.get_device_name() if cuda else "emulator"
    if not any(call.warps for call in calls):
        misused("no call has time lines")
    out.mkdir(parents=True, exist_ok=True)
    if not traces:
        (out / "trace.json").write_text(json.dumps(trace_of(calls)) + "\n")
        console.print(f"wrote {out / 'trace.json'}", soft_wrap=True)
    for name, group in _by_call(calls).items():
        draw(group, f"{name.replace('_', ' ')}, {on}", out / f"{name}.png")
        console.print(f"wrote {out / name}.png", soft_wrap=True)


def _read(path: Path) -> list[Any]:
    try:
        return calls_of(json.loads(path.read_text()))
    except (OSError, ValueError) as problem:
        misused(f"{path}: {problem}")


def _by_call(calls: list[Any]) -> dict[str, list[Any]]:
    """Calls of all ranks that belong together: the n-th of each operation on every rank."""
    seen: dict[tuple[str, int], int] = {}
    found: dict[str, list[Any]] = {}
    for call in calls:
        number = seen[call.operation, call.rank] = seen.get((call.operation, call.rank), 0) + 1
        if call.warps:
            found.setdefault(call.operation + (f"_{number}" if number > 1 else ""), []).append(call)
    return found


def _record(size: int, cuda: bool, shape: dict[str, int], late: int | None, late_ms: float) -> list[Any]:
    """On ranks of their own: the calls of all."""
    from deepep.sim import World

    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if cuda and size > torch.cuda.device_count():
        # Ranks that share a GPU must each find room for all blocks of a kernel: those wait for each other.
        share = 100 // -(-size // torch.cuda.device_count())
        os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(share))
    try:
        with World(size, backend="nccl" if cuda else "gloo", timeout=TIMEOUT) as world, refusals_raised():
            found = world.run(record_calls, shape, None if cuda else "emulator", late, late_ms)
    except ArgumentError as error:
        misused(error)
    return [call for calls in found for call in calls]


def record_calls(
    context: Any, shape: dict[str, int], backend: str | None, late: int | None, late_ms: float
) -> list[Any]:
    """On a rank of a world (deepep.sim): its calls, the second of each kind."""
    from deepep.api.buffer import Buffer
    from deepep.bench.timeline.record import meet

    device, experts = context.device, shape["experts"]
    torch.manual_seed(context.rank)

    def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(tokens, shape["hidden"], device=device).bfloat16()
        scores = torch.rand(tokens, experts, device=device)
        weights, idx = scores.topk(shape["topk"], dim=1)
        return x, idx, weights

    def come_late() -> None:
        if context.rank == late:
            torch.cuda.synchronize()
            time.sleep(late_ms / 1e3)

    x, idx, weights = inputs(shape["tokens"])
    few, few_idx, few_weights = inputs(shape["decode_tokens"])
    options: dict[str, Any] = {"low_latency_mode": True, "timeout": PEER_TIMEOUT}
    with Buffer(context.group, backend=backend, device=device, **options) as buffer:

        def once() -> None:
            come_late()
            sent = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, num_experts=experts)
            come_late()
            assert isinstance(sent.recv_x, torch.Tensor)
            assert sent.handle is not None
            buffer.combine(sent.recv_x, sent.handle)
            come_late()
            came = buffer.low_latency_dispatch(few, few_idx, len(few), experts, use_fp8=False)
            come_late()
            assert isinstance(came.recv_x, torch.Tensor)
            buffer.low_latency_combine(came.recv_x, few_idx, few_weights, came.handle)

        once()  # memory is made, kernels are loaded
        meet(context.group, device)
        with buffer.record_warps() as lines:
            once()
    return lines.calls
