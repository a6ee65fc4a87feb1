"""Schedules: the steps by which a reduction's bytes travel. Each yields works to wait for.

A schedule moves the elements [begin, end) of a `Reduction`; both begin and end at a block, so that no block
is split and bits do not depend on how many pieces there are. Bytes and rounds: docs/parallel.md.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep.collectives.codecs import BLOCK, Messages, num_blocks
from deepep.collectives.plan import ReductionPlan
from deepep.collectives.transport import PointToPoint, Steps, empty_message

Span = tuple[int, int]
"""Elements [begin, end) of a tensor."""
ADDEND, PARTIAL, RESULT = range(3)
"""Levels, by which dice differ: a rank's addend, a group's sum, everybody's sum."""
ANYBODY = -1


@dataclass(frozen=True)
class Reduction:
    """One reduction on one rank.

    values: [N] accumulators' dtype, this rank's addend. out: [N], the caller's dtype. messages(level,
    sender): the format there, with its dice. finish(total, begin): the result of a sum that begins at an
    element. sum_all: sums messages of all ranks' addends, in place of decoding and adding them in turn.
    """

    plan: ReductionPlan
    net: PointToPoint
    values: Tensor
    out: Tensor
    messages: Callable[[int, int], Messages]
    finish: Callable[[Tensor, int], Tensor]
    sum_all: Callable[[list[Tensor]], Tensor] | None = None

    def steps(self, span: Span, tag: int) -> Steps:
        """The plan's schedule of these elements."""
        return _SCHEDULES[self.plan.schedule](self, span, tag)

    def encode(self, level: int, sender: int, values: Tensor, first: int) -> Tensor:
        """A message of `values`, which begin at element `first`."""
        return self.messages(level, sender).encode(values, first)

    def room(self, level: int, span: Span) -> Tensor:
        """Room for a message of these elements."""
        return empty_message(self.messages(level, ANYBODY).size(span[1] - span[0]), self.values.device)

    def sum(self, level: int, addends: list[Tensor], span: Span) -> Tensor:
        """The sum of messages in their order, the first as it is."""
        if level == ADDEND and self.sum_all is not None:
            return self.sum_all(addends)
        total = torch.empty_like(self.values[slice(*span)])
        for number, message in enumerate(addends):
            self.messages(level, ANYBODY).decode(message, total, add=number > 0)
        return total

    def write(self, message: Tensor, span: Span) -> None:
        """Writes a result's message to `out`."""
        part = self.out[slice(*span)]
        if part.dtype == torch.float32 or self.messages(RESULT, ANYBODY).name == "plain":
            self.messages(RESULT, ANYBODY).decode(message, part)
        else:
            wide = torch.empty(part.shape, dtype=torch.float32, device=part.device)
            self.messages(RESULT, ANYBODY).decode(message, wide)
            part.copy_(wide)


def shares(span: Span, count: int) -> list[Span]:
    """A span in `count` parts of whole blocks, the longer ones first."""
    begin, end = span
    short, longer = divmod(num_blocks(end - begin), count)
    parts = []
    for number in range(count):
        stop = min(begin + (short + (number < longer)) * BLOCK, end)
        parts.append((begin, stop))
        begin = stop
    return parts


def oneshot(task: Reduction, span: Span, tag: int) -> Steps:
    """Everybody's addend to everybody, who sums: one round."""
    net = task.net
    mine = task.encode(ADDEND, net.rank, task.values[slice(*span)], span[0])
    addends = [mine if rank == net.rank else task.room(ADDEND, span) for rank in range(net.num_ranks)]
    others = [rank for rank in range(net.num_ranks) if rank != net.rank]
    yield net.exchange([(mine, rank) for rank in others], [(addends[rank], rank) for rank in others], tag)
    task.out[slice(*span)] = task.finish(task.sum(ADDEND, addends, span), span[0])


class Seat:
    """One rank's place in a grouped schedule of some elements.

    groups: ranks by group; number: this rank's; group: its ranks; place: its position in it. parts: by owner,
    the elements whose sum it forms; a group's first ranks own one each, as many as the smallest group has.
    twins: owners of the same part in all groups, () if this rank owns none. among: a part's elements by the
    group whose owner rounds their result.
    """

    def __init__(self, task: Reduction, span: Span) -> None:
        everybody = (tuple(range(task.net.num_ranks)),)
        self.groups = task.plan.groups if task.plan.schedule == "hierarchical" else everybody
        self.number = next(i for i, group in enumerate(self.groups) if task.net.rank in group)
        self.group = self.groups[self.number]
        self.place = self.group.index(task.net.rank)
        self.parts = shares(span, min(map(len, self.groups)))
        self.is_owner = self.place < len(self.parts)
        self.twins = tuple(group[self.place] for group in self.groups) if self.is_owner else ()
        self.among = [shares(part, len(self.groups)) for part in self.parts]


def grouped(task: Reduction, span: Span, tag: int) -> Steps:
    """Direct and hierarchical: addends to their part's owner in the group, the groups' sums to the owner
    among the groups, who rounds the result; the same bytes go to everybody. Direct has one group.
    """
    seat = Seat(task, span)
    total = yield from _reduce_in_group(task, seat, tag)
    results = yield from _reduce_across(task, seat, total, tag)
    yield from _share_in_group(task, seat, results, tag)


def _reduce_in_group(task: Reduction, seat: Seat, tag: int) -> Generator[list[Any], None, Tensor]:
    """The group's sum of this rank's part; of a rank alone in its group its own elements, unrounded."""
    net, group = task.net, seat.group
    if len(group) == 1:
        return task.values[slice(*seat.parts[0])]
    mine = [task.encode(ADDEND, net.rank, task.values[slice(*part)], part[0]) for part in seat.parts]
    addends = {}  # of this rank's part, by rank
    if seat.is_owner:
        part = seat.parts[seat.place]
        addends = {rank: task.room(ADDEND, part) for rank in group}
        addends[net.rank] = mine[seat.place]
    yield net.exchange(
        [(message, group[owner]) for owner, message in enumerate(mine) if owner != seat.place],
        [(message, rank) for rank, message in addends.items() if rank != net.rank],
        tag,
    )
    return task.sum(ADDEND, [addends[rank] for rank in group], part) if addends else task.values[:0]


def _reduce_across(
    task: Reduction, seat: Seat, total: Tensor, tag: int
) -> Generator[list[Any], None, list[Tensor]]:
    """Messages of the result of this rank's part, by the group whose owner rounded them."""
    if not seat.is_owner:
        return []
    net, number, among = task.net, seat.number, seat.among[seat.place]
    others = [(i, rank) for i, rank in enumerate(seat.twins) if rank != net.rank]
    if others:
        base = seat.parts[seat.place][0]
        mine = [task.encode(PARTIAL, number, total[a - base : b - base], a) for a, b in among]
        sums = [task.room(PARTIAL, among[number]) for _ in seat.twins]
        sums[number] = mine[number]
        yield net.exchange([(mine[i], r) for i, r in others], [(sums[i], r) for i, r in others], tag)
        total = task.sum(PARTIAL, sums, among[number])
    begin = among[number][0]
    result = task.encode(RESULT, ANYBODY, task.finish(total, begin), begin)
    results = [task.room(RESULT, share) for share in among]
    results[number] = result
    if others:
        yield net.exchange([(result, r) for _, r in others], [(results[i], r) for i, r in others], tag)
    return results


def _share_in_group(task: Reduction, seat: Seat, results: list[Tensor], tag: int) -> Steps:
    """Results go round the group as the bytes they are: nothing is rounded again."""
    net, group = task.net, seat.group
    whole = [torch.cat([task.room(RESULT, share) for share in among]) for among in seat.among]
    if results:
        whole[seat.place] = torch.cat(results)
    yield net.exchange(
        [(whole[seat.place], rank) for rank in group if rank != net.rank] if results else [],
        [(message, group[owner]) for owner, message in enumerate(whole) if owner != seat.place],
        tag,
    )
    for message, among in zip(whole, seat.among, strict=True):
        offset = 0
        for share in among:
            size = task.messages(RESULT, ANYBODY).size(share[1] - share[0])
            task.write(message[offset : offset + size], share)
            offset += size


def ring(task: Reduction, span: Span, tag: int) -> Steps:
    """Part p of R begins at position p + 1 and is whole at position p; then results go round."""
    net, order = task.net, task.plan.order
    ranks, place = len(order), order.index(net.rank)
    ahead, behind = order[(place + 1) % ranks], order[(place - 1) % ranks]
    parts = shares(span, ranks)
    total = task.values[slice(*parts[(place - 1) % ranks])]
    for step in range(1, ranks):
        part = parts[(place - step - 1) % ranks]
        coming = task.room(PARTIAL, part)
        going = task.encode(PARTIAL, net.rank, total, 0)
        yield net.exchange([(going, ahead)], [(coming, behind)], tag)
        total = task.values[slice(*part)].clone()
        task.messages(PARTIAL, ANYBODY).decode(coming, total, add=True)
    message = task.encode(RESULT, ANYBODY, task.finish(total, parts[place][0]), parts[place][0])
    task.write(message, parts[place])
    for step in range(1, ranks):
        part = parts[(place - step) % ranks]
        coming = task.room(RESULT, part)
        yield net.exchange([(message, ahead)], [(coming, behind)], tag)
        task.write(coming, part)
        message = coming


def chain(task: Reduction, span: Span, tag: int) -> Steps:
    """Sums go up the line of ranks, results come down it, both at once if there are several pieces."""
    net, order = task.net, task.plan.order
    place, last = order.index(net.rank), len(order) - 1
    total = task.values[slice(*span)]
    if place > 0:
        coming = task.room(PARTIAL, span)
        yield net.exchange([], [(coming, order[place - 1])], tag)
        below, total = task.sum(PARTIAL, [coming], span), total
        total = below + total
    if place < last:
        message = task.room(RESULT, span)
        yield net.exchange([(task.encode(PARTIAL, net.rank, total, span[0]), order[place + 1])], [], tag)
        yield net.exchange([], [(message, order[place + 1])], tag)
    else:
        message = task.encode(RESULT, ANYBODY, task.finish(total, span[0]), span[0])
    task.write(message, span)
    if place > 0:
        yield net.exchange([(message, order[place - 1])], [], tag)


def tree(task: Reduction, span: Span, tag: int) -> Steps:
    """A binomial tree: in round k odd multiples of 2^k add to the even ones before; results go back."""
    net, order = task.net, task.plan.order
    place, ranks = order.index(net.rank), len(order)
    total, step = task.values[slice(*span)].clone(), 1
    while step < ranks and place % (2 * step) == 0:
        if place + step < ranks:
            coming = task.room(PARTIAL, span)
            yield net.exchange([], [(coming, order[place + step])], tag)
            task.messages(PARTIAL, ANYBODY).decode(coming, total, add=True)
        step *= 2
    if place > 0:
        message, parent = task.room(RESULT, span), order[place - step]
        yield net.exchange([(task.encode(PARTIAL, net.rank, total, span[0]), parent)], [], tag)
        yield net.exchange([], [(message, parent)], tag)
    else:
        message = task.encode(RESULT, ANYBODY, task.finish(total, span[0]), span[0])
    task.write(message, span)
    while step > 1:
        step //= 2
        if place + step < ranks:
            yield net.exchange([(message, order[place + step])], [], tag)


def native(task: Reduction, span: Span, tag: int) -> Steps:
    """The transport's own all-reduce, which sums in an order of its own; on CUDA in place."""
    total, out = task.values[slice(*span)], task.out[slice(*span)]
    if not (total.is_cuda and total.data_ptr() == out.data_ptr()):
        total = total.clone()
    yield task.net.all_reduce(total, dist.ReduceOp(dist.ReduceOp.SUM))
    result = task.finish(total, span[0])
    if result.data_ptr() != out.data_ptr():
        out.copy_(result)


_SCHEDULES: dict[str, Callable[[Reduction, Span, int], Steps]] = {
    "oneshot": oneshot,
    "direct": grouped,
    "nvlink": grouped,  # where its kernels cannot run
    "hierarchical": grouped,
    "ring": ring,
    "chain": chain,
    "tree": tree,
    "native": native,
}
