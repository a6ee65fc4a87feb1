"""Timelines: spans of a step on every rank, in the order of its calls, and a picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepep.bench.timeline.picture import draw, lanes_of
from deepep.bench.timeline.record import Span, kind_of
from deepep.bench.timeline.steps import StepShape
from deepep.cli.timeline import record_both

TRAINING = ["attention", "MoE layer", "backward", "optimizer"]
DECODE = [
    *("attention", "dispatch", "attention", "hook", "dispatch", "experts", "hook"),
    *("combine", "experts", "hook", "combine", "hook"),
]


def test_both_steps_are_recorded_on_every_rank(world_of: Any, tmp_path: Path) -> None:
    shape = StepShape(tokens=4, decode_tokens=2, hidden=64, width=16, topk=2, experts=4)
    found = world_of(2).run(record_both, shape, "reference")
    assert found[0] == found[1]
    for name, calls in (("training", TRAINING), ("decode", DECODE)):
        spans = found[0][name]
        assert [[span.name for span in mine] for mine in spans] == [calls, calls]
        for mine in spans:
            ends = [0.0, *(time for span in mine for time in (span.begin, span.end))]
            assert ends == sorted(ends)
        assert min(mine[0].begin for mine in spans) == 0.0
    draw(found[0]["decode"], "decode", tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 1000


def test_streams_stand_below_the_host_in_the_order_of_their_kernels() -> None:
    spans = [
        Span("stream 20", "combine", 3, 4),
        Span("stream 7", "products", 1, 2),
        Span("host", "hook", 2, 3),
    ]
    assert lanes_of(spans) == ["host", "stream 7", "stream 20"]


def test_kernels_are_told_apart_by_their_names() -> None:
    assert kind_of("_ZN6deepep7kernels28low_latency_dispatch_kernelE") == "dispatch"
    assert kind_of("deepep::kernels::combine_copy_engine_kernel") == "combine"
    assert kind_of("deepep::kernels::sort_pairs_kernel") == "rows and routing"
    assert kind_of("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT") == "products"
    assert kind_of("void at::native::vectorized_elementwise_kernel") == "other kernels"
