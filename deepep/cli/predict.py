"""`deepep predict`: times of dispatch and combine on a cluster that is described by a few rates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepep.cli.terminal import demand_file, demand_use, misused


def command(
    context: typer.Context,
    ranks: Annotated[int, typer.Option(help="R.")] = 64,
    ranks_per_domain: Annotated[int, typer.Option(help="Ranks of an NVLink domain.")] = 8,
    link: Annotated[float, typer.Option(help="GB/s of a plain copy inside a domain, one direction.")] = 396.0,
    nic: Annotated[float, typer.Option(help="GB/s of a rank's NIC, one direction.")] = 50.0,
    start: Annotated[float, typer.Option(help="Microseconds of a throughput call beside its bytes.")] = 20.0,
    tokens: Annotated[int, typer.Option(help="Tokens of a rank.")] = 4096,
    hidden: Annotated[int, typer.Option(help="Channels of a row.")] = 7168,
    experts: Annotated[int, typer.Option(help="E.")] = 256,
    topk: Annotated[int, typer.Option(help="K.")] = 8,
    groups: Annotated[int, typer.Option(help="Groups of experts that the gate limits a token to.")] = 1,
    kept: Annotated[int, typer.Option(help="Groups that a token keeps.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Dispatch BF16 instead of FP8.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Routing of this trace, dealt to the ranks.")] = None,
    published: Annotated[bool, typer.Option("--published", help="Show published figures beside it.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draws times by number of ranks into this file.")] = None,
) -> int:
    """Predict times from the bytes that routing puts on each rank's links and NIC.

    Uniform routing, limited to groups if asked, or that of a trace: then the slowest rank counts.
    """
    from deepep.sim.cost import report
    from deepep.sim.cost.model import Cluster, RowShape

    if published:
        demand_use(context, {"published"}, "without --published, whose rates and shapes are the reports'")
    if trace is not None:
        own = {"tokens", "experts", "groups", "kept", "plot"}
        demand_use(context, context.params.keys() - own, "without --trace, which has its own routing")
    if plot is not None:
        demand_file("--plot", plot, (".png", ".svg", ".pdf"))
    if published:
        print(report.published_table())
        return 0
    try:
        cluster = Cluster("as given", ranks_per_domain, link, nic, start)
        shape = RowShape(hidden, topk, not bf16)
        if trace is not None:
            print(report.trace_table(trace, ranks, cluster, shape))
            return 0
        gate = report.Gate(experts, topk, groups, kept)
        print(report.uniform_table(gate, ranks, tokens, cluster, shape))
        if plot is not None:
            report.draw_by_ranks(gate, tokens, cluster, shape, plot)
            print(f"drawn: {plot}")
    except OSError as error:
        misused(f"trace: {trace}: {error.strerror}")
    except ValueError as error:
        misused(error)
    return 0
