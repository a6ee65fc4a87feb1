"""The wire: any dtype, any shape, any counts, with ranks left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepep.reference.wire import Wire
from deepep.sim import World

WireOf = Callable[[Any, tuple[int, ...]], Wire | None]


def exchange(ctx: Any) -> list[str]:
    """Exchanges rows named after sender, receiver and number; returns what is wrong."""
    wire, me, ranks = Wire.whole(ctx.group), ctx.rank, range(ctx.num_ranks)
    patterns: list[Callable[[int, int], int]] = [
        lambda source, target: 0,
        lambda source, target: (source + 2 * target) % 3,
        lambda source, target: 4 * (target == 1 % ctx.num_ranks),  # one receives everything
    ]
    wrong = []
    for dtype, tail, count in itertools.product(DTYPES, TAILS, patterns):
        sends, recvs = [count(me, r) for r in ranks], [count(r, me) for r in ranks]
        sent = [16 * me + 4 * r + n for r in ranks for n in range(count(me, r))]
        want = [16 * r + 4 * me + n for r in ranks for n in range(count(r, me))]
        got = wire.all_to_all_rows(named(sent, tail, dtype), sends, recvs)
        if got.dtype != dtype or not torch.equal(got, named(want, tail, dtype)):
            wrong.append(f"{dtype} {tail} {sends} {recvs}: {got}")
    for dtype, tail in itertools.product(DTYPES, TAILS):
        everyone = wire.all_gather(named([me + 1], tail, dtype)[0])
        want_all = {r: named([r + 1], tail, dtype)[0] for r in ranks}
        if not all(torch.equal(everyone[r], want_all[r]) for r in ranks) or len(everyone) != len(ranks):
            wrong.append(f"all_gather {dtype} {tail}: {everyone}")
    return wrong


DTYPES = (torch.uint8, torch.int32, torch.bfloat16, torch.float64, torch.bool)
TAILS: tuple[tuple[int, ...], ...] = ((), (1,), (3,), (2, 2))


def named(names: list[int], tail: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """[n, *tail]: every element of row i is names[i]."""
    column = torch.tensor(names, dtype=torch.int64).view(-1, *([1] * len(tail)))
    return column.expand(len(names), *tail).to(dtype)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_rows_arrive_as_sent(num_ranks: int, world_of: Callable[[int], World]) -> None:
    assert world_of(num_ranks).run(exchange) == [[]] * num_ranks


def without_rank_1(ctx: Any, wire_of: WireOf) -> Any:
    wire = wire_of(ctx, (0, 2, 3))
    if wire is None:
        return None
    counts = [1, 0, 1, 1]
    got = wire.all_to_all_rows(torch.tensor([[ctx.rank, to] for to in wire.members]), counts, counts)
    try:
        wire.all_to_all_rows(torch.zeros(4, 2), [1] * 4, counts)
    except ValueError as error:
        return got.tolist(), sorted(wire.all_gather(torch.tensor(1))), str(error)


def test_masked_ranks_are_left_out(world_of: Callable[[int], World], wire_of: WireOf) -> None:
    results = world_of(4).run(without_rank_1, wire_of)
    assert results[1] is None
    for rank in (0, 2, 3):
        rows, gathered, refusal = results[rank]
        assert rows == [[source, rank] for source in (0, 2, 3)]
        assert gathered == [0, 2, 3]
        assert refusal == "counts: rows for the masked ranks [1]"


def refusals(ctx: Any) -> list[str]:
    attempts: list[Callable[[], object]] = [
        lambda: Wire(ctx.group, 0, 2, (1,)),
        lambda: Wire(ctx.group, 0, 2, (1, 0)),
        lambda: Wire(ctx.group, 0, 2, (0, 2)),
        lambda: Wire(ctx.group, 0, 2, (0, 0)),
        lambda: Wire.whole(ctx.group).all_to_all_rows(torch.zeros(2, 1), [1], [1]),
        lambda: Wire.whole(ctx.group).all_to_all_rows(torch.zeros(2, 1), [2, 0], [2, 0]),
    ]
    said = []
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("nothing")
    return said


def test_refuses(world_of: Callable[[int], World]) -> None:
    names = ["rank", "members", "members", "members", "rows", "counts"]
    assert [sentence.split(":")[0] for sentence in world_of(1).run(refusals)[0]] == names
