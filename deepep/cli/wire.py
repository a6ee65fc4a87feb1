"""`deepep wire`: run a command once a rank, as if the ranks were on several hosts with a NIC each."""

from __future__ import annotations

from typing import Annotated

import typer

from deepep.cli.terminal import misused


def command(
    program: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="What every rank runs.")],
    ranks: Annotated[int, typer.Option(help="Ranks: processes.")] = 4,
    ranks_per_domain: Annotated[int, typer.Option(help="Ranks that share a host name.")] = 2,
    delay_us: Annotated[int, typer.Option(help="Longest delay of a work request.")] = 0,
    weak: Annotated[bool, typer.Option(help="Plain writes may land behind later ones.")] = False,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 1,
    silent: Annotated[
        list[str] | None, typer.Option(help="RANK:N: its NIC falls silent after N work requests.")
    ] = None,
    roce: Annotated[bool, typer.Option(help="The port is Ethernet's.")] = False,
    deadline: Annotated[float, typer.Option(help="Seconds after which all ranks are ended.")] = 300.0,
) -> int:
    """Run COMMAND once a rank, on a wire without a NIC (a checkout and a C++ compiler are needed).

    Every process has torchrun's variables, the host name of its domain, and a libibverbs.so.1 preloaded that
    NVSHMEM's IBRC transport takes for a NIC. Ends with a table of what crossed, and with status 0 if every
    rank did.
    """
    from deepep.sim.links.hosts import WireError, WireOptions, run_on_wire

    try:
        quiet = {int(rank): int(after) for rank, after in (text.split(":") for text in silent or ())}
    except ValueError:
        misused(f"--silent: got {silent}; allowed: RANK:N")
    try:
        result = run_on_wire(
            WireOptions(
                ranks=ranks,
                ranks_per_domain=ranks_per_domain,
                delay_us=delay_us,
                weak=weak,
                seed=seed,
                silent=quiet,
                roce=roce,
                deadline=deadline,
            ),
            program,
        )
    except ValueError as error:  # begins with the name of a field of WireOptions
        field, _, problem = str(error).partition(":")
        misused(f"--{field.replace('_', '-')}:{problem}")
    except WireError as error:
        print(f"the wire cannot be built here: {error}")
        return 1
    except (FileNotFoundError, PermissionError) as error:
        misused(f"COMMAND: {error.filename}: got no program; allowed: one that may be executed")
    if result.traffic:
        print(f"{'from':>4} {'to':>4} {'requests':>10} {'written bytes':>14} {'atomics':>8} {'late':>6}")
        for (source, target), sent in sorted(result.traffic.items()):
            print(f"{source:4} {target:4} {sent.requests:10} {sent.bytes:14} {sent.atomics:8} {sent.late:6}")
    for rank, status in enumerate(result.statuses):
        if status != 0:
            print(f"rank {rank}: " + ("ended at the deadline" if status is None else f"status {status}"))
    return 0 if result.succeeded else 1
