"""`deepep bench`: measure dispatch and combine, next to what the links allow and to others."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from deepep.bench.elastic.rank import run_elastic_rank
from deepep.bench.figures import BenchReport
from deepep.bench.layer.rank import run_layer_rank
from deepep.bench.low_latency.rank import run_low_latency_rank
from deepep.bench.overlap.rank import run_overlap_rank
from deepep.bench.rank import run_rank
from deepep.bench.sweep import Shape, Sweep
from deepep.cli.launcher import launched_ranks, refusals_raised
from deepep.cli.terminal import FAILED, demand_file, demand_use, make_console, misused
from deepep.errors import ArgumentError
from deepep.trace import RoutingTrace, TraceError

#: Longest a run may take, and longest a rank waits for another, in seconds.
RUN_TIMEOUT = 3600.0
PEER_TIMEOUT = 300.0


def command(
    context: typer.Context,
    ranks: Annotated[
        int | None, typer.Option(help="Processes, one rank each. Default: one for each GPU; on CPU 2.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")] = None,
    mode: Annotated[
        str, typer.Option(help="throughput, elastic, low-latency, layer or overlap.")
    ] = "throughput",
    tokens: Annotated[
        str,
        typer.Option(
            help="T, of a rank. [4096,128; low latency 1..512; layer 4096,512; overlap 4096; on CPU 64; 1,8]"
        ),
    ] = "",
    hidden: Annotated[str, typer.Option(help="H. [7168; on CPU 512]")] = "",
    topk: Annotated[str, typer.Option(help="K. [8; on CPU 4; a trace's own]")] = "",
    experts: Annotated[
        str, typer.Option(help="E, of all ranks. [256; layer 64; on CPU 8 a rank; a trace's own]")
    ] = "",
    width: Annotated[
        int | None, typer.Option(help="Of a layer's experts, or products. [2048; on CPU 64]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="What is dispatched.")] = "bf16,fp8",
    sms: Annotated[str | None, typer.Option(help="SM counts. [8,16,24; others choose themselves]")] = None,
    routing: Annotated[str, typer.Option(help="uniform, zipf or trace.")] = "uniform",
    trace: Annotated[Path | None, typer.Option(help="A routing trace (docs/trace.md).")] = None,
    layer: Annotated[int, typer.Option(help="The layer of the trace whose routing is used.")] = 0,
    scales: Annotated[str, typer.Option(help="How FP8 scales lie: row-major or column-major.")] = "row-major",
    peers: Annotated[str, typer.Option(help="What else is measured; empty: nothing.")] = "all_to_all,deep_ep",
    backend: Annotated[
        str | None, typer.Option(help="Backend of Buffer; else the one it would choose.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Compare a result of each operation with the reference first.")
    ] = True,
    iterations: Annotated[int, typer.Option(help="Samples of each figure, at least 50.")] = 60,
    warmup: Annotated[int, typer.Option(help="Calls before the samples.")] = 10,
    seed: Annotated[int, typer.Option(help="Of routing and rows.", min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw time by SM count, in low latency by T, here (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Measures get_dispatch_layout, dispatch and combine: operation-complete time of the slowest rank, median
    and p99, and host time; all_to_all and deep_ep in the same run; and the floor, a plain copy of the same
    bytes. With --mode low-latency the calls of that mode, their halves and pairs in a graph, against a bare
    exchange. With --mode elastic the calls of ElasticBuffer, with a row for each token and for each of its
    experts. With --mode layer an MoE layer, forward (without gradients) and forward + backward, against
    plain torch and its matrix products alone. With --mode overlap a dispatch or combine beside matrix
    products of about its length, against the same products beside blocks that hold as many SMs.

    Numbers may be lists ("4096,128"). Under torchrun the ranks are torchrun's. Exit status 1 if a
    result is wrong, 2 for misuse.
    """
    console = make_console()
    if json_file is not None:
        demand_file("--json", json_file)
    if plot is not None:
        demand_file("--plot", plot, (".png", ".svg", ".pdf"))
    unused = [name for name, used in (("width", mode in ("layer", "overlap")), ("layer", trace)) if not used]
    demand_use(
        context, context.params.keys() - unused, "--width with a layer or overlap, --layer with a trace"
    )
    launched = launched_ranks()
    if launched is not None:
        demand_use(context, context.params.keys() - {"ranks"}, "without torchrun, whose ranks these are")
    try:
        cuda = _on_cuda(device)
        num_ranks = ranks if launched is None else launched
        num_ranks = num_ranks if num_ranks is not None else (torch.cuda.device_count() if cuda else 2)
        own = RoutingTrace.load(trace) if trace is not None else None
        is_decode, is_layer = mode == "low-latency", mode == "layer"
        few, many = ("1,8", "1,8,32,64,128,256,512") if is_decode else ("64", "4096,128")
        many = {"layer": "4096,512", "overlap": "4096"}.get(mode, many)
        small = {"tokens": few, "hidden": "512", "topk": "4", "experts": str(8 * num_ranks)}
        large = {"tokens": many, "hidden": "7168", "topk": "8", "experts": "64" if is_layer else "256"}
        default = large if cuda else small
        if own is not None:
            default |= {"topk": str(own.num_topk), "experts": str(own.num_experts)}
        sweep = Sweep(
            num_ranks=num_ranks,
            shapes=tuple(
                Shape(t, h, k, e)
                for h in _numbers("hidden", hidden or default["hidden"])
                for k in _numbers("topk", topk or default["topk"])
                for e in _numbers("experts", experts or default["experts"])
                for t in _numbers("tokens", tokens or default["tokens"])
            ),
            dtypes=_words(dtype),  # type: ignore[arg-type]  # Sweep checks them
            sms=_sm_counts(sms, cuda, is_decode or is_layer),
            routing=routing,
            trace=None if trace is None else str(trace.resolve()),
            layer=layer,
            scales=scales,
            peers=_words(peers),
            backend=backend,
            check=check,
            iterations=iterations,
            warmup=warmup,
            seed=seed,
            mode=mode,
            width=width if width is not None else (2048 if cuda else 64),
        )
        if plot is not None and mode in ("layer", "overlap"):
            raise ArgumentError("plot", str(plot), f"none: {mode} has nothing to draw over")
        if cuda and not sweep.sms and not (is_decode or is_layer):
            raise ArgumentError("sms", "none", "one SM count or more")
        if cuda and not launched is not None and num_ranks > torch.cuda.device_count():
            raise ArgumentError("ranks", str(num_ranks), f"at most the {torch.cuda.device_count()} GPUs")
    except (ArgumentError, TraceError, OSError) as error:
        misused(error)
    # All-to-all does not use NVLink multicast, and NCCL need not set up what a host may not permit.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    try:
        report = (
            _run_under_torchrun(sweep, cuda) if launched is not None else _run_in_own_processes(sweep, cuda)
        )
    except (ArgumentError, TraceError) as error:
        misused(error)
    if report is None:  # a rank of torchrun's other than 0
        return
    _show(report, console, json_file, plot)


def _show(report: BenchReport, console: Console, json_file: Path | None, plot: Path | None) -> None:
    from deepep.bench.layer.table import print_layer_report
    from deepep.bench.low_latency.table import print_low_latency_report
    from deepep.bench.overlap.table import print_overlap_report
    from deepep.bench.table import print_report

    launcher = f"torchrun --nproc-per-node {report.environment['ranks']}" if launched_ranks() else "python"
    report.environment["command"] = f"{launcher} -m deepep {shlex.join(sys.argv[1:])}"
    if report.environment.get("mode") == "low-latency":
        print_low_latency_report(report, console)
    elif report.environment.get("mode") == "layer":
        print_layer_report(report, console)
    elif report.environment.get("mode") == "overlap":
        print_overlap_report(report, console)
    else:
        print_report(report, console)
    if json_file is not None:
        report.save(json_file)
        console.print(f"wrote {json_file}", soft_wrap=True)
    if plot is not None:
        from deepep.bench.low_latency.plot import draw_curves
        from deepep.bench.plot import draw_report

        (draw_curves if report.environment.get("mode") == "low-latency" else draw_report)(report, plot)
        console.print(f"wrote {plot}", soft_wrap=True)
    if report.problems:
        raise typer.Exit(FAILED)


def _run_in_own_processes(sweep: Sweep, cuda: bool) -> BenchReport:
    from deepep.sim import World

    backend = "nccl" if cuda else "gloo"
    with World(sweep.num_ranks, backend=backend, timeout=PEER_TIMEOUT) as world, refusals_raised():
        return world.run(_run_one, sweep, timeout=RUN_TIMEOUT)[0]


def _run_one(context: Any, sweep: Sweep) -> BenchReport | None:
    """In a rank process; rank 0 prints progress on the terminal it shares with the parent."""
    report = _runner(sweep)(context.group, context.device, sweep, _progress(context.rank))
    return report if context.rank == 0 else None


def _run_under_torchrun(sweep: Sweep, cuda: bool) -> BenchReport | None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=PEER_TIMEOUT))
    try:
        rank = dist.get_rank()
        report = _runner(sweep)(dist.group.WORLD, device, sweep, _progress(rank))
        return report if rank == 0 else None
    finally:
        dist.destroy_process_group()


def _runner(sweep: Sweep) -> Callable[..., BenchReport]:
    modes = {
        "elastic": run_elastic_rank,
        "low-latency": run_low_latency_rank,
        "layer": run_layer_rank,
        "overlap": run_overlap_rank,
    }
    return modes.get(sweep.mode, run_rank)


def _sm_counts(given: str | None, cuda: bool, refuses: bool) -> tuple[int, ...]:
    """Ascending; none on CPU, which has none to choose. Low latency and the layer refuse any."""
    if (refuses and given is None) or not (cuda or refuses):
        return ()
    return tuple(sorted(_numbers("sms", "8,16,24" if given is None else given)))


def _progress(rank: int) -> Callable[[str], None]:
    if rank != 0:
        return lambda line: None
    console = make_console(stderr=True)
    return lambda line: console.print(line, style="dim")


def _on_cuda(device: str | None) -> bool:
    if device not in (None, "cuda", "cpu"):
        raise ArgumentError("device", str(device), "cuda or cpu")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ArgumentError("device", "cuda", "cpu: torch sees no CUDA device")
    return there and device != "cpu"


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in _words(text)))
    except ValueError:
        raise ArgumentError(name, text, "whole numbers with commas between them") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
