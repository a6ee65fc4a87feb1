"""`deepep demo --data-parallel`: gradients between ranks on an emulated cluster, torch's way and ours."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from deepep.cli.terminal import make_console

if TYPE_CHECKING:
    from deepep.demo.config import DemoConfig

MOST_OFF = 0.005
"""Nats per byte by which the loss of the last 16 steps may differ from float32's, from 64 steps on."""
LEAST_STEPS = 64
CLUSTER = "interleaved"


def run_gradients(config: DemoConfig, compression: str, out: Path, probe_seconds: float = 20.0) -> bool:
    """Trains by torch's gloo and by `compression`, shows both and draws a picture; False if losses differ.

    Raises ArgumentError for a compression that is none. Without the rights for an emulated network the ranks
    are on the loopback, and the output says so.
    """
    from deepep.demo.compressed import last_mean
    from deepep.demo.network_picture import draw_network
    from deepep.parallel.config import ParallelConfig
    from deepep.sim import World
    from deepep.sim.links.clusters import cluster
    from deepep.sim.links.emulated import EmulatedNetwork, NetworkError

    ParallelConfig(compression)
    console = make_console()
    ranks = config.num_ranks
    with ExitStack() as stack:
        network, title = None, "Loopback"
        try:
            network = stack.enter_context(EmulatedNetwork(cluster(CLUSTER, ranks)))
            title = "Two racks, ranks dealt round-robin"
        except (NetworkError, ValueError) as error:
            console.print(f"no emulated network, so on the loopback: {error}", soft_wrap=True)
        world = stack.enter_context(World(ranks, timeout=3600.0, network=network))
        speeds = world.run(_probe)[0]
        console.print(f"{title}; groups found: {speeds.groups}")
        torchs, ours = (world.run(_train, config, way, probe_seconds)[0] for way in ("torch", compression))
    table = Table(
        "gradients", "loss, last 16 steps", "kB a step and rank", "backward, ms (median)", "formats"
    )
    for name, run in (("torch's gloo", torchs), (f"deepep, {compression}", ours)):
        ordered = sorted(run.seconds[1:] or run.seconds)
        formats = sorted({codec for step in run.codecs for codec in step})
        table.add_row(
            name,
            f"{last_mean(run.losses):.5f}",
            f"{sum(run.bytes) / len(run.bytes) / 1e3:.0f}",
            f"{1e3 * ordered[len(ordered) // 2]:.0f}",
            ", ".join(formats),
        )
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "data_parallel.png"
    draw_network(picture, title, speeds, torchs, ours, compression)
    console.print(f"Picture: {picture}", soft_wrap=True)
    gap = abs(last_mean(ours.losses) - last_mean(torchs.losses))
    console.print(f"Losses differ by {gap:.5f}; allowed from {LEAST_STEPS} steps on: {MOST_OFF}")
    return gap <= MOST_OFF or config.steps < LEAST_STEPS


def _probe(context: Any) -> Any:
    from deepep.demo.data_parallel import probe_links

    return probe_links(context.group)


def _train(context: Any, config: DemoConfig, compression: str, probe_seconds: float) -> Any:
    from deepep.demo.data_parallel import train_gradients

    return train_gradients(context.group, config, compression, probe_seconds)
