"""ElasticSampler: every sample has its turn once a pass, whoever is there; all of it is a pure function."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import deepep
from deepep.errors import ArgumentError, RangeError
from deepep.parallel.sampler import ElasticSampler, shuffled

sizes = st.integers(1, 3000)
weights = st.lists(st.floats(0.05, 20.0), min_size=1, max_size=7)


def of_all(samplers: list[ElasticSampler], step: int) -> list[int]:
    """A step's samples, of all members."""
    return [index for sampler in samplers for index in sampler.indices(step).tolist()]


@settings(deadline=None)
@given(size=sizes, key=st.text(max_size=5))
def test_a_permutation(size: int, key: str) -> None:
    everything = shuffled(torch.arange(size), size, key)
    assert sorted(everything.tolist()) == list(range(size))
    places = torch.arange(size)[:: max(1, size // 7)]
    assert torch.equal(shuffled(places, size, key), everything[places])  # each place by itself


def test_permutations_are_unlike_each_other_and_the_order() -> None:
    """Fixed points, pairs that stay neighbours, and agreements of two permutations are about one each: for
    random ones their numbers have a Poisson distribution, so 12 of them have one chance in a billion.
    """
    for size in (4096, 5000, 60_000):
        order = torch.arange(size)
        one, other = (shuffled(order, size, f"{seed} 0") for seed in (1, 2))
        next_turn = shuffled(order, size, "1 1")
        assert int((one == order).sum()) < 12
        assert int((one == other).sum()) < 12
        assert int((one == next_turn).sum()) < 12
        assert int((one[1:] == one[:-1] + 1).sum()) < 12
        # Halves: of the first half of the places, half come from the first half of the data, within 5 sigma.
        lower = int((one[: size // 2] < size // 2).sum())
        assert abs(lower - size / 4) < 5 * (size / 16) ** 0.5


def test_a_permutation_of_more_than_fits_in_memory() -> None:
    size = (1 << 60) - 3
    places = torch.arange(0, 1000) * (size // 1000)
    found = shuffled(places, size, "0 0")
    assert len(set(found.tolist())) == 1000
    assert bool(((found >= 0) & (found < size)).all())


@settings(deadline=None)
@given(data=st.data(), num_samples=st.integers(1, 200), batch=st.integers(1, 90), shares=weights)
def test_each_sample_has_its_turn_once_whoever_dies(
    data: Any, num_samples: int, batch: int, shares: list[float]
) -> None:
    ranks = len(shares)
    samplers = [
        ElasticSampler(num_samples, batch, rank, ranks, seed=3, weights=shares) for rank in range(ranks)
    ]
    members, seen = list(range(ranks)), Counter[int]()
    steps = 2 * num_samples // batch + 1
    for step in range(steps):
        if len(members) > 1 and data.draw(st.booleans()):
            members.remove(data.draw(st.sampled_from(members)))
            for sampler in samplers:
                sampler.set_members(members)
        taken = of_all(samplers, step)
        assert len(taken) == batch
        seen.update(taken)
    turns, rest = divmod(steps * batch, num_samples)
    assert set(seen.values()) <= {turns, turns + 1}
    assert sum(count == turns + 1 for count in seen.values()) == rest
    assert turns == 0 or len(seen) == num_samples


@settings(deadline=None)
@given(batch=st.integers(1, 500), shares=weights, data=st.data())
def test_members_share_by_weight(batch: int, shares: list[float], data: Any) -> None:
    ranks = len(shares)
    members = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1))
    sampler = ElasticSampler(1000, batch, 0, ranks, weights=shares)
    sampler.set_members(sorted(members))
    parts = sampler.shares()
    assert list(parts) == sorted(members)
    assert [place for part in parts.values() for place in part] == list(range(batch))
    whole = sum(shares[rank] for rank in members)
    for rank, part in parts.items():
        assert abs(len(part) - batch * shares[rank] / whole) <= 1 + 1e-6
    means = []
    for rank in range(ranks):
        mine = ElasticSampler(1000, batch, rank, ranks, weights=shares)
        mine.set_members(sorted(members))
        means.append(mine.gradient_weight())
    assert sum(means) == pytest.approx(1.0)
    assert all((mean > 0) <= (rank in members) for rank, mean in enumerate(means))


def test_what_is_left_out_where_the_batch_shrinks() -> None:
    samplers = [ElasticSampler(100, 12, rank, 3, batch="shrink") for rank in range(3)]
    before = of_all(samplers, 5)
    for sampler in samplers:
        sampler.set_members([0, 2])
    assert of_all(samplers, 5) == before[:4] + before[8:]
    assert [sampler.gradient_weight() for sampler in samplers] == [0.5, 0.0, 0.5]


def test_a_pure_function_of_seed_and_step() -> None:
    made = [ElasticSampler(77, 10, 1, 2, seed=seed) for seed in (5, 5, 6)]
    steps = [[sampler.indices(step).tolist() for step in (9, 0, 3)] for sampler in made]
    assert steps[0] == steps[1] != steps[2]
    # Fixed here: a checkpoint of today goes on with the same samples tomorrow.
    assert made[0].indices(0).tolist() == EXPECTED


EXPECTED = [50, 9, 21, 36, 35]


def test_steps_that_do_not_count_come_again() -> None:
    sampler = ElasticSampler(40, 4, 0, 2, seed=1)
    steps = iter(sampler)
    first, second = next(steps), next(steps)
    assert next(iter(sampler)) == first  # nothing has been committed
    sampler.commit()
    assert next(iter(sampler)) == second
    other = ElasticSampler(40, 4, 1, 2, seed=1)
    other.load_state_dict(sampler.state_dict())
    assert other.step == 1
    sampler.commit(7)
    assert sampler.step == 8
    with pytest.raises(RangeError, match="seed"):
        ElasticSampler(40, 4, 1, 2, seed=2).load_state_dict(sampler.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_loader_takes_it(workers: int) -> None:
    data = list(range(100, 120))
    sampler = deepep.ElasticSampler(data, 6, 1, 2, seed=1)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    for step, batch in zip(range(9), loader, strict=False):
        assert batch.tolist() == [data[i] for i in sampler.indices(step).tolist()]
    ordered = ElasticSampler(data, 6, 1, 2, shuffle=False)
    assert ordered.indices(0).tolist() == [3, 4, 5]
    assert ordered.indices(3).tolist() == [1, 2, 3]  # of the next pass


def test_what_is_refused() -> None:
    def make(num_samples: Any = 10, batch: Any = 4, rank: Any = 0, ranks: Any = 2, **options: Any) -> Any:
        return ElasticSampler(num_samples, batch, rank, ranks, **options)

    for arguments, options in (
        ((0,), {}),
        ((1.5,), {}),
        ((10, 0), {}),
        ((10, 4, 2), {}),
        ((10, 4, -1), {}),
        ((10, 4, 0, 0), {}),
        ((), {"weights": [1.0]}),
        ((), {"weights": [1.0, 0.0]}),
        ((), {"weights": [1.0, float("nan")]}),
        ((), {"batch": "grow"}),
        ((), {"shuffle": "yes"}),
        ((), {"seed": 0.5}),
    ):
        with pytest.raises(ArgumentError):
            make(*arguments, **options)
    sampler = make()
    for members in ([], [2], [-1]):
        with pytest.raises(ArgumentError, match="members"):
            sampler.set_members(members)
    with pytest.raises(ArgumentError, match="step"):
        sampler.indices(-1)
