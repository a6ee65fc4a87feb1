"""Many low-latency operations in a row, drawn, late on either side, as virtual ranks.

Every result is compared with the oracle's on the device, where differences are counted.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from harness.low_latency_trips import FORMATS, LowLatencyShape, prepare

pytestmark = pytest.mark.gpu

#: DEEPEP_TEST_OPERATIONS: of each kind, so many.
OPERATIONS = int(os.environ.get("DEEPEP_TEST_OPERATIONS", "2000"))
SEED = int(os.environ.get("DEEPEP_TEST_SEED", "3"))
#: Clock cycles of a rank that is late: up to a quarter of a millisecond.
MOST_CYCLES = 400_000
CHECKED_AT_ONCE = 500

SHAPES = {
    "two ranks": LowLatencyShape((33, 20), most=40, hidden=896, topk=6, local_experts=6, pattern="holes"),
    "four ranks": LowLatencyShape((9, 0, 16, 5), most=16, hidden=512, topk=8, local_experts=5),
}


class Prepared(NamedTuple):
    """A case on the device: what each rank is given and must get."""

    shape: LowLatencyShape
    form: Any
    given: list[Any]
    rows: list[torch.Tensor]
    counts: list[torch.Tensor]
    sources: list[torch.Tensor]
    received: list[torch.Tensor]
    sums: list[torch.Tensor]


def on_device(shape: LowLatencyShape, seed: int) -> Prepared:
    from harness.virtual_low_latency import VirtualGiven

    from deepep.backends.cuda.low_latency_launch import LowLatencyFormat

    case = prepare(shape, seed)
    form = LowLatencyFormat(
        num_ranks=shape.ranks,
        num_local_experts=shape.local_experts,
        num_max_tokens=shape.num_max_tokens,
        num_topk=shape.topk,
        hidden=shape.hidden,
        index_dtype=shape.index_dtype,
        use_fp8=shape.fp8,
        round_scale=shape.round_scale,
        use_ue8m0=shape.ue8m0,
        with_weights=shape.with_weights,
        num_blocks=1,
    )
    return Prepared(
        shape,
        form,
        [VirtualGiven(*(t.cuda() for t in inputs)) for inputs in case.inputs],
        [rows.cuda() for rows in case.rows],
        [layout.recv_count.cuda() for layout in case.layouts],
        [layout.recv_src_info.cuda() for layout in case.layouts],
        [as_bytes(layout.recv_x).cuda() for layout in case.layouts],
        [as_bytes(sums).cuda() for sums in case.sums],
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def differences(case: Prepared, rank: int, out: Any, sums: torch.Tensor) -> torch.Tensor:
    """[]: how many elements of a rank's results are others than the oracle's."""
    rows = as_bytes(out.x)
    came = torch.arange(rows.shape[1], device="cuda") < out.count.unsqueeze(1)  # [L, R * M]
    unlike = [
        out.count != case.counts[rank],
        out.source != case.sources[rank],
        (rows != case.received[rank]) & came.unsqueeze(2),
        as_bytes(sums) != case.sums[rank],
    ]
    return torch.stack([each.sum() for each in unlike]).sum()


@pytest.mark.parametrize("name", SHAPES)
def test_many_operations_in_a_row(name: str) -> None:
    from harness.virtual_low_latency import VirtualLowLatency

    from deepep.backends.cuda.low_latency_launch import LowLatencyRoom

    base = SHAPES[name]
    draw = random.Random(SEED)
    formats = [form for form in FORMATS.values() if base.hidden % 512 == 0 or "ue8m0" not in form]
    cases = [
        on_device(replace(base, with_weights=early, pattern=pattern, **form), seed)
        for seed, (form, early, pattern) in enumerate(
            (form, early, pattern)
            for form in formats
            for early in (False, True)
            for pattern in (base.pattern, "uniform")
        )
    ]
    room = LowLatencyRoom(base.local_experts, base.num_max_tokens, base.topk, base.hidden)
    virtual = VirtualLowLatency(base.ranks, room, num_blocks=8, timeout=10.0)
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(base.ranks)]
    for number in range(OPERATIONS):
        case, hooked = draw.choice(cases), draw.random() < 0.5
        late = {draw.randrange(base.ranks): draw.randrange(MOST_CYCLES)} if draw.random() < 0.2 else {}
        made = []
        for rank in range(base.ranks):
            with torch.cuda.stream(virtual.streams[rank]):
                torch.cuda._sleep(late.get(rank, 0))
            made.append(virtual.dispatch_rank(rank, case.form, case.given[rank], hooked=hooked))
        sums = [
            virtual.combine_rank(rank, plan, case.rows[rank], case.given[rank], hooked=hooked)
            for rank, (plan, _) in enumerate(made)
        ]
        # Behind the launches of all ranks: what torch does for the first time may wait for the whole device.
        for rank, (_, out) in enumerate(made):
            with torch.cuda.stream(virtual.streams[rank]):
                wrong[rank] += differences(case, rank, out, sums[rank])
        if number % CHECKED_AT_ONCE == CHECKED_AT_ONCE - 1:
            torch.cuda.synchronize()
            assert virtual.faults() == [None] * base.ranks
            assert [int(count) for count in wrong] == [0] * base.ranks, f"within {number + 1} operations"
    torch.cuda.synchronize()
    assert virtual.faults() == [None] * base.ranks
    assert [int(count) for count in wrong] == [0] * base.ranks
