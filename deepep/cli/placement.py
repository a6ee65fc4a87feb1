"""`deepep placement`: a routing trace replayed under placements of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepep.cli.terminal import demand_file, demand_use, make_console, misused
from deepep.errors import DeepEPError

if TYPE_CHECKING:
    from deepep.placement.replay import WindowImbalance


def command(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(help="A routing trace (docs/trace.md).")],
    ranks: Annotated[int, typer.Option(help="R: the trace's tokens are dealt to so many.")] = 8,
    redundant: Annotated[int, typer.Option(help="Replicas beside one of each expert.")] = 0,
    window: Annotated[int, typer.Option(help="Steps between two placements; 0: an eighth of all.")] = 0,
    groups: Annotated[int, typer.Option(help="Groups of experts, kept inside domains.")] = 1,
    domains: Annotated[int, typer.Option(help="Scale-up domains that the ranks are in.")] = 1,
    moving_cost: Annotated[
        float, typer.Option(help="Part of a rank's load that moving an expert to each rank has to gain.")
    ] = 0.0,
    plot: Annotated[
        Path | None, typer.Option(help="Draws imbalance before and after into this file.")
    ] = None,
    draw: Annotated[bool, typer.Option("--draw", help="First draws a trace and writes it to TRACE.")] = False,
    steps: Annotated[int, typer.Option(help="--draw: steps.")] = 64,
    layers: Annotated[int, typer.Option(help="--draw: layers.")] = 2,
    experts: Annotated[int, typer.Option(help="--draw: E.")] = 64,
    topk: Annotated[int, typer.Option(help="--draw: K.")] = 8,
    tokens: Annotated[int, typer.Option(help="--draw: tokens of a rank, step and layer.")] = 256,
    skew: Annotated[float, typer.Option(help="--draw: deviation of the log of popularities.")] = 1.0,
    drift: Annotated[float, typer.Option(help="--draw: part of it drawn anew in a step.")] = 0.01,
    seed: Annotated[int, typer.Option(help="--draw: of all that is drawn.", min=0)] = 0,
) -> int:
    """Replays a trace: a placement from each window's loads, applied to the next window.

    Imbalance: entries of the busiest rank over the mean of all, averaged over the window's dispatches.
    """
    from deepep.placement.replay import replay
    from deepep.trace import RoutingTrace

    if not draw:
        drawn_by = {"steps", "layers", "experts", "topk", "tokens", "skew", "drift", "seed"}
        demand_use(context, context.params.keys() - drawn_by, "with --draw")
    if plot is not None:
        demand_file("plot", plot, (".png", ".svg", ".pdf"))
    try:
        if draw:
            from deepep.sim.cases.drifting import drifting_trace

            demand_file("trace", trace)
            drawn = drifting_trace(
                num_steps=steps,
                num_layers=layers,
                num_ranks=ranks,
                num_experts=experts,
                num_topk=topk,
                tokens=tokens,
                skew=skew,
                drift=drift,
                seed=seed,
            )
            drawn.save(trace)
        given = RoutingTrace.load(trace)
        windows = replay(
            given,
            ranks,
            redundant,
            window=window,
            num_groups=groups,
            num_domains=domains,
            moving_cost=moving_cost,
        )
    except OSError as error:
        misused(f"trace: {trace}: {error.strerror}")
    except (DeepEPError, ValueError) as error:
        misused(error)
    if len(windows) < 2:
        misused(f"window: {len(windows)} of them; allowed: at least two, of {given.num_steps} steps")
    physical = given.num_experts + redundant
    console = make_console()
    console.print(
        f"{trace}: {given.num_experts} experts, top {given.num_topk}, {given.num_layers} layers; "
        f"{physical} places on {ranks} ranks, {physical // ranks} each",
        soft_wrap=True,
    )
    for line in table(windows):
        console.print(line, soft_wrap=True)
    if plot is not None:
        from deepep.placement import picture

        title = f"{given.num_experts} experts, {redundant} replicas more, {ranks} ranks"
        picture.draw(windows, title, plot)
        console.print(f"drawn: {plot}", soft_wrap=True)
    return 0


def table(windows: Sequence[WindowImbalance]) -> list[str]:
    """Lines: one a window, and the mean of all but the first."""
    from deepep.placement.replay import summary

    lines = [f"{'steps':>13} {'blocks':>8} {'placed':>8} {'hindsight':>10} {'bound':>8} {'moved':>7}"]
    for w in windows:
        placed = "" if w.previous is None else f"{w.previous:.3f}"
        moved = "" if w.moved is None else f"{w.moved:.1f}"
        lines.append(
            f"{w.first_step:6}-{w.last_step:<6} {w.contiguous:8.3f} {placed:>8} {w.hindsight:10.3f} "
            f"{w.least:8.3f} {moved:>7}"
        )
    means = summary(windows)
    if means is not None:
        moves = [w.moved for w in windows if w.moved is not None]
        lines.append(
            f"{'mean, from 2nd':>13} {means[0]:7.3f} {means[1]:8.3f} {means[2]:10.3f} {'':8} "
            f"{sum(moves) / len(moves):7.1f}"
        )
    lines.append("blocks: contiguous. placed: by the loads of the window before; hindsight: by its own.")
    lines.append("bound: for the window's loads as a whole. moved: experts brought to a rank, per layer.")
    return lines
