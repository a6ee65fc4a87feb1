"""Replays of routing traces: what is known when, and what stands in the figures."""

import pytest
import torch

from deepep.errors import RangeError
from deepep.placement import contiguous, place, replay, summary
from deepep.placement.replay import expert_loads, rank_entries
from deepep.sim.cases.drifting import drifting_trace
from deepep.trace import TraceWriter


def turning_trace(hot_by_step):
    """Two ranks, four experts, one layer: in each step all 256 tokens want one expert."""
    writer = TraceWriter(num_layers=1, num_ranks=2, num_experts=4, num_topk=1)
    for step, hot in enumerate(hot_by_step):
        idx = torch.full((128, 1), hot)
        writer.add(step, 0, [idx, idx], [torch.ones(128, 1), torch.ones(128, 1)])
    return writer.finish()


def test_a_placement_knows_the_window_before_it_and_no_more() -> None:
    """Expert 0 is hot, then 3 is: the replicas of 0 are of no use then, and hindsight would have known."""
    windows = replay(turning_trace([0, 0, 3, 3]), 2, 2, window=1)
    assert [w.contiguous for w in windows] == [2.0] * 4
    even = pytest.approx(1.0, abs=0.02)  # the rule that picks replicas is an entry or two off
    assert [w.previous for w in windows] == [None, even, 2.0, even]
    assert [w.hindsight for w in windows] == [even] * 4
    assert [w.least for w in windows] == [1.0] * 4
    assert windows[0].moved is None
    assert windows[1].moved > 0 == windows[2].moved < windows[3].moved  # 2 is placed by what 1 was placed by
    assert [(w.first_step, w.last_step) for w in windows] == [(n, n) for n in range(4)]
    plain, placed = windows[1].rank_loads
    assert (plain.tolist(), placed.tolist()) == ([256, 0], [129, 127])
    assert summary(windows) == (2.0, pytest.approx(4 / 3, abs=0.02), even)
    assert summary(windows[:1]) is None


def test_each_layer_has_its_own_placement() -> None:
    writer = TraceWriter(num_layers=2, num_ranks=2, num_experts=4, num_topk=1)
    for step in range(2):
        for layer, hot in enumerate((0, 3)):
            writer.add(step, layer, [torch.full((128, 1), hot)] * 2, [torch.ones(128, 1)] * 2)
    assert replay(writer.finish(), 2, 2, window=1)[1].previous < 1.05


def test_without_replicas_no_placement_beats_the_hottest_expert() -> None:
    windows = replay(turning_trace([0, 0]), 2, window=1)
    assert windows[1].previous == windows[1].least == 2.0


def test_entries_of_ranks_are_those_of_the_mapped_topk() -> None:
    trace = drifting_trace(num_steps=1, num_layers=1, num_ranks=2, num_experts=8, num_topk=3, tokens=16)
    batch = next(iter(trace)).reshard(4)
    loads = expert_loads([batch], 8)
    assert loads.sum() == 2 * 16 * 3
    placement = place(loads, 4, 4)
    expected = torch.zeros(4, dtype=torch.int64)
    for rank, idx in enumerate(batch.topk_idx):
        for physical in placement.physical_topk(idx, rank).flatten().tolist():
            expected[physical // 3] += 1
    assert rank_entries(batch, placement).tolist() == expected.tolist()
    assert rank_entries(batch, contiguous(8, 4)).tolist() == loads.view(4, 2).sum(1).tolist()


def test_a_skewed_trace_is_evened_out_and_a_fresh_one_is_not() -> None:
    """Popularity that stays is worth a placement. Popularity drawn anew in every step is not."""
    drawn = {"num_steps": 4, "num_layers": 1, "num_ranks": 4, "num_experts": 32, "num_topk": 4, "tokens": 128}
    steady = replay(drifting_trace(**drawn, drift=0.0), 4, 8, window=1)
    fresh = replay(drifting_trace(**drawn, drift=1.0), 4, 8, window=1)
    for windows, is_better in ((steady, True), (fresh, False)):
        plain, placed, hindsight = summary(windows)
        assert (placed - 1 < (plain - 1) / 2) == is_better
        assert hindsight - 1 < (plain - 1) / 2
        assert all(w.least >= 1 for w in windows)


def test_nothing_chosen_is_even() -> None:
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=4, num_topk=2)
    for step, tokens in enumerate((0, 3)):
        writer.add(step, 0, [torch.full((tokens, 2), -1)], [torch.zeros(tokens, 2)])
    for window in replay(writer.finish(), 2, 2, window=1):
        assert (window.contiguous, window.hindsight, window.least) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(3, {}), (0, {}), (2, {"window": 9}), (2, {"num_redundant": 1}), (2, {"num_groups": 3})],
)
def test_what_does_not_fit_is_refused(ranks, options) -> None:
    with pytest.raises(RangeError):
        replay(turning_trace([0, 0]), ranks, **options)


@pytest.mark.parametrize(
    "options", [{"drift": 1.5}, {"skew": -1.0}, {"tokens": -1}, {"num_topk": 9}, {"num_steps": -1}]
)
def test_what_cannot_be_drawn_is_refused(options) -> None:
    sizes = {"num_steps": 1, "num_layers": 1, "num_ranks": 2, "num_experts": 8, "num_topk": 2, "tokens": 4}
    with pytest.raises(ValueError):
        drifting_trace(**{**sizes, **options})


def test_drawn_traces_have_the_sizes_asked_for_and_repeat() -> None:
    sizes = {"num_steps": 2, "num_layers": 2, "num_ranks": 3, "num_experts": 8, "num_topk": 2}
    first, again = (drifting_trace(**sizes, tokens=5, seed=7) for _ in range(2))
    assert torch.equal(first.topk_idx, again.topk_idx)
    assert first.row_splits.tolist() == list(range(0, 61, 5))
    assert not torch.equal(first.topk_idx, drifting_trace(**sizes, tokens=5, seed=8).topk_idx)
    sums = first.topk_weights.sum(1)
    assert torch.allclose(sums, torch.ones_like(sums))  # normalised, in float32
    assert len(drifting_trace(**sizes, tokens=0).topk_idx) == 0
