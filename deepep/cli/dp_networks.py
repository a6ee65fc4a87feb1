"""`deepep dp topologies`, `drift` and `noise`: plans on emulated clusters, and formats by the noise."""

from __future__ import annotations

import os
from typing import Any

from rich.table import Table

from deepep.cli.terminal import make_console

MOST_MEAN, MOST_ONE = 0.78, 1.05
"""Of torch's gloo: the geometric mean over clusters and sizes, and the worst of them."""
MOST_INTERLEAVED, MOST_FAR, MOST_RACKS_FP8, MOST_OF_BEST = 0.40, 0.35, 0.50, 1.10
"""Of torch's gloo: 4 MiB between interleaved racks, 4 KiB at 10 ms, 4 MiB in FP8 between racks in order; and
of the best schedule that was pinned, in the same run.
"""
MOST_STEPS, USUAL_STEPS = 40, 30
"""Operations until a slowed link has others planned; and those before it is slowed."""
MOST_ABOVE, MOST_BYTES, MAX_NOISE = 0.05, 0.33, 0.02
"""Share of steps and buckets with more noise than allowed; bytes of float32's; the noise that is allowed."""
SMALL, LARGE = 4 << 10, 4 << 20


def topologies(ranks: int, rounds: int, pinned: bool) -> bool:
    """Times on five emulated clusters against torch's gloo in the same run; True if all bars hold."""
    from deepep.collectives.cost import geometric_mean
    from deepep.sim.links.clusters import CLUSTERS, cluster
    from deepep.sim.links.comparing import CHOSEN, CHOSEN_FP8, GLOO, PINNED, SIZES, compare

    console = make_console()
    columns = ("cluster", "KiB", "gloo, ms", "chosen", "of gloo", "fp8", "of gloo")
    table = Table(*columns, *(PINNED if pinned else ()))
    shares, without, bars = [], [], []
    for name in CLUSTERS:
        found = compare(cluster(name, ranks), rounds, pinned)
        console.print(f"{name}: groups {found.groups}")
        for size in SIZES:
            seconds = found.seconds[size]
            share = seconds[CHOSEN] / seconds[GLOO]
            shares.append(share)
            table.add_row(
                name,
                str(size >> 10),
                f"{1e3 * seconds[GLOO]:.0f}",
                f"{1e3 * seconds[CHOSEN]:.0f} {found.plans[size][CHOSEN]}",
                f"{share:.2f}",
                f"{1e3 * seconds[CHOSEN_FP8]:.0f} {found.plans[size][CHOSEN_FP8]}",
                f"{seconds[CHOSEN_FP8] / seconds[GLOO]:.2f}",
                *(f"{1e3 * seconds[way]:.0f}" if way in seconds else "-" for way in PINNED if pinned),
            )
            bars.append((f"{name}, {size >> 10} KiB", share, MOST_ONE))
            ours = [seconds[way] for way in PINNED if way in seconds]
            if ours:
                bars.append(
                    (f"{name}, {size >> 10} KiB, of the best", seconds[CHOSEN] / min(ours), MOST_OF_BEST)
                )
                without.append(min(s for way, s in seconds.items() if way in PINNED[1:]) / seconds[GLOO])
            if (name, size) == ("interleaved", LARGE):
                bars.append(("interleaved, 4 MiB", share, MOST_INTERLEAVED))
            if (name, size) == ("far", SMALL):
                bars.append(("far, 4 KiB", share, MOST_FAR))
            if (name, size) == ("racks", LARGE):
                bars.append(("racks, 4 MiB, fp8", seconds[CHOSEN_FP8] / seconds[GLOO], MOST_RACKS_FP8))
    console.print(table)
    bars.append(("geometric mean", geometric_mean(shares), MOST_MEAN))
    missed = [bar for bar in bars if bar[1] > bar[2]]
    for what, got, most in missed:
        console.print(f"{what}: {got:.2f}; allowed: at most {most:.2f}")
    text = f"geometric mean {geometric_mean(shares):.2f} of gloo, the worst {max(shares):.2f}"
    if without:
        text += f"; the best of ours without native {geometric_mean(without):.2f}"
    console.print(f"{text}; load average {os.getloadavg()[0]:.0f}")
    return not missed


def drift() -> bool:
    """A port that becomes slow has plans measured again, and changes no bit; True if it does so in time."""
    from deepep.sim import World
    from deepep.sim.links.clusters import cluster
    from deepep.sim.links.emulated import EmulatedNetwork

    flat, console = cluster("flat", 4), make_console()
    versions, digests = {}, {}
    for is_slowed in (False, True):
        with EmulatedNetwork(flat) as network, World(4, network=network, timeout=600.0) as world:
            world.run(_train_on, USUAL_STEPS)
            if is_slowed:
                network.change(flat.slowed(3, 5.0))
            found = world.run(_train_on, MOST_STEPS)
        versions[is_slowed] = [of_rank[0] for of_rank in found]
        digests[is_slowed] = [of_rank[1] for of_rank in found]
    first = next((step for step, version in enumerate(versions[True][0]) if version), None)
    console.print(f"slowed after {USUAL_STEPS} steps: other plans {first} steps later; allowed: {MOST_STEPS}")
    agree = all(of_rank == versions[True][0] for of_rank in versions[True])
    same = len({*digests[False], *digests[True]}) == 1
    console.print(f"versions alike on all ranks: {agree}; weights as without drift: {same}")
    return first is not None and agree and same


def _train_on(context: Any, steps: int) -> tuple[list[int | None], str]:
    """More steps of a rank's model: versions of its plans, and a digest of its weights."""
    import hashlib

    import torch

    import deepep

    kept = context.scratch
    if "model" not in kept:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256))
        config = deepep.ParallelConfig(topology="auto", probe_seconds=1.0, timeout=120.0)
        kept["model"] = deepep.DistributedDataParallel(module, process_group=context.group, config=config)
        kept["optimizer"], kept["step"] = torch.optim.SGD(module.parameters(), 0.1), 0
    model, versions = kept["model"], []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(1000 * context.rank + kept["step"])
        batch = torch.randn(8, 256, generator=generator)
        kept["optimizer"].zero_grad()
        (model(batch) - batch.flip(0)).square().mean().backward()
        kept["optimizer"].step()
        kept["step"] += 1
        versions.append(model.report()["plan_version"])
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return versions, digest.hexdigest()


def noise(ranks: int, steps: int, seed: int) -> bool:
    """The demo with compression "auto": bytes and noise; True if both are as promised."""
    from deepep.demo.config import DemoConfig
    from deepep.sim import World

    config, console = DemoConfig.for_ranks(ranks, steps, seed), make_console()
    with World(ranks, timeout=3600.0) as world:
        steps_of = world.run(_train_by_noise, config)
    mine = steps_of[0]
    ratios = [ratio for step in mine for ratio in step["ratios"]]
    above = sum(ratio > MAX_NOISE for ratio in ratios) / max(len(ratios), 1)
    share = sum(step["bytes"] for step in mine) / sum(step["float32_bytes"] for step in mine)
    table = Table("steps", "codecs", "of float32's bytes", "noise, mean")
    for begin in range(0, steps, 16):
        part = mine[begin : begin + 16]
        codecs = sorted({codec for step in part for codec in step["codecs"]})
        found = [ratio for step in part for ratio in step["ratios"]]
        bytes_share = sum(s["bytes"] for s in part) / sum(s["float32_bytes"] for s in part)
        mean = f"{sum(found) / len(found):.4f}" if found else "-"
        table.add_row(f"{begin} to {begin + len(part) - 1}", ", ".join(codecs), f"{bytes_share:.3f}", mean)
    console.print(table)
    agree = all([s["codecs"] for s in of_rank] == [s["codecs"] for s in mine] for of_rank in steps_of)
    console.print(
        f"bytes {share:.3f} of float32's, allowed {MOST_BYTES}; noise above {MAX_NOISE} in {above:.1%} of "
        f"steps and buckets, allowed {MOST_ABOVE:.0%}; formats alike on all ranks: {agree}"
    )
    return share <= MOST_BYTES and above <= MOST_ABOVE and agree


def _train_by_noise(context: Any, config: Any) -> list[dict[str, Any]]:
    from deepep.demo.compressed import train_by_noise

    return train_by_noise(context.group, config)
