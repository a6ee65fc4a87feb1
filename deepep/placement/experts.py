"""ExpertPlacement: which logical expert each physical expert is a replica of, and the rule that picks one.

Letters: E logical experts, which the router chooses among; P physical experts, P / R on each of R ranks,
rank r's from r * P / R on, as everywhere in this library; K top-k, T tokens of a rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepep.errors import ArgumentTypeError, RangeError, ShapeError
from deepep.runtime.checks import INDEX_DTYPES, check_int, dtype_names

MOST_EXPERTS = 1 << 16
"""Largest number of logical or physical experts, as of an MoE layer's."""

OF_TOKEN, OF_RANK, OF_EXPERT = 3518319155, 2882110345, 2360945575
"""2^32 times 1/g, 1/g^2, 1/g^3 with g^4 = g + 1, g = 1.2207...: multiples of the three, modulo 2^32, fill the
range evenly however tokens, ranks and experts are chosen in arithmetic progressions."""

EMPTY = -1
"""In a placement's `experts`: a place without one."""

_MASK = (1 << 32) - 1


@dataclass(frozen=True)
class ExpertPlacement:
    """Experts of a model on the ranks of a group, some of them several times.

    num_experts: E. num_ranks: R. experts: the logical expert of each of P physical ones, P a multiple of R,
    at least one for each logical expert; -1 for a place that is empty, where no token goes (`with_spare`).
    The same on all ranks: it says where tokens go. Plain integers: two placements that compare equal are the
    same.

    Raises ArgumentTypeError or RangeError.
    """

    num_experts: int
    num_ranks: int
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        check_int("num_experts", self.num_experts, 1, MOST_EXPERTS)
        check_int("num_ranks", self.num_ranks, 1, MOST_EXPERTS)
        if not isinstance(self.experts, tuple):
            raise ArgumentTypeError("experts", type(self.experts).__name__, "a tuple of integers")
        if not self.experts or len(self.experts) % self.num_ranks or len(self.experts) > MOST_EXPERTS:
            allowed = f"a positive multiple of {self.num_ranks}, the ranks, up to {MOST_EXPERTS}"
            raise RangeError("experts", f"{len(self.experts)} physical experts", allowed)
        for expert in self.experts:
            check_int("experts", expert, EMPTY, self.num_experts - 1)
        missing = sorted(set(range(self.num_experts)) - set(self.experts))
        if missing:
            raise RangeError("experts", f"no replica of {missing[:8]}", "each logical expert at least once")

    @property
    def num_physical(self) -> int:
        """P: the `num_experts` of calls whose top-k were mapped."""
        return len(self.experts)

    @property
    def num_local(self) -> int:
        """P / R."""
        return len(self.experts) // self.num_ranks

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """The logical experts of a rank's physical ones, by local index; -1: the place is empty."""
        rank = check_int("rank", rank, 0, self.num_ranks - 1)
        return self.experts[rank * self.num_local : (rank + 1) * self.num_local]

    @functools.cached_property
    def replicas_of(self) -> tuple[tuple[int, ...], ...]:
        """By logical expert: its physical ones, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for physical, expert in enumerate(self.experts):
            if expert != EMPTY:
                found[expert].append(physical)
        return tuple(tuple(physical) for physical in found)

    @property
    def has_replicas(self) -> bool:
        """True if some expert is on more than one place."""
        return any(len(physical) > 1 for physical in self.replicas_of)

    def replicas_without(self, ranks: Collection[int]) -> tuple[tuple[int, ...], ...]:
        """By logical expert: its physical ones on other ranks than these, ascending; perhaps none."""
        return tuple(
            tuple(one for one in physical if one // self.num_local not in ranks)
            for physical in self.replicas_of
        )

    def alive_without(self, ranks: Collection[int]) -> list[int]:
        """The logical experts that other ranks than these hold, ascending."""
        return [expert for expert, left in enumerate(self.replicas_without(ranks)) if left]

    @functools.cached_property
    def _tables(self) -> dict[tuple[torch.device, frozenset[int]], tuple[Tensor, Tensor]]:
        return {}

    def tables(
        self, device: torch.device | str = "cpu", without: Collection[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """replicas [E, C] int64, C the most replicas of any expert, the physical experts of each, ascending,
        the first repeated behind the last; and how many they are, [E] int64. Kept by device.

        without: ranks whose replicas are left out. An expert that has no other keeps them, for the tables'
        shape: a gate is not to choose it (`alive_without`).
        """
        device, gone = torch.device(device), frozenset(without)
        key = device, gone
        if key not in self._tables:
            most = max(len(physical) for physical in self.replicas_of)
            left = [
                one or every for one, every in zip(self.replicas_without(gone), self.replicas_of, strict=True)
            ]
            padded = [physical + physical[:1] * (most - len(physical)) for physical in left]
            counts = [len(physical) for physical in left]
            with torch.inference_mode(False):
                made = tuple(
                    torch.tensor(table, dtype=torch.int64, device="cpu") for table in (padded, counts)
                )
                self._tables[key] = made[0].to(device), made[1].to(device)
        return self._tables[key]

    def physical_topk(self, topk_idx: Tensor, rank: int) -> Tensor:
        """The physical experts for `topk_idx` [T, K] int32 or int64 of logical ones, -1 for none, of the
        tokens of `rank`: same shape, dtype and device. Waits for nothing.

        Which replica an entry gets is a function of rank, token's number and expert alone (`physical_topk`);
        replicas of an expert get equal shares as nearly as that allows. Indices that name no expert stay
        such, for dispatch to refuse. Raises ArgumentTypeError, ShapeError or RangeError.
        """
        if not isinstance(topk_idx, Tensor):
            raise ArgumentTypeError("topk_idx", type(topk_idx).__name__, "a tensor")
        if topk_idx.dtype not in INDEX_DTYPES:
            raise ArgumentTypeError("topk_idx", dtype_names([topk_idx.dtype]), dtype_names(INDEX_DTYPES))
        if topk_idx.ndim != 2:
            raise ShapeError("topk_idx", str(list(topk_idx.shape)), "[T, K]")
        rank = check_int("rank", rank, 0, self.num_ranks - 1)
        return physical_topk(topk_idx, *self.tables(topk_idx.device), rank, self.num_physical)

    # loads

    def rank_loads(self, loads: Tensor | Sequence[float]) -> tuple[float, ...]:
        """The load of each rank if replicas share the load of their expert equally; loads [E], none negative.

        Raises ArgumentTypeError, ShapeError or RangeError.
        """
        values = load_values(loads, self.num_experts)
        shares = [value / len(physical) for value, physical in zip(values, self.replicas_of, strict=True)]
        return tuple(
            math.fsum(shares[e] for e in self.of_rank(r) if e != EMPTY) for r in range(self.num_ranks)
        )

    def imbalance(self, loads: Tensor | Sequence[float]) -> float:
        """The busiest rank's load over the mean of all; 1 where there is no load."""
        of_ranks = self.rank_loads(loads)
        total = math.fsum(of_ranks)
        return max(of_ranks) * self.num_ranks / total if total else 1.0

    def logical_loads(self, counts: Tensor) -> Tensor:
        """[E] int64 or as `counts` is: loads of logical experts, from those of physical ones, [P], which a
        buffer has counted. Raises ArgumentTypeError or ShapeError.
        """
        if not isinstance(counts, Tensor):
            raise ArgumentTypeError("counts", type(counts).__name__, "a tensor")
        if counts.shape != (self.num_physical,):
            raise ShapeError("counts", str(list(counts.shape)), f"[{self.num_physical}]")
        experts = torch.tensor(self.experts, dtype=torch.int64, device=counts.device)
        held = experts != EMPTY
        return counts.new_zeros(self.num_experts).index_add_(0, experts[held], counts[held])

    # from one placement to the next

    def num_moved(self, previous: ExpertPlacement) -> int:
        """Physical experts whose weights must be brought: to ranks that did not hold them in `previous`."""
        self._check_comparable(previous)
        return sum(
            expert not in (EMPTY, *previous.of_rank(rank))
            for rank in range(self.num_ranks)
            for expert in self.of_rank(rank)
        )

    def renumbered(self, previous: ExpertPlacement, num_domains: int = 1) -> ExpertPlacement:
        """The same sets of experts, given to other ranks, so that fewer experts move than without: the rank
        of `previous` that has most in common with a set takes it, and keeps what stays at its local index.

        num_domains: ranks trade sets inside their scale-up domain, and domains as a whole.
        """
        self._check_comparable(previous)
        check_int("num_domains", num_domains, 1, self.num_ranks)
        if self.num_ranks % num_domains:
            raise RangeError("num_domains", str(num_domains), f"a divisor of {self.num_ranks}, the ranks")
        size = self.num_ranks // num_domains
        ours, theirs = (
            [set(p.of_rank(r)) - {EMPTY} for r in range(self.num_ranks)] for p in (self, previous)
        )

        def in_domain(sets: list[set[int]], domain: int) -> list[set[int]]:
            return sets[domain * size : (domain + 1) * size]

        domains = _match(
            [set().union(*in_domain(theirs, d)) for d in range(num_domains)],
            [set().union(*in_domain(ours, d)) for d in range(num_domains)],
        )
        made: list[int] = []
        for domain, taken in enumerate(domains):
            chosen = _match(in_domain(theirs, domain), in_domain(ours, taken))
            for local, which in enumerate(chosen):
                held = previous.of_rank(domain * size + local)
                made += _keeping_places(held, self.of_rank(taken * size + which))
        found = ExpertPlacement(self.num_experts, self.num_ranks, tuple(made))
        return min((found, self), key=lambda placement: placement.num_moved(previous))

    def _check_comparable(self, previous: object) -> None:
        if not isinstance(previous, ExpertPlacement):
            raise ArgumentTypeError("previous", type(previous).__name__, "an ExpertPlacement")
        got, own = (previous.num_experts, previous.num_ranks), (self.num_experts, self.num_ranks)
        if got != own:
            raise RangeError("previous", f"{got[0]} experts on {got[1]} ranks", f"{own[0]} on {own[1]}")

    def __repr__(self) -> str:
        return (
            f"<deepep.placement.ExpertPlacement: {self.num_experts} experts, "
            f"{self.num_physical} with replicas, on {self.num_ranks} ranks>"
        )


def contiguous(num_experts: int, num_ranks: int) -> ExpertPlacement:
    """The placement without one: every expert once, rank r's from r * E / R on.

    Raises ArgumentTypeError or RangeError, for E that is no multiple of R, too.
    """
    check_int("num_experts", num_experts, 1, MOST_EXPERTS)
    return ExpertPlacement(num_experts, num_ranks, tuple(range(num_experts)))


def physical_topk(topk_idx: Tensor, replicas: Tensor, counts: Tensor, rank: int, num_physical: int) -> Tensor:
    """`ExpertPlacement.physical_topk` on its tables, unchecked, for code that torch.compile traces.

    Entry (t, k) of expert e, which has n replicas, goes to number floor(n * f), ascending, with f the
    fraction of (t * OF_TOKEN + rank * OF_RANK + e * OF_EXPERT) / 2^32. So a token that names an expert twice
    names a replica twice, and is one row of low latency as before.
    """
    num_experts = replicas.shape[0]
    entries = topk_idx.long()
    expert = entries.clamp(0, num_experts - 1)
    token = torch.arange(topk_idx.shape[0], device=topk_idx.device).unsqueeze(1)
    fraction = (token * OF_TOKEN + expert * OF_EXPERT + rank * OF_RANK) & _MASK
    chosen = replicas[expert, (fraction * counts[expert]) >> 32]
    chosen = torch.where(entries < num_experts, chosen, num_physical)  # as wrong as it was
    return torch.where(entries < 0, entries, chosen).to(topk_idx.dtype)


def load_values(loads: object, num_experts: int | None = None) -> list[float]:
    """Loads [E] as floats. Raises ArgumentTypeError, ShapeError or RangeError."""
    if isinstance(loads, Tensor):
        if loads.is_complex() or loads.dtype == torch.bool:
            raise ArgumentTypeError("loads", dtype_names([loads.dtype]), "integers or floating point")
        if loads.ndim != 1:
            raise ShapeError("loads", str(list(loads.shape)), "[E]")
        values = loads.detach().to("cpu", torch.float64).tolist()
    elif isinstance(loads, Sequence) and not isinstance(loads, str | bytes):
        try:
            values = [float(load) for load in loads]
        except (TypeError, ValueError, OverflowError):
            raise ArgumentTypeError("loads", "what is no number", "numbers") from None
    else:
        raise ArgumentTypeError("loads", type(loads).__name__, "a tensor [E] or a list of numbers")
    if num_experts is not None and len(values) != num_experts:
        raise ShapeError("loads", f"[{len(values)}]", f"[{num_experts}]")
    bad = [value for value in values if not 0 <= value <= 2.0**1000]
    if bad:
        raise RangeError("loads", f"{bad[0]}", "finite numbers from 0")
    return values


def _match(held: list[set[int]], sets: list[set[int]]) -> list[int]:
    """By holder: the set it takes. Greedy: the pair with most in common first, then by number."""
    pairs = sorted((-len(h & s), i, j) for i, h in enumerate(held) for j, s in enumerate(sets))
    taken: dict[int, int] = {}
    given: set[int] = set()
    for _, i, j in pairs:
        if i not in taken and j not in given:
            taken[i] = j
            given.add(j)
    return [taken[i] for i in range(len(held))]


def _keeping_places(held: tuple[int, ...], experts: tuple[int, ...]) -> list[int]:
    """`experts` in an order in which those that were held keep their index, as far as there is one."""
    left = list(experts)
    places: list[int | None] = [None] * len(experts)
    for place, expert in enumerate(held[: len(experts)]):
        if expert in left:
            left.remove(expert)
            places[place] = expert
    rest = iter(left)
    return [next(rest) if expert is None else expert for expert in places]
