"""`deepep dp topologies`: plans on emulated clusters against torch's gloo, whole or in pieces."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.table import Table

from deepep.cli.terminal import demand_file, make_console, misused
from deepep.errors import RangeError

if TYPE_CHECKING:
    from deepep.sim.links.comparing import Measured

Value = TypeVar("Value")
MOST_MEAN, MOST_ONE = 0.78, 1.05
"""Of torch's gloo: the geometric mean over clusters and sizes, and the worst of them."""
MOST_INTERLEAVED, MOST_FAR, MOST_RACKS_FP8, MOST_OF_BEST = 0.40, 0.35, 0.50, 1.10
"""Of torch's gloo: 4 MiB between interleaved racks, 4 KiB at 10 ms, 4 MiB in FP8 between racks in order; and
of the best schedule that was pinned, in the same run.
"""
SMALL, LARGE = 4 << 10, 4 << 20


def topologies(ranks: int, rounds: int, pinned: bool, clusters: str, sizes: str, results: str) -> bool:
    """Times on emulated clusters against torch's gloo in the same run; True if all bars hold.

    clusters, sizes: those to measure, with commas between; "": all, five by three. results: a file that keeps
    what is measured, and of what is in it nothing is measured again: the table is of the whole file, and the
    geometric mean counts once it is complete; "": none.
    """
    from deepep.sim.links.clusters import CLUSTERS, cluster
    from deepep.sim.links.comparing import SIZES, Measured, compare

    names = _chosen("clusters", clusters, {name: name for name in CLUSTERS})
    wanted = _chosen("sizes", sizes, {f"{size >> 10}K": size for size in SIZES})
    if results:
        demand_file("--results", Path(results))
    try:
        conditions = {"ranks": ranks, "rounds": rounds, "pinned": int(pinned)}
        measured = Measured(Path(results) if results else None, conditions)
    except ValueError as error:
        misused(error)
    console = make_console()
    for name in names:
        missing = measured.missing(name, wanted)
        if missing:
            measured.add(compare(cluster(name, ranks), rounds, pinned, missing))
            console.print(f"{name}: groups {measured.clusters[name].groups}")
    return judge(measured)


def judge(measured: Measured) -> bool:
    """Prints what was measured, and the bars that it misses; True if there are none."""
    from deepep.collectives.cost import geometric_mean
    from deepep.sim.links.clusters import CLUSTERS
    from deepep.sim.links.comparing import CHOSEN, CHOSEN_FP8, GLOO, PINNED, SIZES

    console = make_console()
    found = {
        (name, size): (measured.clusters[name], measured.clusters[name].seconds[size])
        for name in CLUSTERS
        for size in SIZES
        if name in measured.clusters and size in measured.clusters[name].seconds
    }
    pinned = [way for way in PINNED if any(way in seconds for _, seconds in found.values())]
    table = Table("cluster", "KiB", "gloo, ms", "chosen", "of gloo", "fp8", "of gloo", *pinned)
    shares, without, bars = [], [], []
    for (name, size), (one, seconds) in found.items():
        share, fp8 = (seconds[way] / seconds[GLOO] for way in (CHOSEN, CHOSEN_FP8))
        shares.append(share)
        table.add_row(
            name,
            str(size >> 10),
            f"{1e3 * seconds[GLOO]:.0f}",
            f"{1e3 * seconds[CHOSEN]:.0f} {one.plans[size][CHOSEN]}",
            f"{share:.2f}",
            f"{1e3 * seconds[CHOSEN_FP8]:.0f} {one.plans[size][CHOSEN_FP8]}",
            f"{fp8:.2f}",
            *(f"{1e3 * seconds[way]:.0f}" if way in seconds else "-" for way in pinned),
        )
        bars.append((f"{name}, {size >> 10} KiB", share, MOST_ONE))
        ours = [seconds[way] for way in pinned if way in seconds]
        if ours:
            bars.append((f"{name}, {size >> 10} KiB, of the best", seconds[CHOSEN] / min(ours), MOST_OF_BEST))
            without.append(min(seconds[way] for way in pinned[1:] if way in seconds) / seconds[GLOO])
        if (name, size) == ("interleaved", LARGE):
            bars.append(("interleaved, 4 MiB", share, MOST_INTERLEAVED))
        if (name, size) == ("far", SMALL):
            bars.append(("far, 4 KiB", share, MOST_FAR))
        if (name, size) == ("racks", LARGE):
            bars.append(("racks, 4 MiB, fp8", fp8, MOST_RACKS_FP8))
    console.print(table)
    left = len(CLUSTERS) * len(SIZES) - len(shares)
    mean = geometric_mean(shares)
    text = f"geometric mean {mean:.2f} of gloo, the worst {max(shares):.2f}"
    if left:
        text += f"; {left} of {left + len(shares)} are not measured, and the mean's bar not judged"
    else:
        bars.append(("geometric mean", mean, MOST_MEAN))
    missed = [bar for bar in bars if bar[1] > bar[2]]
    for what, got, most in missed:
        console.print(f"{what}: {got:.2f}; allowed: at most {most:.2f}")
    if without:
        text += f"; the best of ours without native {geometric_mean(without):.2f}"
    console.print(f"{text}; load average {os.getloadavg()[0]:.0f}")
    return not missed


def _chosen(option: str, text: str, allowed: dict[str, Value]) -> list[Value]:
    words = [word.strip() for word in text.split(",") if word.strip()] or list(allowed)
    for word in words:
        if word not in allowed:
            misused(RangeError(option, repr(word), f"some of {', '.join(allowed)}"))
    return [value for word, value in allowed.items() if word in words]
