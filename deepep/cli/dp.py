"""`deepep dp`: what data parallelism promises, checked or measured on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deepep.cli import (
    dp_backup,
    dp_bench,
    dp_efficiency,
    dp_faults,
    dp_hand_overs,
    dp_join,
    dp_networks,
    dp_topologies,
    dp_uneven,
)
from deepep.cli.terminal import FAILED, demand_use, make_console, misused
from deepep.errors import ArgumentError, RangeError

MOST_FP8, MOST_BF16 = 0.27, 0.52
"""Shares of float32's bytes on the wire that FP8 and BF16 may take."""
MOST_OFF, LEAST_OFF = 0.005, 0.05
"""Nats per byte: by which FP8's loss may differ from float32's, and by which the control's has to."""
_INSIDE = "DEEPEP_DP_NAMESPACE"


_USED = {
    "bits": ("cases",),
    "codec": ("blocks",),
    "bytes": ("ranks",),
    "convergence": ("ranks", "steps", "seed"),
    "topologies": ("ranks", "rounds", "pinned", "clusters", "sizes", "results"),
    "drift": (),
    "noise": ("ranks", "steps", "seed"),
    "uneven": ("steps",),
    "kill": ("ranks", "phases", "times", "seed"),
    "efficiency": ("ranks", "killed", "window", "simulate", "costs"),
    "bench": ("ranks", "sizes", "rounds", "kills"),
    "join": ("ranks", "times"),
    "handover": (),
    "backup": ("ranks", "times"),
}
"""The options of each check. Given to another, they are misuse."""


def command(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            help="bits, codec, bytes, convergence, topologies, drift, noise, uneven, kill, efficiency, join, "
            "handover, bench, backup."
        ),
    ],
    ranks: Annotated[
        int,
        typer.Option(
            help="Processes; not given: topologies 8, efficiency 20, bench one a GPU, 2 or more.", min=0
        ),
    ] = 0,
    cases: Annotated[int, typer.Option(help="bits: cases to draw, over 1 to 8 ranks.", min=1)] = 1000,
    blocks: Annotated[int, typer.Option(help="codec: blocks to compare with the oracle.", min=1)] = 20_000,
    steps: Annotated[
        int, typer.Option(help="convergence, noise, uneven: training steps; 0: 64, 160 and 20.", min=0)
    ] = 0,
    rounds: Annotated[int, typer.Option(help="topologies, bench: times that each way runs.", min=1)] = 5,
    pinned: Annotated[bool, typer.Option(help="topologies: every schedule by itself, too.")] = True,
    clusters: Annotated[str, typer.Option(help="topologies: of these alone, with commas between.")] = "",
    sizes: Annotated[
        str, typer.Option(help="topologies: of 4K,256K,4096K these alone; bench: 1M,64M,1G.")
    ] = "",
    kills: Annotated[bool, typer.Option("--kills/--no-kills", help="bench: a rank is killed, too.")] = True,
    results: Annotated[
        str, typer.Option(help="topologies: a file that keeps times, so that the rest can follow later.")
    ] = "",
    phases: Annotated[str, typer.Option(help="kill: of a step, with commas between; or all.")] = "all",
    times: Annotated[
        int, typer.Option(help="kill: runs for each phase; join, backup: for each size.", min=1)
    ] = 5,
    seed: Annotated[int, typer.Option(help="convergence: of weights, batches and dice; kill.")] = 0,
    killed: Annotated[int, typer.Option("--kill", help="efficiency: ranks that die.")] = 1,
    window: Annotated[float, typer.Option(help="efficiency: seconds from their death on.")] = 60.0,
    simulate: Annotated[int, typer.Option(help="efficiency: ranks to simulate; 0: measure.")] = 0,
    costs: Annotated[str, typer.Option(help="efficiency: file of times, written or simulated by.")] = "",
) -> None:
    """Checks one promise of data parallelism, and fails if it does not hold.

    bits: drawn all-reduces have the oracle's bits on every rank. codec: messages have the oracle's bits,
    and the formats' rates on one core. bytes: what crosses the network interface of a namespace made for
    it, by format (Linux, unshare). convergence: the demo's loss by format, with a control that is far too
    coarse. topologies: times on emulated clusters (`deepep links`) against torch's gloo. drift: a link that
    becomes slow has others planned. noise: formats that follow the gradients' noise, in the demo. kill: a
    rank that dies in a training step has the others go on, with the weights that they should have. uneven:
    ranks of several speeds, whose shares follow what is measured, against torch's equal ones. efficiency:
    samples that count in a minute in which ranks die, beside torchrun's restart; or simulated. join: for how
    long the others stop when a process takes its place, by the size of what it is given. handover: one
    joins a training with experts, and a newcomer or a member dies at each moment of it. backup: steps in
    which each rank copies the experts of the next one, beside steps without.
    bench: all-reduces beside torch's own, by NCCL on GPUs, in one run, with the CPU's bits; and a rank that
    is killed. Under torchrun its ranks take part.
    """
    from deepep.sim.links.emulated import NetworkError

    actions: dict[str, Callable[[], bool]] = {
        "bits": lambda: _bits(cases),
        "codec": lambda: _codec(blocks),
        "bytes": lambda: _bytes(ranks or 4),
        "convergence": lambda: _convergence(ranks or 4, steps or 64, seed),
        "topologies": lambda: dp_topologies.topologies(ranks or 8, rounds, pinned, clusters, sizes, results),
        "drift": dp_networks.drift,
        "noise": lambda: dp_networks.noise(ranks or 4, steps or 160, seed),
        "uneven": lambda: dp_uneven.uneven(steps or 20),
        "kill": lambda: dp_faults.kill(ranks or 6, phases, times, seed),
        "efficiency": lambda: (
            dp_efficiency.simulate(simulate, killed, costs)
            if simulate
            else dp_efficiency.efficiency(ranks or 20, killed, window, costs)
        ),
        "bench": lambda: dp_bench.bench(ranks, sizes, rounds, kills),
        "handover": dp_hand_overs.hand_overs,
        "join": lambda: dp_join.join(ranks or 4, times),
        "backup": lambda: dp_backup.backup(ranks or 3, times),
    }
    if what not in actions:
        misused(RangeError("what", repr(what), ", ".join(actions)))
    demand_use(context, ("what", *_USED[what]))
    if ranks == 1:
        misused(RangeError("ranks", "1", "2 or more"))
    try:
        passed = actions[what]()
    except NetworkError as error:
        make_console().print(f"{what}: no emulated network: {error}", soft_wrap=True)
        raise typer.Exit(FAILED) from None
    except ArgumentError as error:
        misused(error)
    if not passed:
        raise typer.Exit(FAILED)


def _bits(cases: int) -> bool:
    from deepep.sim import World
    from deepep.sim.rules.reductions import failing_reductions

    console, failed, first = make_console(), [], 0
    started = time.perf_counter()
    for num_ranks in range(1, 9):
        count = (cases - first) // (9 - num_ranks)
        with World(num_ranks, timeout=1800.0) as world:
            for of_rank in world.run(failing_reductions, range(first, first + count)):
                failed += of_rank
        console.print(f"{num_ranks} ranks: {count} cases")
        first += count
    for text in failed[:10]:
        console.print(text, soft_wrap=True)
    seconds = time.perf_counter() - started
    console.print(
        f"{cases} cases in {seconds:.0f} s, {len(failed)} results with other bits than the oracle's"
    )
    return not failed


def _codec(blocks: int) -> bool:
    """Rates by the thread's own clock: other work on the machine does not count."""
    import torch

    from deepep.collectives.codecs import LOSSY, FixedPoint, Messages, rounding_key
    from deepep.sim.rules.gradients import differing_messages

    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 1e-3
    into, size = torch.empty_like(values), values.numel() * 4

    def rate(action: Callable[[], object]) -> str:
        best = float("inf")
        for _ in range(15):
            started = time.thread_time()
            action()
            best = min(best, time.thread_time() - started)
        return f"{size / best / 1e9:.1f}"

    table = Table("GB/s of float32", "encode, by dice", "to nearest", "decode", "decode and add")
    for name in LOSSY:
        dice, nearest = Messages(name, key=rounding_key(1)), Messages(name)
        message = nearest.encode(values, 0)
        table.add_row(
            name,
            rate(partial(dice.encode, values, 0)),
            rate(partial(nearest.encode, values, 0)),
            rate(partial(nearest.decode, message, into)),
            rate(partial(nearest.decode, message, into, add=True)),
        )
    fixed = FixedPoint(FixedPoint.exponents_of(values), 2)
    integers = fixed.encode(values)
    table.add_row(
        "fixed32", "", rate(lambda: fixed.encode(values)), rate(lambda: fixed.decode(integers, 4.0)), ""
    )
    console = make_console()
    console.print(table)
    differing = differing_messages(blocks)
    for text in differing[:10]:
        console.print(text)
    console.print(f"{blocks:,} blocks, encoded to nearest and by dice: {len(differing)} chunks differ")
    return not differing


def _bytes(ranks: int) -> bool:
    if os.environ.get(_INSIDE):
        return _bytes_inside(ranks)
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        make_console().print("bytes: needs Linux, with unshare and ip")
        return False
    script = f"ip link set lo up && exec {sys.executable} -m deepep dp bytes --ranks {ranks}"
    done = subprocess.run(["unshare", "-rn", "sh", "-c", script], env={**os.environ, _INSIDE: "1"})
    return done.returncode == 0


def _bytes_inside(ranks: int) -> bool:
    """In a network namespace of our own, whose loopback carries nothing but what ranks send."""
    from deepep.sim import World

    count = 2 << 20  # elements: 8 MiB of float32
    table = Table("format", "bytes on the interface", "of float32", "by our own count")
    counted: dict[str, int] = {}
    with World(ranks, timeout=600.0) as world:
        for codec in ("plain", "bf16", "fp16", "fp8"):
            world.run(_reduce_often, codec, 0, 1)  # connects
            before = _carried()
            sent = sum(world.run(_reduce_often, codec, count, 4))
            counted[codec] = _carried() - before
            share = f"{counted[codec] / counted['plain']:.4f}"
            table.add_row(codec, f"{counted[codec]:,}", share, f"{sent:,}")
    make_console().print(table)
    fp8, bf16 = (counted[name] / counted["plain"] for name in ("fp8", "bf16"))
    return fp8 <= MOST_FP8 and bf16 <= MOST_BF16


def _carried() -> int:
    """Bytes that the loopback interface has carried, by the kernel's counter."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    raise OSError("/proc/net/dev: no loopback interface")


def _reduce_often(context: Any, codec: str, count: int, times: int) -> int:
    """In a rank's process: the bytes that it has sent."""
    import torch

    from deepep.collectives import Communicator, ReductionPlan

    if "comm" not in context.scratch:
        context.scratch["comm"] = Communicator(context.group, timeout=300.0)
    comm = context.scratch["comm"]
    before = comm.bytes_sent
    for number in range(times):
        values = torch.randn(count, generator=torch.Generator().manual_seed(context.rank + 100 * number))
        comm.all_reduce(values, ReductionPlan("direct", codec), mean=True, dice=(0, number, 0))
    return int(comm.bytes_sent - before)


def _convergence(ranks: int, steps: int, seed: int) -> bool:
    from deepep.demo.compressed import CONTROL, FORMATS, last_mean
    from deepep.demo.config import DemoConfig
    from deepep.sim import World

    config = DemoConfig.for_ranks(ranks, steps, seed)
    means: dict[str, float] = {}
    table = Table("gradients", "mean loss of the last 16 steps", "against float32")
    with World(ranks, timeout=3600.0) as world:
        for form in FORMATS:
            means[form] = last_mean(world.run(_train_one, form, config)[0])
            off = means[form] - means["off"]
            table.add_row("float32" if form == "off" else form, f"{means[form]:.5f}", f"{off:+.5f}")
    make_console().print(table)
    gaps = {form: abs(mean - means["off"]) for form, mean in means.items()}
    return gaps["fp8"] <= MOST_OFF and gaps[CONTROL] >= LEAST_OFF


def _train_one(context: Any, form: str, config: Any) -> list[float]:
    from deepep.demo.compressed import train_with

    return train_with(context.group, form, config)
