"""The oracle's bits are the same however many threads torch computes with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deepep.sim.cases.case import Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.rules.observed import first_difference
from deepep.sim.rules.oracle import observe

#: Rows of which torch gives each thread a part: it does from 32,768 elements on.
LIMITS = Limits(ranks=(2, 3), max_tokens=40, hidden=(7168, 4096))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["ht", "ll"])
def test_two_threads_give_the_bits_of_one(two_threads: None, mode: str) -> None:
    for seed in range(2):
        case = draw_case(RandomChoices(f"threads/{mode}/{seed}"), LIMITS).with_options(mode=mode)
        with_two = observe(case)
        torch.set_num_threads(1)
        assert first_difference(with_two, observe(case)) is None
        torch.set_num_threads(2)
