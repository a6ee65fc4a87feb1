"""Sends around a ring on the emulated machine: the tensors that were sent, or ranks that give up."""

from __future__ import annotations

import pytest

from deepep import _emulator
from deepep.sim.explore import ring_runs
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.ring_runs import RingCase, RingStep, explore_rings, run_ring
from deepep.sim.explore.scenarios import Stop


def test_drawn_sends_bring_what_was_sent() -> None:
    tally = explore_rings(runs=80)
    failure = tally.failure
    assert failure is None, f"{failure.case} {failure.schedule}\n{failure.report.text}"
    assert tally.faults > 0, "no stop has made a rank give up"


def way(count: int, num_slots: int, **change: object) -> RingCase:
    """Tensors from rank 0 to rank 1, all sent before the first is taken, as far as the ranks' order goes."""
    step = {"src": 0, "dst": 1, "num_bytes": 40, "dtype": 1, "is_wrong": False, "waits": True, **change}
    steps = [RingStep(takes=takes, number=i, **step) for takes in (False, True) for i in range(count)]
    return RingCase(2, num_slots, 48, tuple(steps))


def test_one_slot_is_used_again_and_again() -> None:
    for seed in range(4):
        report = run_ring(way(6, 1), draw_schedule(seed))
        assert report.kind == "ok", report.text


@pytest.mark.parametrize(("rank", "words"), [(0, "{1: (7, 2048, 1)}"), (1, "{0: (6, 1024, 2)}")])
def test_a_rank_that_never_comes_is_noted_and_the_other_leaves(rank: int, words: str) -> None:
    """pp_recv waits for a tensor of rank 0, pp_send for rank 1 to take one."""
    report = run_ring(way(3, 1), draw_schedule(0), stops=(Stop(rank=rank, at=1),))
    assert report.kind == "fault", report.text
    assert report.text.endswith(words)


def test_a_late_receiver_does_not_take_what_was_written_over() -> None:
    """The sender gives up within the pause, and copies all the same: the engine knows nothing of its wait."""
    kinds = set()
    for seed in range(6):
        stop = Stop(rank=1, at=1 + seed, pause_seconds=1.0)
        report = run_ring(way(3, 1), draw_schedule(seed), stops=(stop,))
        assert not report.failed, report.text
        kinds.add(report.text.partition("1: ")[2])
    assert any("256" in text for text in kinds), kinds


def test_other_bytes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself, by other expectations of the second tensor than what was sent."""
    honest = ring_runs._bytes_of

    def lie(step: RingStep) -> bytes:
        return honest(step) if not (step.takes and step.number == 1) else bytes(step.num_bytes)

    monkeypatch.setattr(ring_runs, "_bytes_of", lie)
    report = run_ring(way(2, 2), draw_schedule(0))
    assert report.kind == "wrong result"
    assert "as tensor 1" in report.text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"peer": 0}, "a slot of a neighbour"),
        ({"slot": 2}, "a slot of a neighbour"),
        ({"num_bytes": 65}, "fits into a slot"),
        ({"dtype": 256}, "a dtype below 256"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, int], complaint: str) -> None:
    machine = _emulator.Machine(num_ranks=2, max_blocks=1, max_threads=64)
    domain = _emulator.Domain(
        machine=machine,
        kernels=_emulator.own_kernels(),
        num_threads=64,
        rank=0,
        heaps=[64, 64],
        max_local_experts=1,
        max_blocks=1,
        staging_bytes=0,
        state=64,
        fault=64,
        timeout_seconds=1.0,
    )
    call = {"peer": 1, "slot": 0, "tensor": 64, "num_bytes": 8, "dtype": 0}
    call |= {"begin": 0, "num_slots": 2, "slot_bytes": 64}
    with pytest.raises(ValueError, match=complaint):
        domain.ring_send(**{**call, **change})
