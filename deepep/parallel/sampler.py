"""ElasticSampler: which samples a rank takes in a step, by the seed, the step and who is there alone.

No rank holds a position that the others cannot work out: the batch of a step is a stretch of a shuffled,
endless sequence of the data set, and the members share it by their weights. So a rank that dies takes no
samples with it, and one that joins needs the step's number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from deepep.errors import ArgumentTypeError, RangeError
from deepep.parallel.balance import LEAST_GAIN, parts_of, step_seconds, weights_of
from deepep.runtime.checks import MOST, check_flag, check_int

BATCHES = ("keep", "shrink")
MEASURED = "measured"
_MOST_SAMPLES = 1 << 60
_ROUNDS = 6
_MULTIPLIERS = (0x2545F4914F6CDD1D, 0x1B873593CC9E2D51)  # odd


class ElasticSampler(Sampler[list[int]]):
    """Batches of this rank, one a step: a batch sampler for torch's DataLoader.

        sampler = ElasticSampler(len(data), 512, rank, num_ranks, seed=0)
        for batch in DataLoader(data, batch_sampler=sampler):
            ...; optimizer.step(); sampler.commit()

    num_samples: of the data set, or something that has a length. global_batch: samples of a step, of all
    ranks together. rank, num_ranks: this rank and R. weights: a positive number for each rank, in proportion
    to which the members share a step; None: all alike; "measured": alike at first, then by the speeds that a
    deepep.DistributedDataParallel(sampler=) has measured, which gives means over samples by any weights.
    batch: after deaths, "keep": the members share the whole batch; "shrink": each has what it had, and the
    dead ranks' samples of these steps are left out.
    max_samples: for each rank, the most that it can hold of a step: the others take what is beyond, and if
    all are full, some of the batch is left out. rebalance_every: steps, at least, for which measured weights
    stay. shuffle: every pass over the data has an order of its own; False: the data's.

    Steps go on without end: a batch may begin in one pass and end in the next, and in every pass each sample
    has its turn once. `step` is the next step that counts: `commit` moves it, iterating does not, so that a
    step that is made again has the same samples. A DataLoader reads ahead: make a new iterator of it once the
    members have changed, or the step was set; a change of weights is no reason to.

    Raises ArgumentTypeError and RangeError.
    """

    def __init__(
        self,
        num_samples: int | Sized,
        global_batch: int,
        rank: int,
        num_ranks: int,
        *,
        seed: int = 0,
        weights: Sequence[float] | str | None = None,
        batch: str = "keep",
        shuffle: bool = True,
        max_samples: Sequence[int] | None = None,
        rebalance_every: int = 50,
    ) -> None:
        size = len(num_samples) if isinstance(num_samples, Sized) else num_samples
        self.num_samples = check_int("num_samples", size, 1, _MOST_SAMPLES)
        self.global_batch = check_int("global_batch", global_batch, 1, MOST)
        self.num_ranks = check_int("num_ranks", num_ranks, 1, MOST)
        self.rank = check_int("rank", rank, 0, self.num_ranks - 1)
        self.seed = check_int("seed", seed, -(1 << 63), (1 << 63) - 1)
        self.shuffle = check_flag("shuffle", shuffle)
        if batch not in BATCHES:
            raise RangeError("batch", repr(batch), " or ".join(map(repr, BATCHES)))
        self.batch = batch
        self.step = 0
        self.members: tuple[int, ...] = tuple(range(self.num_ranks))
        self.is_measured = isinstance(weights, str) and weights == MEASURED
        alike = weights is None or self.is_measured
        self.set_weights([1.0] * self.num_ranks if alike else weights)  # type: ignore[arg-type]
        self.max_samples = None if max_samples is None else self._checked_limits(max_samples)
        self.rebalance_every = check_int("rebalance_every", rebalance_every, 1, MOST)
        self._steps_since = 0  # that weights were changed
        self._drawn: dict[int, dict[int, int]] = {}  # by step: members' samples, as shared when it was drawn

    def _checked_limits(self, given: Sequence[int]) -> list[int]:
        if not isinstance(given, (list, tuple)) or len(given) != self.num_ranks:
            raise ArgumentTypeError("max_samples", repr(given)[:100], f"{self.num_ranks} integers")
        limits = [check_int("max_samples", limit, 1, MOST) for limit in given]
        if sum(limits) < self.global_batch:
            allowed = f"{self.global_batch} samples or more, of all ranks together"
            raise RangeError("max_samples", repr(given)[:100], allowed)
        return limits

    # who is there

    def set_weights(self, weights: Sequence[float]) -> None:
        """Shares steps by other weights from now on; the same on all ranks."""
        if not isinstance(weights, (list, tuple)) or len(weights) != self.num_ranks:
            raise ArgumentTypeError("weights", repr(weights)[:100], f"{self.num_ranks} numbers")
        given = [float(weight) for weight in weights]
        if not all(0 < weight < float("inf") for weight in given):
            raise RangeError("weights", repr(weights)[:100], "positive, finite numbers")
        self.weights = given
        self._shares: dict[int, range] | None = None

    def set_members(self, members: Sequence[int]) -> None:
        """Shares steps among these ranks from now on; the same on all of them.

        This rank may be missing: then its batches are empty.
        """
        ranks = sorted({check_int("members", rank, 0, self.num_ranks - 1) for rank in members})
        if not ranks:
            raise RangeError("members", "none", "at least one rank")
        self.members = tuple(ranks)
        self._shares = None

    def follow(self, speeds: Mapping[int, float]) -> None:
        """Takes the speeds of a step's ranks, in samples per second, 0.0 where not known: once for every step
        that counts, the same on all ranks. Weights that are "measured" follow them, if that saves time.
        """
        if not self.is_measured:
            return
        self._steps_since += 1
        if self._steps_since < self.rebalance_every or not all(speed > 0 for speed in speeds.values()):
            return
        found = weights_of(speeds)
        weights = [found.get(rank, weight) for rank, weight in enumerate(self.weights)]
        now, then = (
            step_seconds(self._sizes(sorted(speeds), given), speeds) for given in (self.weights, weights)
        )
        if then <= (1 - LEAST_GAIN) * now:
            self.set_weights(weights)
            self._steps_since = 0

    # which samples

    def shares(self) -> dict[int, range]:
        """Places in a step's batch, 0 to global_batch - 1, of each member: contiguous, ranks ascending."""
        if self._shares is None:
            parts, begin = {}, 0
            for rank, size in self._sizes(self.members, self.weights).items():
                parts[rank] = range(begin, begin + size)
                begin += size
            self._shares = {rank: parts[rank] for rank in self.members}
        return dict(self._shares)

    def _sizes(self, members: Sequence[int], weights: Sequence[float]) -> dict[int, int]:
        """Samples of the ranks among which steps are shared, the dead ones too if the batch shrinks."""
        among = range(self.num_ranks) if self.batch == "shrink" else members
        most = None if self.max_samples is None else [self.max_samples[rank] for rank in among]
        sizes = parts_of(self.global_batch, [weights[rank] for rank in among], most)
        return dict(zip(among, sizes, strict=True))

    def indices(self, step: int | None = None, places: range | None = None) -> Tensor:
        """Samples of a step's batch, [len(places)] int64, on the CPU.

        step: None: the next that counts. places: None: this rank's share.
        """
        step = self.step if step is None else check_int("step", step, 0, _MOST_SAMPLES)
        if places is None:
            shares = self.shares()
            self._drawn[step] = {rank: len(share) for rank, share in shares.items()}
            places = shares.get(self.rank, range(0))
        first = step * self.global_batch  # in the endless sequence
        found = []
        at, last = first + places.start, first + places.stop
        while at < last:
            turn, begin = divmod(at, self.num_samples)
            end = min(self.num_samples, begin + last - at)
            found.append(self._turn(turn, torch.arange(begin, end, device="cpu")))
            at += end - begin
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")

    def counts(self) -> dict[int, int]:
        """Samples of each member in the next step that counts.

        As they were shared when this rank drew its own, if it has.
        """
        found = self._drawn.get(self.step)
        return {r: len(share) for r, share in self.shares().items()} if found is None else dict(found)

    def gradient_weight(self, members: Iterable[int] | None = None) -> float:
        """Weight of this rank's mean over its samples in the mean over all samples of the next step that
        counts. members: those whose samples are there; None: all who share the step.
        """
        counts = self.counts()
        total = sum(counts.get(rank, 0) for rank in (counts if members is None else members))
        return counts.get(self.rank, 0) / total if total else 0.0

    def _turn(self, turn: int, places: Tensor) -> Tensor:
        """The samples at these places of a pass over the data."""
        return shuffled(places, self.num_samples, f"{self.seed} {turn}") if self.shuffle else places

    # as torch's

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while True:
            yield self.indices(step).tolist()
            step += 1

    def commit(self, step: int | None = None) -> None:
        """Says that a step counts; None: the next."""
        done = self.step if step is None else check_int("step", step, 0, _MOST_SAMPLES)
        self.step = done + 1
        self._drawn = {step: counts for step, counts in self._drawn.items() if step >= self.step}

    def state_dict(self) -> dict[str, Any]:
        """The step and measured weights, for a rank that joins or begins again.

        Beside them what has to be the same there.
        """
        state = {"step": self.step, **self._same()}
        if self.is_measured:
            state |= {"weights": list(self.weights), "steps_since": self._steps_since}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. Raises RangeError if it is of another sequence."""
        for name, value in self._same().items():
            if state.get(name) != value:
                raise RangeError(name, repr(state.get(name)), f"{value!r}, as this sampler has it")
        self.step = check_int("step", state["step"], 0, _MOST_SAMPLES)
        self._drawn.clear()
        if self.is_measured and "weights" in state:
            self.set_weights(state["weights"])
            self._steps_since = check_int("steps_since", state["steps_since"], 0, _MOST_SAMPLES)

    def statement(self, with_weights: bool = True) -> str:
        """Text that is the same on ranks whose samplers share steps as each other's do."""
        weights = self.weights if with_weights else None
        rest = (self.batch, self.max_samples, self.is_measured, self.rebalance_every, weights)
        return repr((self._same(), *rest))

    def _same(self) -> dict[str, Any]:
        names = ("num_samples", "global_batch", "num_ranks", "seed", "shuffle")
        return {name: getattr(self, name) for name in names}


def shuffled(places: Tensor, size: int, key: str) -> Tensor:
    """A permutation of 0 to size - 1, at these places: by arithmetic, so nothing of its size is ever made.

    places: int64. key: what chooses the permutation. A Feistel network over the smallest square of a power of
    two that holds `size`; places that it sends outside go through it again.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    raw = hashlib.sha256(key.encode()).digest() + hashlib.sha256(key.encode() + b"+").digest()
    keys = [int.from_bytes(raw[8 * i : 8 * i + 8], "big", signed=True) for i in range(_ROUNDS)]
    out, open_places = places.clone(), torch.arange(len(places), device=places.device)
    while len(open_places):
        left, right = out[open_places] >> half, out[open_places] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right, round_key) & mask)
        mixed = (left << half) | right
        out[open_places] = mixed
        open_places = open_places[mixed >= size]
    return out


def _mix(x: Tensor, key: int) -> Tensor:
    """A hash of int64 words, whose low bits depend on all of x and key; products wrap."""
    for multiplier in _MULTIPLIERS:
        x = (x ^ key) * multiplier
        x = x ^ ((x >> 29) & 0x7FFFFFFFF)
    return x
