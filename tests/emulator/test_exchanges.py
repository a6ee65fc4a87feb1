"""The bare exchange on the emulated machine: the bytes that were sent, or ranks that give up."""

from __future__ import annotations

import pytest

from deepep import _emulator
from deepep.sim.explore import exchange_runs
from deepep.sim.explore.exchange_runs import ExchangeCase, explore_exchanges, run_exchange
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.scenarios import Stop


def test_drawn_exchanges_bring_what_was_sent() -> None:
    tally = explore_exchanges(runs=150)
    failure = tally.failure
    assert failure is None, f"{failure.case} {failure.schedule}\n{failure.report.text}"
    assert tally.faults > 0, "no stop has made a rank give up"


@pytest.mark.parametrize("num_bytes", [0, 16, 512, 528, 512 * 4, 512 * 23 + 16])
@pytest.mark.parametrize("reads", [False, True])
def test_sizes_around_a_piece(num_bytes: int, reads: bool) -> None:
    case = ExchangeCase(((0, num_bytes), (num_bytes, 0)), reads=(reads,) * 3)
    for seed in range(3):
        report = run_exchange(case, draw_schedule(seed))
        assert report.kind == "ok", report.text


def test_ranks_send_each_other_different_amounts() -> None:
    sizes = ((64, 0, 16, 3200), (512, 16, 0, 0), (0, 0, 0, 0), (16, 1040, 48, 0))
    for seed in range(6):
        report = run_exchange(ExchangeCase(sizes, num_blocks=3), draw_schedule(seed))
        assert report.kind == "ok", report.text


def test_a_rank_that_never_comes_is_noted_and_the_others_leave() -> None:
    case = ExchangeCase(((0, 64, 64), (64, 0, 64), (64, 64, 0)))
    report = run_exchange(case, draw_schedule(0), stops=(Stop(rank=1, at=1),))
    assert report.kind == "fault", report.text
    assert report.text.endswith("{0: 2, 2: 2}")


@pytest.mark.parametrize("reads", [False, True])
def test_other_bytes_are_found(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself, by a rank that says of its second call that it has sent what it sent in the first."""
    honest, asked = exchange_runs._ExchangeRun._rows_of, set()

    def lie(self: object, rank: int, call: int) -> bytes:
        is_first = (rank, call) not in asked
        asked.add((rank, call))
        return honest(self, rank, call if is_first else 0)

    monkeypatch.setattr(exchange_runs._ExchangeRun, "_rows_of", lie)
    case = ExchangeCase(((0, 64), (64, 0)), reads=(reads, reads))
    report = run_exchange(case, draw_schedule(0))
    assert report.kind == "wrong result"
    assert "in call 1" in report.text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sent": [0, 8]}, "a multiple of 16"),
        ({"sent": [0, 128 * 16]}, "no more than a pair has room for"),
        ({"received": [0, 0, 0]}, "a number of bytes for each rank"),
        ({"num_blocks": 257}, "1 to 256 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], complaint: str) -> None:
    exchange = _emulator.Exchange(rank=0, heaps=[64, 64], pair_bytes=1024, state=64, timeout_seconds=1.0)
    call = {"source": 64, "sent": [0, 16], "received": [0, 16], "sums": 0, "num_blocks": 2}
    assert exchange.args(**call)
    with pytest.raises(ValueError, match=complaint):
        exchange.args(**{**call, **change})
