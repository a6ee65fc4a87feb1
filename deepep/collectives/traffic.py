"""ReductionTraffic of a plan: which rank sends how many bytes to which, round by round. Pure, and exact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from deepep.collectives.codecs import FIXED, LOSSY, PLAIN, Messages, num_blocks
from deepep.collectives.plan import ALL_ADDENDS, ReductionPlan
from deepep.collectives.schedules import shares
from deepep.collectives.transport import MANY_UNITS

Round = dict[tuple[int, int], int]
"""Bytes by (source, target), all under way at once."""
Size = Callable[[int], int]
"""Bytes of a message of so many elements."""


@dataclass(frozen=True)
class ReductionTraffic:
    """Rounds of a reduction on R ranks, in the order in which a rank waits for them.

    ahead: what comes before the pieces. pieces: each piece's rounds; pieces are under way side by side.
    """

    ahead: tuple[Round, ...]
    pieces: tuple[tuple[Round, ...], ...]

    def sent_by(self, rank: int) -> int:
        """Bytes that a rank sends in all."""
        everything = [*self.ahead, *(one for piece in self.pieces for one in piece)]
        return sum(size for one in everything for (source, _), size in one.items() if source == rank)


def traffic_of(
    plan: ReductionPlan, count: int, num_ranks: int, dtype: torch.dtype = torch.float32
) -> ReductionTraffic:
    """Rounds of `count` elements. The transport's own reduction is counted as a ring of the ranks' order."""
    plan = plan.for_ranks(num_ranks)
    is_double = dtype == torch.float64
    codec = PLAIN if is_double else plan.codec
    inner = PLAIN if is_double else plan.inner or plan.codec
    wide = Messages(PLAIN, torch.float64 if is_double else torch.float32).size
    plain, whole = Messages(PLAIN, dtype).size, Messages(PLAIN, torch.int32).size
    lossy = Messages(codec).size
    result = lossy if codec in LOSSY else plain
    ahead: list[Round] = []
    if codec == FIXED and (plan.schedule not in ALL_ADDENDS or num_ranks == 1):
        addend = partial = whole
        ahead = _units(num_blocks(count), num_ranks)
    else:
        name = inner if plan.schedule == "hierarchical" else codec
        addend = Messages(name).size if name in LOSSY else plain
        partial = lossy if codec in LOSSY else wide
    sizes = (addend, partial, result)
    pieces = []
    for begin, end in shares((0, count), plan.pieces):
        rounds = _ROUNDS[plan.schedule](plan, (begin, end), sizes)
        pieces.append(tuple(one for one in map(_nonempty, rounds) if one))
    return ReductionTraffic(tuple(one for one in ahead if one), tuple(pieces))


def _nonempty(one: Round) -> Round:
    return {pair: size for pair, size in one.items() if size}


def _units(blocks: int, num_ranks: int) -> list[Round]:
    """The exponents' maximum."""
    everyone = range(num_ranks)
    if blocks * num_ranks > MANY_UNITS:
        return _around(tuple(everyone), blocks)
    return [_nonempty({(i, j): blocks for i in everyone for j in everyone if i != j})]


def _around(order: Sequence[int], size: int) -> list[Round]:
    """The transport's own reduction of `size` bytes, as what PointToPoint counts of it."""
    ranks = len(order)
    if ranks == 1:
        return []
    total, rounds = 2 * size * (ranks - 1) // ranks, 2 * (ranks - 1)
    parts = [total // rounds + (number < total % rounds) for number in range(rounds)]
    return [{(rank, order[(i + 1) % ranks]): part for i, rank in enumerate(order)} for part in parts]


def _oneshot(plan: ReductionPlan, span: tuple[int, int], sizes: tuple[Size, Size, Size]) -> Iterator[Round]:
    everyone, size = plan.order, sizes[0](span[1] - span[0])
    yield {(i, j): size for i in everyone for j in everyone if i != j}


def _grouped(plan: ReductionPlan, span: tuple[int, int], sizes: tuple[Size, Size, Size]) -> Iterator[Round]:
    addend, partial, result = sizes
    groups = plan.groups if plan.schedule == "hierarchical" else (tuple(sorted(plan.order)),)
    parts = shares(span, min(map(len, groups)))
    among = [shares(part, len(groups)) for part in parts]

    def length(piece: tuple[int, int]) -> int:
        return piece[1] - piece[0]

    yield {
        (rank, group[owner]): addend(length(part))
        for group in groups
        for owner, part in enumerate(parts)
        for rank in group
        if rank != group[owner]
    }
    twins = [[(number, group[place]) for number, group in enumerate(groups)] for place in range(len(parts))]
    pairs = [(place, i, j) for place, owners in enumerate(twins) for i in owners for j in owners if i != j]
    yield {(i[1], j[1]): partial(length(among[place][j[0]])) for place, i, j in pairs}
    yield {(i[1], j[1]): result(length(among[place][i[0]])) for place, i, j in pairs}
    yield {
        (group[owner], rank): sum(result(length(share)) for share in among[owner])
        for group in groups
        for owner in range(len(parts))
        for rank in group
        if rank != group[owner]
    }


def _ring(plan: ReductionPlan, span: tuple[int, int], sizes: tuple[Size, Size, Size]) -> Iterator[Round]:
    order = plan.order
    ranks, parts = len(order), [end - begin for begin, end in shares(span, len(order))]
    for size, shift in ((sizes[1], 0), (sizes[2], 1)):
        for step in range(1, ranks):
            yield {
                (rank, order[(i + 1) % ranks]): size(parts[(i - step + shift) % ranks])
                for i, rank in enumerate(order)
            }


def _chain(plan: ReductionPlan, span: tuple[int, int], sizes: tuple[Size, Size, Size]) -> Iterator[Round]:
    order, count = plan.order, span[1] - span[0]
    pairs = list(itertools.pairwise(order))
    yield from ({pair: sizes[1](count)} for pair in pairs)
    yield from ({(above, below): sizes[2](count)} for below, above in reversed(pairs))


def _tree(plan: ReductionPlan, span: tuple[int, int], sizes: tuple[Size, Size, Size]) -> Iterator[Round]:
    order, count, step, back = plan.order, span[1] - span[0], 1, []
    while step < len(order):
        places = range(0, len(order) - step, 2 * step)
        yield {(order[place + step], order[place]): sizes[1](count) for place in places}
        back.append({(order[place], order[place + step]): sizes[2](count) for place in places})
        step *= 2
    yield from reversed(back)


def _native(plan: ReductionPlan, span: tuple[int, int], sizes: tuple[Size, Size, Size]) -> Iterator[Round]:
    yield from _around(tuple(sorted(plan.order)), sizes[1](span[1] - span[0]))


_ROUNDS: dict[str, Callable[[ReductionPlan, tuple[int, int], tuple[Size, Size, Size]], Iterator[Round]]] = {
    "oneshot": _oneshot,
    "direct": _grouped,
    "nvlink": _grouped,
    "hierarchical": _grouped,
    "ring": _ring,
    "chain": _chain,
    "tree": _tree,
    "native": _native,
}
