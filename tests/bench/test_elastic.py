"""ElasticBuffer's benchmark: what is measured, and that wrong rows end a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deepep.bench.elastic.rank import run_elastic_rank
from deepep.bench.sweep import Shape, Sweep
from deepep.cli.bench import _runner

SHAPE = Shape(tokens=11, hidden=128, topk=3, experts=6)
SMALL = Sweep(2, (SHAPE,), iterations=50, warmup=0, mode="elastic", peers=("all_to_all",))
PLAIN = replace(SMALL, dtypes=("bf16",), peers=())
DISPATCHES = [f"{which}dispatch{how}" for which in ("", "expanded ") for how in ("", ", no wait")]


def measured(context: Any) -> Any:
    return run_elastic_rank(context.group, context.device, SMALL)


def test_rows_of_tokens_and_of_entries_are_measured(world_of: Any) -> None:
    for report in world_of(2).run(measured):
        assert not report.problems
        ours = [figure for figure in report.figures if figure.by == "deepep"]
        assert all(0 < figure.median <= figure.p99 for figure in report.figures)
        for dtype in ("bf16", "fp8"):
            names = {figure.operation for figure in ours if figure.dtype == dtype}
            dispatches = {*DISPATCHES, "cached dispatch", "cached expanded dispatch"}
            assert names - {"combine", "combine of expanded rows"} == dispatches
        assert {figure.operation for figure in ours} - names == {"combine", "combine of expanded rows"}
        assert any(figure.by == "gloo alone" for figure in report.figures)


def measured_wrongly(context: Any, spoiled: str) -> Any:
    """Of the calls named `spoiled`, results in which rank 1 has one row of another's."""
    import deepep.bench.elastic.rank as bench

    operations = bench.elastic_operations

    def spoil(*args: Any) -> Any:
        for operation in operations(*args):
            if operation.name == spoiled and context.rank == 1:
                right = operation.call

                def wrong(right: Any = right) -> Any:
                    made = right()
                    rows = made[0]
                    real = (rows != 0).any(dim=1).nonzero().squeeze(1)
                    rows[real[0]] = rows[real[-1]]
                    return made

                object.__setattr__(operation, "call", wrong)
            yield operation

    bench.elastic_operations = spoil  # type: ignore[assignment]
    try:
        return run_elastic_rank(context.group, context.device, PLAIN).problems
    finally:
        bench.elastic_operations = operations


@pytest.mark.parametrize("spoiled", ["expanded dispatch, no wait", "combine of expanded rows"])
def test_a_wrong_row_ends_the_run_on_all_ranks(world_of: Any, spoiled: str) -> None:
    first, second = world_of(2).run(measured_wrongly, spoiled)
    assert first == second
    assert len(first) == 1
    assert first[0].startswith(f"deepep {spoiled} bf16: rank 1: ")


def test_the_command_runs_it() -> None:
    assert _runner(SMALL) is run_elastic_rank
