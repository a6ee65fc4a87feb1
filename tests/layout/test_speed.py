"""Speed of the core: of its layouts, and of its comparison with the oracle; prints figures.

Processor time of this thread alone, the best of several goes: the machine may be shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from deepep import layout
from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.cases.strategies import cases
from deepep.sim.rules.layout import FIXED_OPTIONS, ROUTING, check_core

SMALL = Limits(masks=False, max_tokens=8, fixed=FIXED_OPTIONS)


def best_seconds(call: Callable[[], object], goes: int) -> float:
    def once() -> float:
        began = time.thread_time()
        call()
        return time.thread_time() - began

    return min(once() for _ in range(goes))


def test_a_large_layout_takes_less_than_two_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    num_tokens, num_topk, num_experts, num_ranks = 4096, 8, 256, 64
    generator = torch.Generator().manual_seed(0)
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).topk(num_topk).indices
    first = torch.zeros(num_ranks, dtype=torch.int64)

    def lay_out() -> torch.Tensor:
        """Counts, token-in-rank, and the final row of every (token, rank)."""
        laid = layout.dispatch_layout(topk_idx, num_experts, num_ranks)
        return layout.send_rows(laid.is_token_in_rank, first)

    seconds = best_seconds(lay_out, 50)
    with capsys.disabled():
        print(f"\ncore: T=4096 K=8 E=256 R=64 laid out in {seconds * 1e3:.2f} ms")
    assert seconds < 2e-3


def test_a_thousand_drawn_cases_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [draw_case(RandomChoices(f"speed {number}"), SMALL) for number in range(200)]

    def compare() -> None:
        for case in drawn:
            check_core(case, ROUTING)

    rate = len(drawn) / best_seconds(compare, 5)
    layouts = rate * sum(case.num_ranks for case in drawn) / len(drawn)
    with capsys.disabled():
        print(f"\ncore against oracle: {rate:.0f} drawn cases a second, {layouts:.0f} layouts of a rank")
    assert rate >= 1000


def test_two_hundred_cases_a_second_with_hypothesis(capsys: pytest.CaptureFixture[str]) -> None:
    examples = 150

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(SMALL))
    def compare(case: Case) -> None:
        check_core(case, ROUTING)

    rate = examples / best_seconds(compare, 4)
    with capsys.disabled():
        print(f"\ncore against oracle: {rate:.0f} cases a second drawn by hypothesis")
    assert rate >= 200
