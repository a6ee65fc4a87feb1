"""Cases of all-gathers in sessions, sends around a ring and Engram storage: plain data that a seed draws, and
a rank's run of one against the oracle, to the bit. For any backend and device.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep.reference import side_primitives as oracle
from harness.device_calls import same_bits

KINDS = (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn)
Shape = tuple[int, ...]


def values(shape: Shape, dtype: torch.dtype, *seed: int) -> Tensor:
    """A tensor of drawn bits, the same for the same seed."""
    generator = torch.Generator().manual_seed(hash(seed) % (1 << 31))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same(got: Tensor, expected: Tensor) -> bool:
    """Same dtype, shape and bits, whatever the strides."""
    flat = [t.new_empty(t.numel()).copy_(t.flatten()) for t in (got, expected)]
    return got.shape == expected.shape and same_bits(*flat)


@dataclass(frozen=True)
class Gather:
    """One all_gather. in_place: of each tensor. alone: a tensor is passed, not a list. waits: at once."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype
    in_place: tuple[bool, ...]
    alone: bool
    waits: bool


def draw_sessions(dice: random.Random) -> list[list[Gather]]:
    """Sessions of one buffer, of some gathers each."""
    return [[_draw_gather(dice) for _ in range(dice.randint(0, 4))] for _ in range(dice.randint(1, 3))]


def _draw_gather(dice: random.Random) -> Gather:
    count = dice.randint(1, 3)
    shapes = tuple(tuple(dice.choice((0, 1, 3, 8)) for _ in range(dice.randint(0, 3))) for _ in range(count))
    in_place = tuple(dice.random() < 0.4 for _ in range(count))
    return Gather(
        shapes, dice.choice(KINDS), in_place, count == 1 and dice.random() < 0.5, dice.random() < 0.5
    )


def run_sessions(buffer: Any, device: torch.device, sessions: list[list[Gather]], seed: int) -> None:
    """This rank's calls; every session is configured as large as it is, and all its results are looked at
    when it ends, which is before any rank's next session may write.
    """
    ranks = buffer.num_ranks
    for number, gathers in enumerate(sessions):
        size = sum(
            buffer.get_agrs_num_max_session_bytes(buffer.group, gather.shapes, gather.dtype)
            for gather in gathers
        )
        buffer.agrs_set_config(max(size, 1), max(len(gathers), 1))
        found: list[tuple[Tensor, Tensor, Callable[[], None]]] = []
        with buffer.agrs_new_session():
            for place, gather in enumerate(gathers):
                found += _gather(buffer, device, gather, (seed, number, place), ranks)
            for got, expected, handle in reversed(found):
                handle()
                assert same(got.cpu(), expected), (number, gathers)
        for got, expected, _ in found:
            assert same(got.cpu(), expected), (number, gathers)


def _gather(
    buffer: Any, device: torch.device, gather: Gather, seed: tuple[int, ...], ranks: int
) -> list[tuple[Tensor, Tensor, Callable[[], None]]]:
    given, expected = [], []
    for i, (shape, in_place) in enumerate(zip(gather.shapes, gather.in_place, strict=True)):
        everyone = [values(shape, gather.dtype, *seed, i, rank) for rank in range(ranks)]
        mine = everyone[buffer.rank_idx].to(device)
        if in_place:
            part = buffer.agrs_get_inplace_tensor(shape, gather.dtype)
            part.copy_(mine)
            mine = part
        given.append(mine)
        expected.append(oracle.gathered(everyone))
    *got, handle = buffer.all_gather(given[0] if gather.alone else given)
    if gather.waits:
        handle()
    for tensor, mine, in_place in zip(got, given, gather.in_place, strict=True):
        if in_place and mine.numel():
            assert tensor[buffer.rank_idx].data_ptr() == mine.data_ptr()
    return [(tensor, wanted, handle) for tensor, wanted in zip(got, expected, strict=True)]


@dataclass(frozen=True)
class Step:
    """A tensor's way from one rank to its neighbour, or the call that takes it there (`takes`)."""

    src: int
    dst: int
    takes: bool
    shape: Shape
    dtype: torch.dtype
    number: int


def draw_ring(dice: random.Random, num_ranks: int, inflight: int) -> list[Step]:
    """Calls of all ranks, in an order in which each of them returns before the next is made."""
    model = oracle.RingModel(num_ranks, inflight)
    steps: list[Step] = []
    under_way: dict[tuple[int, int], list[Step]] = {}
    ways = [(src, dst) for src in range(num_ranks) for dst in sorted(model.neighbours(src))]
    for number in range(dice.randint(1, 24)):
        src, dst = dice.choice(ways)
        if model.returns_recv(src, dst) and (dice.random() < 0.4 or not model.returns_send(src, dst)):
            model.recv(src, dst)
            sent = under_way[src, dst].pop(0)
            steps.append(Step(src, dst, True, sent.shape, sent.dtype, sent.number))
        else:
            shape = tuple(dice.choice((0, 1, 3, 8)) for _ in range(dice.randint(0, 2)))
            step = Step(src, dst, False, shape, dice.choice(KINDS), number)
            model.send(src, dst, values(shape, step.dtype, number))
            under_way.setdefault((src, dst), []).append(step)
            steps.append(step)
    for (src, dst), left in under_way.items():
        steps += [Step(src, dst, True, sent.shape, sent.dtype, sent.number) for sent in left]
    return steps


def run_ring(buffer: Any, device: torch.device, steps: list[Step], seed: int) -> None:
    """This rank's part of the calls. What was sent is overwritten at once."""
    for step in steps:
        expected = values(step.shape, step.dtype, seed, step.number)
        if step.takes and step.dst == buffer.rank_idx:
            got = torch.zeros_like(expected, device=device)
            buffer.pp_recv(got, step.src)
            assert same(got.cpu(), expected), step
        elif not step.takes and step.src == buffer.rank_idx:
            given = expected.to(device)
            buffer.pp_send(given, step.dst)
            given.zero_()


@dataclass(frozen=True)
class Table:
    """Entries written, and indices fetched of them. packs: P of the scales; 0: BF16, without."""

    entries: int
    hidden: int
    packs: int
    fetches: tuple[Shape, ...]
    column_major: bool
    seed: int


def draw_table(dice: random.Random) -> Table:
    """A write, and some fetches of it."""
    fetches = tuple((dice.choice((0, 1, 3, 9)), dice.choice((0, 1, 2, 5))) for _ in range(dice.randint(1, 3)))
    packs = dice.choice((0, 1, 3))
    return Table(
        entries=dice.choice((1, 2, 7)),
        hidden=dice.choice((16, 48)),
        packs=packs,
        fetches=fetches,
        column_major=bool(packs) and dice.random() < 0.5,
        seed=dice.randrange(1 << 20),
    )


def run_tables(buffer: Any, device: torch.device, tables: list[Table]) -> None:
    """Each table is written while the fetches of the one before are under way."""
    pending: list[tuple[Callable[[], Any], Tensor, Tensor | None, bool]] = []
    for table in tables:
        ranks, dtype = buffer.num_ranks, torch.float8_e4m3fn if table.packs else torch.bfloat16
        storages = [values((table.entries, table.hidden), dtype, table.seed, rank) for rank in range(ranks)]
        sf = None
        if table.packs:
            sf = values((ranks * table.entries, table.packs), torch.int32, table.seed)
        mine = storages[buffer.rank_idx].to(device, copy=True)
        buffer.engram_write(mine, None if sf is None else sf.to(device))
        mine.view(torch.uint8).zero_()
        _check_fetches(pending)
        pending = []
        for number, shape in enumerate(table.fetches):
            generator = torch.Generator().manual_seed(table.seed + 31 * number + buffer.rank_idx)
            total = ranks * table.entries
            indices = torch.randint(0, total, shape, generator=generator, dtype=torch.int32)
            expected = oracle.fetched(storages, indices, sf)
            turned = table.column_major
            hook = buffer.engram_fetch(indices.to(device), use_tma_aligned_col_major_sf=turned)
            pending.append((hook, *expected, turned))
    _check_fetches(pending)


def _check_fetches(pending: list[tuple[Callable[[], Any], Tensor, Tensor | None, bool]]) -> None:
    for hook, data, sf, turned in pending:
        got, got_sf = hook()
        assert same(got.cpu(), data)
        assert (got_sf is None) == (sf is None)
        if sf is None or got_sf is None:
            continue
        assert same(got_sf.cpu(), sf)
        tokens, width = sf.shape
        if tokens and width:
            assert got_sf.stride() == ((1, -(-tokens // 4) * 4) if turned else (width, 1))
