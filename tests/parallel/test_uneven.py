"""Uneven ranks: shares by speed and by what a rank can hold, gradients that are means over samples."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deepep
from deepep.errors import ArgumentError
from deepep.parallel import balance
from deepep.parallel.balance import SpeedMeter, parts_of, weights_of
from deepep.parallel.config import ParallelConfig
from deepep.parallel.sampler import ElasticSampler
from deepep.sim import World
from deepep.sim.worlds.outcomes import Status

WIDTH, BATCH, SAMPLES = 5, 23, 300

# rules


@settings(deadline=None)
@given(st.data(), st.integers(0, 400), st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8))
def test_parts_by_weight_below_their_limits(data: Any, total: int, weights: list[float]) -> None:
    """Against a level that is found by halving, which all parts below their limits are filled up to."""
    limits = [data.draw(st.integers(1, 200)) for _ in weights]
    parts = parts_of(total, weights, limits)
    assert sum(parts) == min(total, sum(limits))
    assert all(0 <= part <= limit for part, limit in zip(parts, limits, strict=True))
    low, high = 0.0, 1e6
    for _ in range(100):
        level = (low + high) / 2
        filled = sum(min(limit, level * weight) for limit, weight in zip(limits, weights, strict=True))
        low, high = (level, high) if filled < min(total, sum(limits)) else (low, level)
    for part, limit, weight in zip(parts, limits, weights, strict=True):
        assert abs(part - min(limit, low * weight)) < 1 + 1e-6
    whole = sum(weights)
    for part, weight in zip(parts_of(total, weights), weights, strict=True):
        assert abs(part - total * weight / whole) < 1 + 1e-6


def test_weights_are_sixteenths_of_the_slowest_speed() -> None:
    assert weights_of({0: 30.0, 2: 10.0, 5: 31.0}) == {0: 3.0, 2: 1.0, 5: 3.125}
    assert weights_of({3: 1e-3}) == {3: 1.0}


def measured(rank: int = 0, batch: int = 100, every: int = 50, **options: Any) -> ElasticSampler:
    return ElasticSampler(1000, batch, rank, 4, weights="measured", rebalance_every=every, **options)


SLOW = {0: 30.0, 1: 30.0, 2: 30.0, 3: 10.0}


def test_weights_follow_speeds_after_some_steps() -> None:
    sampler = measured()
    for _ in range(49):
        sampler.follow(SLOW)
    assert sampler.weights == [1.0] * 4
    sampler.follow({**SLOW, 2: 0.0})  # not known yet
    assert sampler.weights == [1.0] * 4
    sampler.follow(SLOW)
    assert sampler.weights == [3.0, 3.0, 3.0, 1.0]
    assert list(map(len, sampler.shares().values())) == [30, 30, 30, 10]
    fixed = ElasticSampler(1000, 100, 0, 4, rebalance_every=1)
    fixed.follow(SLOW)
    assert fixed.weights == [1.0] * 4


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.lists(st.floats(0.5, 20.0), min_size=4, max_size=4), min_size=1, max_size=60),
)
def test_changes_are_rare_and_save_time(every: int, speeds: list[list[float]]) -> None:
    sampler, since = measured(every=every), 0
    for row in speeds:
        before, sizes = list(sampler.weights), [len(part) for part in sampler.shares().values()]
        sampler.follow(dict(enumerate(row)))
        since += 1
        if sampler.weights != before:
            assert since >= every
            since = 0
            after = [len(part) for part in sampler.shares().values()]
            then, now = (max(n / s for n, s in zip(of, row, strict=True)) for of in (after, sizes))
            assert then <= (1 - balance.LEAST_GAIN) * now
    for _ in range(2 * every):
        sampler.follow(dict(enumerate(speeds[-1])))
    took = max(len(sampler.shares()[rank]) / speed for rank, speed in enumerate(speeds[-1]))
    ideal = 100 / sum(speeds[-1])
    assert took <= (ideal + 1 / min(speeds[-1])) * 1.04 / (1 - balance.LEAST_GAIN)


def test_who_can_hold_less_has_less() -> None:
    sampler = measured(every=1, max_samples=[20, 60, 60, 60])
    assert list(map(len, sampler.shares().values())) == [20, 27, 26, 27]
    sampler.follow(SLOW)
    assert list(map(len, sampler.shares().values())) == [20, 34, 35, 11]
    sampler.set_members([0, 1])
    assert sampler.shares() == {0: range(20), 1: range(20, 80)}  # both are full, and 20 samples left out
    sampler.set_members([0, 1, 3])
    assert sum(map(len, sampler.shares().values())) == 100


def test_a_state_has_the_measured_weights() -> None:
    sampler, other = measured(every=2), measured(1, every=2)
    for _ in range(3):
        sampler.follow(SLOW)
    other.load_state_dict(sampler.state_dict())
    assert other.weights == sampler.weights != [1.0] * 4
    for one in (sampler, other):
        one.follow({**SLOW, 0: 5.0})
    assert other.weights == sampler.weights
    assert "weights" not in ElasticSampler(10, 4, 0, 2, weights=[1, 2]).state_dict()


def test_a_batch_that_was_drawn_keeps_its_weight() -> None:
    """A loader reads ahead, by the shares of that time; and a step that is made again is drawn again."""
    sampler = measured(every=1)
    batches = iter(sampler)
    assert len(next(batches)) == 25
    sampler.follow(SLOW)
    assert sampler.gradient_weight() == 0.25
    assert len(sampler.indices()) == 30
    assert sampler.gradient_weight() == 0.3
    assert sampler.gradient_weight([0, 3]) == 0.75
    sampler.commit()
    assert sampler.counts() == {0: 30, 1: 30, 2: 30, 3: 10}


def test_a_speed_is_of_the_time_until_the_last_gradient() -> None:
    now = 0.0
    meter = SpeedMeter(lambda: now)

    def step(seconds: float, samples: int = 10, waits: float = 7.0, forwards: int = 1) -> None:
        nonlocal now
        for number in range(forwards):
            meter.begin(accumulates=number < forwards - 1)
            now += seconds / forwards
        meter.end(samples)
        now += waits

    for _ in range(balance.WARM_UP):
        step(100.0)
    assert meter.speed == 0.0
    step(2.0)
    assert meter.speed == pytest.approx(5.0)
    step(2.0, forwards=4)
    assert meter.speed == pytest.approx(5.0)
    step(1.0)
    assert meter.speed == pytest.approx(5.5)
    meter.begin(accumulates=False)  # a forward without a backward
    now += 50.0
    step(1.0, samples=0)  # says nothing
    assert meter.speed == pytest.approx(5.5)


# gradients


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data() -> Tensor:
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(model: nn.Module, indices: Tensor) -> Tensor:
    return model(data()[indices]).square().sum(1).mean()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_process(indices: list[int]) -> Tensor:
    model = model_of()
    loss_of(model, torch.tensor(indices)).backward()
    return gradients(model)


def wrapped(context: Any, sampler: ElasticSampler, **options: Any) -> deepep.DistributedDataParallel:
    config = ParallelConfig(timeout=60.0, **options)
    return deepep.DistributedDataParallel(
        model_of(), process_group=context.group, config=config, sampler=sampler, bucket_cap_mb=0.0002
    )


def uneven(context: Any, weights: list[float], batch: int, micro_batches: int, attempts: bool) -> Any:
    """Of some steps, what this rank had and the gradients that came out."""
    sampler = ElasticSampler(SAMPLES, batch, context.rank, context.num_ranks, weights=weights)
    model, found = wrapped(context, sampler), []

    def step() -> None:
        model.zero_grad()
        indices = sampler.indices()
        parts = indices.chunk(micro_batches) if micro_batches > 1 else [indices]
        for part in parts[:-1]:
            with model.no_sync():
                (loss_of(model, part) * len(part) / len(indices)).backward()
        (loss_of(model, parts[-1]) * len(parts[-1]) / max(1, len(indices))).backward()
        found.append((indices.tolist(), gradients(model).clone()))

    for _ in range(3):
        if attempts:
            for attempt in model.attempts():
                with attempt:
                    step()
        else:
            step()
        sampler.commit()
    model.close()
    return found


@pytest.mark.parametrize(
    ("weights", "batch", "micro_batches", "attempts"),
    [
        ([3.0, 3.0, 3.0, 1.0], BATCH, 1, False),
        ([3.0, 3.0, 3.0, 1.0], BATCH, 1, True),
        ([2.0, 1.0, 5.0, 2.0], BATCH, 2, False),
        ([1.0, 50.0, 50.0, 50.0], 10, 1, True),  # the first rank has none, and its loss is NaN
    ],
    ids=["plain", "attempts", "accumulated", "no-samples"],
)
def test_gradients_are_one_processes(
    world_of: Callable[[int], Any], weights: list[float], batch: int, micro_batches: int, attempts: bool
) -> None:
    by_rank = world_of(4).run(uneven, weights, batch, micro_batches, attempts, timeout=180.0)
    for step in range(3):
        indices = [index for rank in by_rank for index in rank[step][0]]
        assert len(indices) == batch
        wanted = one_process(indices)
        for rank in by_rank:
            torch.testing.assert_close(rank[step][1], wanted, rtol=1e-12, atol=1e-15)
            assert torch.equal(rank[step][1], by_rank[0][step][1])


def noisy(context: Any) -> tuple[list[int], list[float], float]:
    """Of a step in which ranks have 4, 8 and 48 samples: these, their gradients, and the variance found."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 64)
    sampler = ElasticSampler(SAMPLES, 60, context.rank, context.num_ranks, weights=[1.0, 2.0, 12.0])
    config = ParallelConfig("auto", min_compressed_bytes=0, timeout=60.0)
    wrapper = deepep.DistributedDataParallel(
        model, process_group=context.group, config=config, sampler=sampler
    )
    own: list[float] = []
    for _ in range(3):  # what is found is known a step later
        indices = sampler.indices()
        if not own:
            loss = model(data()[indices].float()).square().sum(1).mean()
            own = torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
            ).tolist()
        wrapper.zero_grad()
        wrapper(data()[indices].float()).square().sum(1).mean().backward()
    reducer = wrapper._bucket_reducer
    assert reducer is not None
    found = reducer.noise[0].variance
    wrapper.close()
    return list(sampler.counts().values()), own, found


def test_the_noise_is_that_of_a_mean_over_samples(world_of: Callable[[int], Any]) -> None:
    """Of N samples: sum of n |g|^2, less N |m|^2, is on average R - 1 times what one sample varies by."""
    by_rank = world_of(3).run(noisy, timeout=120.0)
    counts, own = by_rank[0][0], torch.tensor([rank[1] for rank in by_rank], dtype=torch.float64)
    assert counts == [4, 8, 48]
    weights = torch.tensor(counts, dtype=torch.float64) / 60
    mean = (weights[:, None] * own).sum(0)
    wanted = 3 * float((weights * (own**2).sum(1)).sum() - (mean**2).sum()) / 2
    for _, _, found in by_rank:
        assert found == pytest.approx(wanted, rel=0.05)


class FixedMeter(SpeedMeter):
    """A meter of a rank whose speed is known."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self._fixed = speed

    def end(self, samples: int) -> None:
        super().end(samples)
        self.speed = self._fixed


def follows(context: Any, dies: int | None, keep: str) -> Any:
    """By step: this rank's samples, the members of the sums, the weights after it; and the gradients."""
    rank = context.rank
    sampler = ElasticSampler(
        SAMPLES, BATCH, rank, context.num_ranks, seed=4, weights="measured", rebalance_every=3
    )
    model, found = wrapped(context, sampler), []
    reducer = model._bucket_reducer
    assert reducer is not None
    assert reducer.meter is not None
    reducer.meter = FixedMeter([30.0, 20.0, 10.0][rank])
    for step in range(10):
        for attempt in model.attempts(keep=keep):
            with attempt:
                model.zero_grad()
                indices = sampler.indices()
                loss = loss_of(model, indices)
                if rank == dies and step == 6:
                    os.kill(os.getpid(), signal.SIGKILL)
                loss.backward()
        sampler.commit()
        members = model.report()["members"]
        found.append((indices.tolist(), members, list(sampler.weights), gradients(model).clone()))
    model.close()
    return found


@pytest.mark.parametrize(("dies", "keep"), [(None, "buckets"), (2, "buckets"), (0, "recompute")])
def test_ranks_agree_on_weights_and_samples_are_counted_once(dies: int | None, keep: str) -> None:
    with World(3, timeout=180.0) as world:
        outcomes = world.try_run(follows, dies, keep)
    assert [o.rank for o in outcomes if o.status is Status.DIED] == ([] if dies is None else [dies])
    left = [outcome.value for outcome in outcomes if outcome.rank != dies]
    assert all(outcome.ok or outcome.rank == dies for outcome in outcomes), outcomes
    whole = ElasticSampler(SAMPLES, BATCH, 0, 3, seed=4)
    for step in range(10):
        rows = [rank[step] for rank in left]
        assert all(row[1:3] == rows[0][1:3] for row in rows)
        # A speed travels beside the sums of the step after it; three steps later weights may change.
        assert rows[0][2] == ([1.0] * 3 if step < 2 else [3.0, 2.0, 1.0])
        samples = [index for row in rows for index in row[0]]
        of_step = whole.indices(step, range(BATCH)).tolist()
        assert len(samples) == len(set(samples))
        assert set(samples) <= set(of_step)
        if rows[0][1] == tuple(r for r in range(3) if r != dies):  # nobody else's are in the sums
            for row in rows:
                torch.testing.assert_close(row[3], one_process(samples), rtol=1e-12, atol=1e-15)
            if step != 6 or keep == "recompute" or dies is None:
                assert samples == of_step  # a rank that died may have taken its part of one step with it


def differing(context: Any) -> list[str]:
    """Names of errors: of one sampler that is not as the others, when it is given, and later."""
    found = []

    def note(action: Callable[[], Any]) -> None:
        try:
            action()
            found.append("")
        except Exception as error:
            found.append(type(error).__name__)

    rank, ranks = context.rank, context.num_ranks
    note(lambda: wrapped(context, ElasticSampler(SAMPLES, BATCH, rank, ranks, seed=rank)))
    sampler = ElasticSampler(SAMPLES, BATCH, rank, ranks)
    model = wrapped(context, sampler)
    note(lambda: loss_of(model, sampler.indices()).backward())
    sampler.set_weights([1.0, 1.0 + rank])
    note(lambda: loss_of(model, sampler.indices()).backward())
    model.close()
    note(lambda: wrapped(context, ElasticSampler(SAMPLES, BATCH, rank, ranks + 1)))
    note(lambda: wrapped(context, "measured"))  # type: ignore[arg-type]
    note(lambda: wrapped(context, sampler, topology="native", reproducible=False))
    return found


def test_samplers_that_differ(world_of: Callable[[int], Any]) -> None:
    wanted = ["MismatchError", "", "MismatchError", "RangeError", "ArgumentTypeError", "ModeError"]
    assert world_of(2).run(differing, timeout=120.0) == [wanted] * 2


def test_what_is_refused() -> None:
    for options in (
        {"weights": "fastest"},
        {"max_samples": [4, 4]},
        {"max_samples": [4, 4, 0]},
        {"max_samples": [1, 1, 1]},
        {"rebalance_every": 0},
    ):
        with pytest.raises(ArgumentError):
            ElasticSampler(10, 4, 0, 3, **options)  # type: ignore[arg-type]
