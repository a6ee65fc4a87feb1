"""Properties of the rules for crossings between domains (csrc/layout/rules: two_level, crossing_layout).

The protocol is played, a sender and its gateway taking steps in a drawn order: whatever the order, every
token reaches its final rows, nothing is written before it was read, and nobody waits indefinitely.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deepep import layout
from deepep.sim.rules.checking import Violation, check_equal
from deepep.sim.rules.layout import CoreProperty, Laid

Record = tuple[int, tuple[int, ...]]  # token, final row at each rank of the domain


@dataclass
class _Rail:
    """A rail: one source's windows to one gateway, and the words that order them."""

    buffer: layout.CrossingBuffer
    peer: int  # the source's number at the gateway
    memory: dict[int, Record | None] = field(default_factory=dict)  # by offset; None: read
    words: dict[int, int] = field(
        default_factory=dict
    )  # arrived, at the gateway; at the source credit, of half h: -1 - h
    headers: dict[int, tuple[int, int]] = field(default_factory=dict)  # by offset of the chunk

    def send(self, number: int, records: list[Record], window: int) -> bool:
        """Write a window, if there is credit for it."""
        turn = layout.window_turn(number)
        if self.words.get(-1 - turn.half, 0) < turn.credit:
            return False
        sizes = layout.records_in_chunks(len(records), window)
        for position, record in enumerate(records):
            chunk = self.buffer.receive_chunk(self.peer, turn.half, layout.chunk_of_record(position))
            at = chunk + self.buffer.record(position)
            if self.memory.get(at) is not None:
                raise Violation(f"window {number}: record {position} is written over one that was not read")
            self.memory[at] = record
        for chunk, size in enumerate(sizes):
            self.headers[self.buffer.receive_chunk(self.peer, turn.half, chunk)] = (size, len(records))
            word = self.buffer.arrived(self.peer, turn.half, chunk)
            self.words[word] = self.words.get(word, 0) + 1
        return True

    def receive(self, number: int, window: int) -> list[Record] | None:
        """Read a window, if it has arrived, and give it back."""
        turn, records = layout.window_turn(number), []
        for chunk in range(window // 16):
            if self.words.get(self.buffer.arrived(self.peer, turn.half, chunk), 0) < turn.arrivals:
                return None
        for chunk in range(window // 16):
            begin = self.buffer.receive_chunk(self.peer, turn.half, chunk)
            for place in range(self.headers[begin][0]):
                at = begin + self.buffer.record(chunk * 16 + place)
                record = self.memory.get(at)
                if record is None:
                    raise Violation(f"window {number}: chunk {chunk}: record {place} is not there")
                records.append(record)
                self.memory[at] = None
        if len(records) != self.headers[self.buffer.receive_chunk(self.peer, turn.half, 0)][1]:
            raise Violation(f"window {number}: {len(records)} records came")
        self.words[-1 - turn.half] = self.words.get(-1 - turn.half, 0) + 1
        return records


def _long(laid: Laid, source: int) -> Tensor:
    """[T, R] bool: the source's tokens several times over, so that there are several windows."""
    return laid.tables[source].repeat(1 + (laid.case.seed + source) % 9, 1)


def windows_deliver_every_row(laid: Laid) -> None:
    """Two calls in a row, windows interleaved in a drawn order: every token reaches its rows in its order."""
    case, rng = laid.case, random.Random(laid.case.seed)
    size, num_ranks = case.options.ranks_per_node, case.num_ranks
    num_domains = -(-num_ranks // size)
    if num_domains == 1:
        return
    window, before = 16 * rng.randrange(1, 4), 0
    for source in rng.sample(range(num_ranks), min(3, num_ranks)):
        own, domain = source // size, rng.randrange(num_domains - 1)
        domain += domain >= own
        ranks = range(domain * size, min((domain + 1) * size, num_ranks))
        buffer = layout.CrossingBuffer(num_domains, window, 64, 32, size, 4)
        rail, before = _Rail(buffer, layout.peer_of_domain(own, domain)), 0
        unread = _Rail(buffer, rail.peer)
        if [unread.send(number, [], window) for number in range(3)] != [True, True, False]:
            raise Violation("two windows, and not three, may be under way unread")
        if layout.domain_of_peer(rail.peer, domain) != own:
            raise Violation(f"domain {domain} takes peer {rail.peer} for another than domain {own}")
        for call in range(2):
            table = _long(laid, source)[: 40 + 20 * call]
            rows = layout.send_rows(table, torch.zeros(num_ranks, dtype=torch.int64), laid.num_parts)
            sent = _play(rail, table, rows, ranks, size, before, window, rng)
            want = [
                (token, tuple(rows[token, ranks].tolist()))
                for token in table[:, ranks].any(1).nonzero().flatten().tolist()
            ]
            if sent != want:
                raise Violation(f"rank {source} to domain {domain}: {sent[:3]}.. came, expected {want[:3]}..")
            before += len(layout.windows(len(table), window))


def _play(
    rail: _Rail,
    table: Tensor,
    rows: Tensor,
    ranks: range,
    size: int,
    before: int,
    window: int,
    rng: random.Random,
) -> list[Record]:
    """One call: what the gateway has read when both are done."""
    pieces = layout.windows(len(table), window)
    check_equal("windows of a call", 0, list(range(len(table))), [t for b, e in pieces for t in range(b, e)])
    domain = ranks[0] // size
    sent = 0
    came: dict[int, list[Record]] = {}
    while len(came) < len(pieces):
        moved = False
        for sends in rng.sample((True, False), 2):
            if sends and sent < len(pieces):
                begin, end = pieces[sent]
                position = layout.node_routes(table[begin:end], size).position[:, domain]
                chosen = (position >= 0).nonzero().flatten().tolist()
                check_equal("positions", 0, list(range(len(chosen))), position[chosen].tolist())
                records = [(begin + t, tuple(rows[begin + t, ranks].tolist())) for t in chosen]
                if rail.send(before + sent, records, window):
                    sent, moved = sent + 1, True
            elif not sends:
                # Windows of two halves are read in any order.
                unread = [number for number in range(sent) if number not in came]
                number = rng.choice(unread[:2] or [sent])
                got = rail.receive(before + number, window) if unread else None
                if got is not None:
                    came[number], moved = got, True
            if moved and rng.random() < 0.5:
                break
        if not moved:
            raise Violation(f"after {sent} windows sent and {len(came)} received nobody goes on")
        if sent - len(came) > 2:
            raise Violation(f"{sent - len(came)} windows are under way; there are two halves")
    return [record for number in sorted(came) for record in came[number]]


def gateways_are_alive(laid: Laid) -> None:
    """A gateway has its source's local index; where that is masked, the next rank that is not stands in."""
    case, rng = laid.case, random.Random(laid.case.seed)
    num_ranks, size = case.num_ranks, case.options.ranks_per_node
    alive = torch.tensor([rng.random() < 0.7 for _ in range(num_ranks)])
    firsts = list(enumerate(range(0, num_ranks, size)))
    for domain, first in rng.sample(firsts, min(6, len(firsts))):
        ranks = list(range(first, min(first + size, num_ranks)))
        for source in rng.sample(range(num_ranks), min(6, num_ranks)):
            start = source % size % len(ranks)
            check_equal("gateway", 0, ranks[start], layout.forwarding_rank(source, domain, num_ranks, size))
            living = [rank for rank in ranks[start:] + ranks[:start] if alive[rank]]
            got = layout.living_gateway(source, domain, size, alive)
            check_equal(f"living gateway of rank {source}", 0, living[0] if living else -1, got)


def crossing_pieces_do_not_overlap(laid: Laid) -> None:
    """Every word, chunk, record part and staged row has bytes of its own, aligned and inside."""
    rng = random.Random(laid.case.seed)
    domains, window, copies = rng.randrange(2, 6), 16 * rng.randrange(1, 4), rng.randrange(1, 5)
    ranks, topk, scales = rng.randrange(1, 9), rng.randrange(9), rng.randrange(4)
    row, words = 16 * rng.randrange(1, 5), rng.randrange(1, 40)
    sizes = layout.RecordSizes(row, scales, ranks, topk)
    record = [(0, row, 16), (sizes.scales(), 4 * scales, 4), (sizes.token(), 4, 4)]
    record += [(sizes.final_row(local), 4, 4) for local in range(ranks)]
    record += [(at(k), 4, 4) for at in (sizes.index, sizes.weight) for k in range(topk)]
    _check_pieces("record", record, sizes.bytes())
    returned = [(0, row, 16), *((sizes.return_weight(k), 4, 4) for k in range(topk))]
    _check_pieces("returned record", returned, sizes.return_bytes())

    buffer = layout.CrossingBuffer(domains, window, sizes.bytes(), sizes.return_bytes(), copies, words)
    pieces, staged = [], []
    for peer in range(domains - 1):
        pieces += [(buffer.credit(peer, half), 8, 128) for half in range(2)]
        for half in range(2):
            pieces += [
                (buffer.mailbox(peer, half), 8 * words, 128),
                (buffer.mailbox_signal(peer, half), 8, 128),
            ]
            for chunk in range(window // 16):
                pieces.append((buffer.arrived(peer, half, chunk), 8, 8))
                for at in (buffer.receive_chunk, buffer.send_chunk):
                    begin = at(peer, half, chunk)
                    pieces.append((begin, 8, 16))  # its header
                    pieces += [(begin + buffer.record(16 * chunk + i), sizes.bytes(), 16) for i in range(16)]
                    if begin + buffer.record(15) + sizes.bytes() > begin + buffer.chunk_bytes():
                        raise Violation(f"chunk {chunk}: its last record lies past its end")
            staged += [
                (buffer.staged_row(peer, half, position, copy), sizes.return_bytes(), 16)
                for position in range(window)
                for copy in range(copies)
            ]
    _check_pieces("crossing buffer", pieces, buffer.total_bytes())
    _check_pieces("staging", staged, buffer.staging_bytes())


def _check_pieces(what: str, pieces: list[tuple[int, int, int]], total: int) -> None:
    begin, size, alignment = np.array(sorted(pieces)).T
    ends = begin + size
    if begin[0] < 0 or ends.max() > total or (begin % alignment).any():
        raise Violation(f"{what}: pieces lie outside of [0, {total}) or are not aligned")
    if (begin[1:] < ends[:-1]).any():
        at = int(np.argmax(begin[1:] < ends[:-1]))
        raise Violation(f"{what}: pieces overlap: [{begin[at]}, {ends[at]}) and the one at {begin[at + 1]}")


def crossings_hold_at_scale(laid: Laid) -> None:
    """Up to 2048 ranks: places of a source's tokens, one by one, and memory: what its parts add up to."""
    rng = random.Random(laid.case.seed)
    num_ranks = min(2048, 2 ** rng.randrange(3, 12) + rng.randrange(4))
    size = min(64, 2 ** rng.randrange(7))
    domains = -(-num_ranks // size)
    tokens = rng.randrange(1, 30)
    table = torch.from_numpy(
        np.random.default_rng(laid.case.seed).random((tokens, num_ranks)) < 4 / num_ranks
    )
    routes = layout.node_routes(table, size, laid.num_parts)
    next_place = [0] * domains
    for token in range(tokens):
        wanted = table[token].nonzero().flatten().tolist()
        for domain in {rank // size for rank in wanted}:
            check_equal("position", token, next_place[domain], int(routes.position[token, domain]))
            mask = sum(1 << rank % size for rank in wanted if rank // size == domain)
            check_equal("ranks of the domain", token, mask, int(routes.local_ranks[token, domain]) % 2**64)
            next_place[domain] += 1
    check_equal("tokens for each domain", 0, next_place, routes.num_tokens.tolist())
    if int((routes.position >= 0).sum()) != sum(next_place):
        raise Violation("tokens cross to domains that do not want them")

    peers = max(domains, 2) - 1
    window = layout.default_window(max(domains, 2))
    check_equal("default window", 0, min(1024, max(64, 896 // peers)) // 16 * 16, window)
    hidden, topk, scales = 128 * rng.randrange(1, 129), rng.randrange(33), rng.randrange(129)
    sizes = layout.RecordSizes(2 * hidden, scales, size, topk)
    parts = 2 * hidden + 4 * scales + 4 + 4 * size + 8 * topk
    check_equal("record", 0, -(-parts // 16) * 16, sizes.bytes())
    copies, words = min(size, topk or size), num_ranks + domains + 3 + size * 8
    buffer = layout.CrossingBuffer(peers + 1, window, sizes.bytes(), sizes.return_bytes(), copies, words)
    chunks = window // 16
    rows = 2 * 2 * peers * chunks * (16 + 16 * sizes.bytes())
    lines = peers * (2 * -(-8 * words // 128) + 4 + 2 * -(-8 * chunks // 128)) * 128
    check_equal("memory for a NIC", 0, -(-(rows + lines) // 128) * 128, buffer.total_bytes())
    check_equal("staging", 0, 2 * peers * window * copies * sizes.return_bytes(), buffer.staging_bytes())
    try:
        layout.CrossingBuffer(2**31, 2**30, 2**31, 0, 1, 0)
    except OverflowError:
        pass
    else:
        raise Violation("memory of more than 2^63 bytes was not refused")


CROSSING_PROPERTIES: tuple[CoreProperty, ...] = (
    windows_deliver_every_row,
    gateways_are_alive,
    crossing_pieces_do_not_overlap,
    crossings_hold_at_scale,
)
