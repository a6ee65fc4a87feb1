"""All-reduces over symmetric memory on the emulated machine: the oracle's bits, or ranks that give up."""

from __future__ import annotations

import pytest

from deepep import _emulator
from deepep.sim.explore import reduce_runs
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.reduce_runs import ReduceCall, ReduceCase, explore_reduces, run_reduce
from deepep.sim.explore.scenarios import Stop


def test_drawn_all_reduces_have_the_oracles_bits() -> None:
    tally = explore_reduces(runs=60)
    failure = tally.failure
    assert failure is None, f"{failure.case} {failure.schedule}\n{failure.report.text}"
    assert tally.faults > 0, "no stop has made a rank give up"


@pytest.mark.parametrize("form", ["plain", "fixed32", "fp8", "fp16", "bf16"])
def test_both_kernels_have_the_same_bits(form: str) -> None:
    """Of parts of unequal length, a block that is not full, float32 and bfloat16."""
    calls = tuple(
        ReduceCall(515, form, is_bf16, is_oneshot)
        for is_bf16 in (False, True)
        for is_oneshot in (False, True)
    )
    report = run_reduce(ReduceCase(3, calls, num_blocks=2), draw_schedule(1))
    assert report.kind == "ok", report.text


def test_a_rank_that_never_comes_is_noted_and_the_others_leave() -> None:
    case = ReduceCase(3, (ReduceCall(300), ReduceCall(300, is_oneshot=True)))
    report = run_reduce(case, draw_schedule(0), stops=(Stop(rank=1, at=1),))
    assert report.kind == "fault", report.text
    assert report.text.endswith("{0: 2, 2: 2}")


def test_other_sums_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself, by an oracle that is wrong."""
    honest = ReduceCall.expected
    monkeypatch.setattr(reduce_runs.ReduceCall, "expected", lambda self, ranks: honest(self, ranks) * 2 + 1)
    report = run_reduce(ReduceCase(2, (ReduceCall(128),)), draw_schedule(0))
    assert report.kind == "wrong result"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"count": 128 * 5}, "no more elements than a pair has room for"),
        ({"is_oneshot": True, "count": 128 * 3}, "no more elements than a pair has room for"),
        ({"count": -1}, "a count of 0 or more"),
        ({"format": "fp4"}, "a format of plain, fp8, fp16, bf16"),
        ({"format": "fp8", "is_fixed": True}, "fixed point sums plain messages"),
        ({"keys": [1, 2]}, "two keys of two words, or none"),
        ({"num_blocks": 257}, "1 to 256 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], complaint: str) -> None:
    made = _emulator.AllReduce(
        rank=0, heaps=[64, 64], pair_bytes=1024, state=64, host_missing=0, timeout_seconds=1.0
    )
    call = {"tensor": 64, "count": 128 * 4, "is_bf16": False, "is_oneshot": False, "format": "plain"}
    call |= {"is_fixed": False, "divisor": 1.0, "keys": [], "first_index": 0, "num_blocks": 2}
    assert made.args(**call)
    with pytest.raises(ValueError, match=complaint):
        made.args(**{**call, **change})
