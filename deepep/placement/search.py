"""Search for a placement: how many replicas each expert gets, and on which ranks.

Replicas go, one after the other, to the expert whose replicas have most to do: no other numbers of replicas
have a smaller largest share. Shares are packed on ranks in descending order, each on the rank with least to
do that has a place and no replica of that expert; then pairs are exchanged between the busiest rank and
others while that helps. Where loads are even already, halves of large ones spoil what fits; so the same is
tried with replicas of lighter experts, and the best is taken. All of it is arithmetic on floats in a fixed
order: the same loads, the same placement, on every rank and machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from deepep.errors import RangeError
from deepep.placement.experts import MOST_EXPERTS, ExpertPlacement, load_values
from deepep.runtime.checks import check_int

_Item = tuple[float, int]
"""A share of a load, and whose it is."""

_URGENCIES: tuple[Callable[[float], float], ...] = (float, math.sqrt, lambda load: 1 / (1 + load))
"""Functions of loads by which experts get replicas: the heaviest, most of them the heaviest, the lightest."""


def place(
    loads: Tensor | Sequence[float],
    num_ranks: int,
    num_redundant: int = 0,
    *,
    num_groups: int = 1,
    num_domains: int = 1,
) -> ExpertPlacement:
    """A placement of E experts with `num_redundant` replicas more, for loads [E] (entries, say; finite, from
    0; the same on all ranks).

    Every rank gets (E + num_redundant) / R. Replicas of an expert share its load equally, and lie on
    different ranks. No rank gets more to do than the busiest one without replicas has, if E / R is whole: as
    a last resort, extra places repeat experts of the same rank.

    num_groups, num_domains: experts in so many equal groups of consecutive ones, as gates limited to groups
    have them, and equal scale-up domains of consecutive ranks: groups are packed on domains as a whole, and
    an expert's replicas stay in its domain. 1 for both: experts go anywhere.

    Raises ArgumentTypeError, ShapeError or RangeError.
    """
    values = load_values(loads)
    num_experts = check_int("loads", len(values), 1, MOST_EXPERTS)
    check_int("num_ranks", num_ranks, 1, MOST_EXPERTS)
    check_int("num_groups", num_groups, 1, num_experts)
    check_int("num_domains", num_domains, 1, num_ranks)
    for name, value, divisor, what in (
        ("num_groups", num_experts, num_groups, "the experts"),
        ("num_domains", num_ranks, num_domains, "the ranks"),
        ("num_domains", num_groups, num_domains, "the groups"),
    ):
        if value % divisor:
            raise RangeError(name, str(divisor), f"a divisor of {value}, {what}")
    most = num_experts * (num_ranks // num_domains - 1)
    check_int("num_redundant", num_redundant, 0, min(most, MOST_EXPERTS - num_experts))
    if (num_experts + num_redundant) % num_ranks:
        allowed = f"with {num_experts} experts a multiple of {num_ranks}, the ranks"
        raise RangeError("num_redundant", str(num_redundant), allowed)
    size, per_rank = num_ranks // num_domains, (num_experts + num_redundant) // num_ranks

    found: list[list[list[int]]] = []
    for experts_of_domains in _groups_on_domains(values, num_groups, num_domains):
        ranks: list[list[int]] = []
        for experts in experts_of_domains:
            ranks += _place_in_domain(values, experts, size, per_rank)
        found.append(ranks)
    best = min(found, key=lambda ranks: _busiest(values, ranks))
    return ExpertPlacement(num_experts, num_ranks, tuple(e for rank in best for e in sorted(rank)))


def least_share(loads: Tensor | Sequence[float], num_ranks: int, num_redundant: int = 0) -> float:
    """A bound: no placement with so many replicas more has a busiest rank with less to do.

    The larger of the mean over ranks and the smallest possible largest share of an expert's load.
    """
    values = load_values(loads)
    experts = list(range(check_int("loads", len(values), 1, MOST_EXPERTS)))
    check_int("num_ranks", num_ranks, 1, MOST_EXPERTS)
    check_int("num_redundant", num_redundant, 0, len(values) * (num_ranks - 1))
    counts = _count_replicas(values, experts, len(values) + num_redundant, num_ranks)
    return max(
        math.fsum(values) / num_ranks, max(values[e] / n for e, n in zip(experts, counts, strict=True))
    )


def _groups_on_domains(values: list[float], num_groups: int, num_domains: int) -> list[list[list[int]]]:
    """Ways to give the domains their experts: packed by load, and in the order of their numbers."""
    size = len(values) // num_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    per_domain = num_groups // num_domains
    in_order = [list(range(d * per_domain, (d + 1) * per_domain)) for d in range(num_domains)]
    packed = in_order
    if num_domains > 1:
        items = [(math.fsum(values[e] for e in experts), g) for g, experts in enumerate(members)]
        packed = [sorted(groups) for groups in _pack(items, num_domains, per_domain)]
    return [[[e for g in groups for e in members[g]] for groups in way] for way in (packed, in_order)]


def _place_in_domain(
    values: list[float], experts: list[int], num_ranks: int, per_rank: int
) -> list[list[int]]:
    """Experts of each rank of one domain."""
    found = []
    for urgency in _URGENCIES if num_ranks * per_rank > len(experts) else _URGENCIES[:1]:
        urgent = [urgency(value) for value in values]
        counts = _count_replicas(urgent, experts, num_ranks * per_rank, num_ranks)
        items = [(values[e] / n, e) for e, n in zip(experts, counts, strict=True) for _ in range(n)]
        found.append(_pack(items, num_ranks, per_rank))
    if len(experts) % num_ranks:
        return min(found, key=lambda ranks: _busiest(values, ranks))
    # Without replicas: packed, and as they are. A place more repeats an expert of its rank, whose shares then
    # are the same load as before.
    once = len(experts) // num_ranks
    plain = [
        _pack([(values[e], e) for e in experts], num_ranks, once),
        [experts[r * once : (r + 1) * once] for r in range(num_ranks)],
    ]
    repeated = [[(rank * per_rank)[:per_rank] for rank in ranks] for ranks in plain]
    return min([*found, *repeated], key=lambda ranks: _busiest(values, ranks))


def _busiest(values: list[float], ranks: list[list[int]]) -> float:
    """The load of the busiest rank. Sums are rounded once, whatever their order."""
    counts: dict[int, int] = {}
    for rank in ranks:
        for expert in rank:
            counts[expert] = counts.get(expert, 0) + 1
    return max(math.fsum(values[e] / counts[e] for e in rank) for rank in ranks)


def _count_replicas(values: list[float], experts: list[int], total: int, most: int) -> list[int]:
    """Replicas of each expert, at most `most`, by which the largest share is the smallest there is."""
    counts = dict.fromkeys(experts, 1)
    waiting = [(-values[e], 1, e) for e in experts] if most > 1 else []
    heapq.heapify(waiting)
    for _ in range(total - len(experts)):
        _, count, expert = heapq.heappop(waiting)
        counts[expert] = count + 1
        if count + 1 < most:
            heapq.heappush(waiting, (-values[expert] / (count + 1), count + 1, expert))
    return [counts[e] for e in experts]


def _pack(items: list[_Item], num_bins: int, size: int) -> list[list[int]]:
    """Owners in `num_bins` bins of `size` places, none twice in a bin: none has more than num_bins items."""
    bins: list[list[_Item]] = [[] for _ in range(num_bins)]
    loads = [0.0] * num_bins

    def put(item: _Item, at: int) -> None:
        bins[at].append(item)
        loads[at] = math.fsum(share for share, _ in bins[at])

    for item in sorted(items, key=lambda item: (-item[0], item[1])):
        open_bins = [b for b in range(num_bins) if len(bins[b]) < size]
        free = [b for b in open_bins if all(owner != item[1] for _, owner in bins[b])]
        if free:
            put(item, min(free, key=lambda b: (loads[b], b)))
            continue
        # Every bin with a place has one of this owner. Then a bin has none, and so is full: it takes the item
        # and gives up another, that is not in the bin with the place yet: there are fewer there.
        at = min(open_bins, key=lambda b: (loads[b], b))
        present = {owner for _, owner in bins[at]}
        trades = [
            (max(loads[b] - moved[0] + item[0], loads[at] + moved[0]), b, moved)
            for b in range(num_bins)
            if all(owner != item[1] for _, owner in bins[b])
            for moved in bins[b]
            if moved[1] not in present
        ]
        _, other, moved = min(trades)
        bins[other].remove(moved)
        put(item, other)
        put(moved, at)
    _exchange(bins, loads)
    return [[owner for _, owner in items_of_bin] for items_of_bin in bins]


def _exchange(bins: list[list[_Item]], loads: list[float]) -> None:
    """Swaps pairs between the busiest bin and another while that leaves both below it."""
    for _ in range(2 * sum(len(items) for items in bins)):
        top = max(range(len(bins)), key=lambda b: (loads[b], -b))
        present = {owner for _, owner in bins[top]}
        best: tuple[float, int, _Item, _Item] | None = None
        for other, items in enumerate(bins):
            owners = {owner for _, owner in items}
            gap = loads[top] - loads[other]
            for given in bins[top]:
                if given[1] in owners:
                    continue
                for taken in items:
                    less = given[0] - taken[0]
                    if 0 < less < gap and taken[1] not in present:
                        trade = (max(loads[top] - less, loads[other] + less), other, given, taken)
                        best = trade if best is None else min(best, trade)
        if best is None:
            return
        _, other, given, taken = best
        for at, out, into in ((top, given, taken), (other, taken, given)):
            bins[at].remove(out)
            bins[at].append(into)
        after = [math.fsum(share for share, _ in bins[at]) for at in (top, other)]
        if max(after) >= loads[top]:  # by rounding alone: put back
            for at, out, into in ((top, taken, given), (other, given, taken)):
                bins[at].remove(out)
                bins[at].append(into)
            return
        loads[top], loads[other] = after
