"""`deepep dp drift` and `noise`: plans measured again on an emulated cluster, and formats by the noise."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from deepep.cli.terminal import make_console

MOST_STEPS, USUAL_STEPS = 40, 30
"""Operations until a slowed link has others planned; and those before it is slowed."""
MOST_ABOVE, MOST_BYTES, MAX_NOISE = 0.05, 0.33, 0.02
"""Share of steps and buckets with more noise than allowed; bytes of float32's; the noise that is allowed."""


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
