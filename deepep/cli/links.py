"""`deepep links`: emulated networks between ranks on this machine, with rates and delays as on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deepep.cli.terminal import FAILED, make_console, misused

if TYPE_CHECKING:
    from deepep.sim.links.clusters import EmulatedCluster

PORT = 29400  # of rank 0's store, in a namespace where nobody else listens


def command(
    program: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND]", help="What every rank runs.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="flat, racks, interleaved, slow-port, far; --check: of these alone.")
    ] = "",
    ranks: Annotated[int, typer.Option(help="Ranks.")] = 8,
    check: Annotated[
        bool, typer.Option("--check", help="Measure rates and delays against what is asked.")
    ] = False,
) -> None:
    """Runs COMMAND once a rank, in network namespaces with a cluster's links between them; or lists the
    clusters; or, with --check, measures them and fails if a rate is off by 15 % or a delay by 2 ms.

    Linux alone, with the rights of root (root, or `unshare -r`), /dev/net/tun and iproute2. Every process has
    torchrun's variables; gloo's sockets are on the emulated interface.
    """
    from deepep.sim.links.clusters import CLUSTERS
    from deepep.sim.links.clusters import cluster as named
    from deepep.sim.links.emulated import NetworkError

    if check and program:
        misused("program: got one, and --check; allowed: one of them")
    try:
        chosen = [named(name, ranks) for name in ([cluster] if cluster else CLUSTERS)]
    except ValueError as error:
        misused(error)
    try:
        if check:
            results = [_check(one) for one in chosen]
            passed = all(results)
        elif program:
            passed = _run(chosen[0], program)
        else:
            _list(chosen)
            passed = True
    except NetworkError as error:
        make_console().print(f"no emulated network: {error}", soft_wrap=True)
        raise typer.Exit(FAILED) from None
    if not passed:
        raise typer.Exit(FAILED)


def _list(clusters: Sequence[EmulatedCluster]) -> None:
    table = Table("cluster", "groups", "ports, MB/s", "uplinks, MB/s", "delay, ms", "between groups, ms")
    for one in clusters:
        groups = " ".join(",".join(map(str, group)) for group in one.groups)
        ports = ", ".join(f"{rate / 1e6:g}" for rate in sorted(set(one.port_rates)))
        uplink = f"{one.uplink_rate / 1e6:g}" if one.uplink_rate else "-"
        far = f"{1e3 * one.far_delay:g}" if len(one.groups) > 1 else "-"
        table.add_row(one.name, groups, ports, uplink, f"{1e3 * one.delay:g}", far)
    make_console().print(table)


def _check(one: EmulatedCluster) -> bool:
    from deepep.sim.links.measuring import measure_links

    console = make_console()
    found = measure_links(one)
    table = Table(one.name, "asked", "measured", "")
    for link in found:
        unit, scale = ("MB/s", 1e-6) if link.is_rate else ("ms", 1e3)
        asked, got = f"{scale * link.asked:.2f} {unit}", f"{scale * link.got:.2f} {unit}"
        table.add_row(link.what, asked, got, "" if link.holds else "off")
    console.print(table)
    return all(link.holds for link in found)


def _run(one: EmulatedCluster, program: list[str]) -> bool:
    """Runs the program on every rank; True if all of them ended well."""
    from deepep.sim.links.emulated import INTERFACE, EmulatedNetwork

    running: list[subprocess.Popen[bytes]] = []
    with EmulatedNetwork(one) as network:
        try:
            for rank, namespace in enumerate(network.namespaces):
                environment = {
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": "0",
                    "WORLD_SIZE": str(one.num_ranks),
                    "MASTER_ADDR": network.addresses[0],
                    "MASTER_PORT": str(PORT),
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                }
                inside = ["nsenter", f"--net={namespace}", *program]
                running.append(subprocess.Popen(inside, env=environment, start_new_session=True))
            statuses = [process.wait() for process in running]
            return not any(statuses)
        except FileNotFoundError:
            misused("links: needs nsenter (util-linux)")
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
