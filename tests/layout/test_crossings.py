"""Rules of crossings between domains, by hand; drawn cases are judged by deepep.sim.rules.windows."""

from __future__ import annotations

import pytest
import torch

from deepep import layout
from deepep.sim.cases.case import Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.rules.layout import Laid
from deepep.sim.rules.windows import CROSSING_PROPERTIES

#: Up to 64 domains of 8 ranks.
WIDE = Limits(ranks=(64, 128, 512), max_local_experts=1, max_tokens=2, masks=False)


@pytest.mark.parametrize("holds", CROSSING_PROPERTIES, ids=lambda holds: holds.__name__)
def test_drawn_cases(holds) -> None:
    for seed in range(40):
        limits = WIDE if seed % 10 == 9 else Limits(masks=False)
        case = draw_case(RandomChoices(f"crossings {seed}"), limits)
        if limits is WIDE:
            case = case.with_options(ranks_per_node=8)
        holds(Laid(case))


def test_windows_take_turns_in_two_halves() -> None:
    turns = [layout.window_turn(number) for number in range(5)]
    assert [turn.half for turn in turns] == [0, 1, 0, 1, 0]
    assert [turn.arrivals for turn in turns] == [1, 1, 2, 2, 3]
    assert [turn.credit for turn in turns] == [0, 0, 1, 1, 2]
    assert layout.windows(70, 32) == [(0, 32), (32, 64), (64, 70)]
    assert layout.windows(0, 32) == []
    assert layout.records_in_chunks(20, 48) == [16, 4, 0]


def test_memory_of_deepseek_v3_does_not_grow_with_its_tokens() -> None:
    """EP64, BF16, H = 7168, top-8: 26 MB to receive and 26 MB to send from, 206 MB of staging."""
    assert [layout.default_window(domains) for domains in (2, 3, 4, 8, 16, 256)] == [
        896,
        448,
        288,
        128,
        64,
        64,
    ]
    sizes = layout.RecordSizes(14336, 0, 8, 8)
    assert sizes.bytes() == 14448
    buffer = layout.CrossingBuffer(8, 128, sizes.bytes(), sizes.return_bytes(), 8, 64 + 8 + 3 + 32)
    assert 51.5e6 < buffer.total_bytes() < 52.0e6
    assert 205e6 < buffer.staging_bytes() < 207e6


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: layout.CrossingBuffer(1, 16, 16, 16, 1, 1), "num_domains: got 1"),
        (lambda: layout.CrossingBuffer(2, 24, 16, 16, 1, 1), "window: got 24; expected a multiple of 16"),
        (lambda: layout.CrossingBuffer(2, 16, 16, 32, 1, 1), "return_bytes: got 32"),
        (lambda: layout.RecordSizes(8, 0, 1, 0), "row_bytes: got 8"),
        (lambda: layout.window_turn(-1), "number: got -1"),
        (lambda: layout.living_gateway(0, 2, 2, torch.ones(4, dtype=torch.bool)), "node: got 2"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        wrong()
