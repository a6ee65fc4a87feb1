"""Properties of the layout core (csrc/layout, through deepep.layout): rule by rule, what the reference says.

Each property lays a case out with the core and compares with the global view of `deepep.reference`, which
shares no code with it. Capacities and slots, which the reference does not have, are held against what they
are for, and sizes against Python's integers, which do not overflow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from deepep import layout
from deepep.config import Config
from deepep.reference import high_throughput, low_latency
from deepep.reference import layout as reference
from deepep.sim.cases.case import Case
from deepep.sim.cases.options import SPACE
from deepep.sim.rules.checking import Violation, check_equal

#: Options that have no bearing on a layout, at their plainest: to draw cases with nothing else varied.
FIXED_OPTIONS = {
    name: alternatives[0]
    for name, alternatives in SPACE.items()
    if name not in ("idx_dtype", "expert_alignment", "ranks_per_node", "spare_slots")
}


class Laid:
    """A case as tensors, with what several properties start from: the core's own layouts."""

    def __init__(self, case: Case) -> None:
        dtype = getattr(torch, case.options.idx_dtype)
        self.case = case
        self.ranks = range(case.num_ranks)
        self.topk_idx = [torch.from_numpy(indices).to(dtype) for indices in case.topk_idx]  # R x [T, K]
        self.num_parts = 1 + case.seed % 5

    @cached_property
    def layouts(self) -> list[layout.DispatchLayout]:
        case = self.case
        node = case.options.ranks_per_node
        return [layout.dispatch_layout(idx, case.num_experts, case.num_ranks, node) for idx in self.topk_idx]

    @cached_property
    def tables(self) -> list[Tensor]:
        """R x [T, R] bool."""
        return [laid.is_token_in_rank for laid in self.layouts]

    @cached_property
    def first_rows(self) -> layout.FirstRows:
        return layout.first_rows(torch.stack([laid.num_tokens_per_rank for laid in self.layouts]))

    @cached_property
    def send_rows(self) -> list[Tensor]:
        """R x [T, R]: where each source's tokens lie at each receiver."""
        firsts = self.first_rows.first_row
        return [layout.send_rows(t, firsts[s], self.num_parts) for s, t in enumerate(self.tables)]

    @cached_property
    def received(self) -> list[reference.ReceivedRows]:
        """The reference's rows of each rank."""
        return [reference.receive_rows(self.tables, rank) for rank in self.ranks]

    @cached_property
    def received_topk(self) -> list[Tensor]:
        """The reference's recv_topk_idx of each rank, [N, K]."""
        inputs = [
            high_throughput.DispatchInput(
                x=torch.empty(len(idx), 0, dtype=torch.uint8),
                topk_idx=idx,
                topk_weights=torch.zeros(idx.shape),
                is_token_in_rank=table,
            )
            for idx, table in zip(self.topk_idx, self.tables, strict=True)
        ]
        outputs = high_throughput.dispatch(inputs, self.case.num_experts)
        return [idx for output in outputs if (idx := output.recv_topk_idx) is not None]


def counts_are_the_references(laid: Laid) -> None:
    """Tokens per rank, node and expert, and token-in-rank."""
    case = laid.case
    for rank, (idx, got) in enumerate(zip(laid.topk_idx, laid.layouts, strict=True)):
        want = reference.dispatch_layout(idx, case.num_experts, case.num_ranks, case.options.ranks_per_node)
        same(rank, "num_tokens_per_rank", want.num_tokens_per_rank, got.num_tokens_per_rank)
        same(rank, "num_tokens_per_expert", want.num_tokens_per_expert, got.num_tokens_per_expert)
        same(rank, "is_token_in_rank", want.is_token_in_rank, got.is_token_in_rank)
        same(rank, "num_tokens_per_node", want.num_tokens_per_node, got.num_tokens_per_node)


def masks_are_the_table(laid: Laid) -> None:
    """The bits of a token's ranks are its row of is_token_in_rank."""
    for rank, (idx, table) in enumerate(zip(laid.topk_idx, laid.tables, strict=True)):
        masks = layout.rank_masks(idx, laid.case.num_experts, laid.case.num_ranks)
        bits = torch.arange(laid.case.num_ranks)
        same(rank, "rank_masks", table, (masks[:, None] >> bits & 1).bool())


def rows_are_in_source_order(laid: Laid) -> None:
    """Senders and receivers agree on every row, and the order is (source rank, source token)."""
    num_received = laid.first_rows.num_received.tolist()
    before = torch.tensor([0, *laid.case.num_tokens]).cumsum(0)  # tokens of all lower ranks
    expected = torch.full(
        (int(before[-1]), laid.case.num_ranks), -1
    )  # of all ranks' tokens, one after another
    for rank, want in enumerate(laid.received):
        got = layout.receive_rows(laid.tables, rank)
        same(rank, "receive_rows: src_rank", want.src_rank, got.src_rank)
        same(rank, "receive_rows: src_token", want.src_token, got.src_token)
        num_rows = len(want.src_rank)
        check_equal("num_received", rank, num_rows, num_received[rank])
        sources = layout.sources_of_rows(laid.first_rows.first_row[:, rank].contiguous(), num_rows)
        same(rank, "sources_of_rows", want.src_rank, sources)
        expected[before[want.src_rank] + want.src_token, rank] = torch.arange(num_rows)
    for source, rows in enumerate(laid.send_rows):
        same(source, "send_rows", expected[before[source] : before[source + 1]], rows)


def entries_are_local(laid: Laid) -> None:
    """A receiver sees its own experts' indices, and -1 for all other entries."""
    for rank, (want, rows) in enumerate(zip(laid.received_topk, laid.received, strict=True)):
        sent = [laid.topk_idx[s][rows.src_token[rows.src_rank == s].long()] for s in laid.ranks]
        got = layout.received_topk(torch.cat(sent), laid.case.num_experts, laid.case.num_ranks, rank)
        same(rank, "received_topk", want, got)


def expanded_rows_are_aligned(laid: Laid) -> None:
    """The expanded layout, and that its worst-case capacity holds it."""
    case, alignment = laid.case, laid.case.options.expert_alignment
    for rank, idx in enumerate(laid.received_topk):
        want = reference.expanded_rows(idx, case.num_local_experts, alignment)
        got = layout.expanded_layout(idx, case.num_local_experts, alignment, laid.num_parts)
        same(rank, "expanded rows", want.row, got.row)
        same(rank, "expanded ends", want.psum, got.end)
        starts = [0] + [reference.align_up(end, alignment) for end in want.psum.tolist()]
        check_equal("expanded begins", rank, starts[:-1], got.begin)
        check_equal("expanded total", rank, starts[-1], got.num_rows)
        repeated = (idx.sort(dim=1).values.diff(dim=1) == 0) & (idx.sort(dim=1).values[:, 1:] >= 0)
        room = layout.max_rows_expanded(
            case.num_ranks,
            max(case.num_tokens),
            case.num_topk,
            case.num_local_experts,
            alignment,
            has_duplicates=bool(repeated.any()),
        )
        if got.num_rows > room:
            raise Violation(f"rank {rank}: {got.num_rows} expanded rows; max_rows_expanded says {room}", rank)
        if len(idx) > layout.max_rows_received(case.num_ranks, max(case.num_tokens)):
            raise Violation(f"rank {rank}: {len(idx)} rows received; max_rows_received says fewer", rank)


def low_latency_rows_are_packed(laid: Laid) -> None:
    """Counts, ranges and rows of the fixed-slot output; both sides name the same row."""
    case, experts = laid.case, laid.case.num_local_experts
    room = case.num_ranks * case.num_max_tokens
    xs = [torch.empty(len(idx), 0, dtype=torch.bfloat16) for idx in laid.topk_idx]
    wanted = low_latency.dispatch(xs, laid.topk_idx, case.num_max_tokens, case.num_experts, fp8=False)
    counts = torch.stack(
        [layout.low_latency_counts(idx, case.num_experts, case.num_ranks) for idx in laid.topk_idx]
    )
    src_info = torch.full((case.num_ranks, experts * room), -1, dtype=torch.int32)
    for source, idx in enumerate(laid.topk_idx):
        rows = layout.low_latency_send_rows(idx, counts, source, case.num_max_tokens, laid.num_parts)
        same(source, "low_latency_send_rows: entries without a row", idx < 0, rows < 0)
        if rows.numel() and int(rows.max()) >= experts * room:
            raise Violation(
                f"rank {source}: low-latency row {int(rows.max())}; there are {experts * room}", source
            )
        token, k = (idx >= 0).nonzero(as_tuple=True)
        src_info[idx[token, k].long() // experts, rows[token, k]] = token.int()
    for rank, want in enumerate(wanted):
        got = layout.low_latency_ranges(counts, rank)
        same(rank, "recv_count", want.recv_count, got.recv_count)
        same(rank, "layout_range", want.layout_range, got.layout_range)
        same(rank, "recv_src_info", want.recv_src_info, src_info[rank].view(experts, room))


def two_levels_deliver_the_same(laid: Laid) -> None:
    """Each token crosses to a node at most once, and the forwarding ranks' rows are those of flat routing."""
    case, node_size = laid.case, laid.case.options.ranks_per_node
    want = reference.two_level_routes(laid.tables, node_size)
    firsts = laid.first_rows.first_row
    for source, table in enumerate(laid.tables):
        routes = layout.node_routes(table, node_size, laid.num_parts)
        same(source, "tokens that cross to a node", want.is_token_in_node[source], routes.position >= 0)
        same(source, "node_routes: num_tokens", want.is_token_in_node[source].sum(0).int(), routes.num_tokens)
        for node in range(routes.position.shape[1]):
            gateway = layout.forwarding_rank(source, node, case.num_ranks, node_size)
            held = want.gateway_rows[gateway]
            tokens = held.src_token[held.src_rank == source].long()
            crosses = want.is_token_in_node[source][:, node]
            same(source, f"tokens held by rank {gateway}", crosses.nonzero().flatten(), tokens)
            same(source, "place in line", torch.arange(len(tokens)).int(), routes.position[tokens, node])
            ranks = slice(node * node_size, min((node + 1) * node_size, case.num_ranks))
            got = layout.forwarded_rows(routes.local_ranks[tokens, node], firsts[source, ranks])
            same(source, f"rows forwarded by rank {gateway}", laid.send_rows[source][tokens, ranks], got)


def slots_do_not_overlap(laid: Laid) -> None:
    """Every word, message and row of the low-latency buffer has its own bytes, aligned and inside."""
    case = laid.case
    hidden, topk, tokens = case.hidden, case.num_topk, case.num_max_tokens
    buffer = layout.LowLatencyBuffer(case.num_ranks, tokens, hidden, topk)
    groups = -(-hidden // 128)
    message = buffer.dispatch_message_bytes()
    row = buffer.combine_message_bytes()
    if message < 8 + 8 * topk + max(2 * hidden, hidden + 4 * groups) or row < 2 * hidden + 4 * groups:
        raise Violation(
            f"messages of {message} and {row} bytes are too small for hidden {hidden}, top-{topk}"
        )
    pieces: list[tuple[int, int, int]] = []  # begin, bytes, alignment
    for epoch in range(buffer.num_epochs()):
        for source in laid.ranks:
            pieces.append((buffer.dispatch_flag(epoch, source), 8, 8))
            pieces.append((buffer.combine_flag(epoch, source), 8, 8))
            pieces += [(buffer.dispatch_slot(epoch, source, i), message, 16) for i in range(tokens)]
        for token in range(tokens):
            pieces.append((buffer.dispatch_send(epoch, token), message, 16))
            pieces += [(buffer.combine_slot(epoch, token, k), row, 16) for k in range(topk)]
    begin, size, alignment = np.array(sorted(pieces)).T
    ends = begin + size
    if begin[0] < 0 or ends[-1] > buffer.total_bytes() or (begin % alignment).any():
        raise Violation(f"pieces lie outside of [0, {buffer.total_bytes()}) or are not aligned")
    if (begin[1:] < ends[:-1]).any():
        at = int(np.argmax(begin[1:] < ends[:-1]))
        raise Violation(f"pieces overlap: [{begin[at]}, {ends[at]}) and the one at {begin[at + 1]}")


def sizes_hold_at_scale(laid: Laid) -> None:
    """No size overflows up to 2048 ranks, 2048 experts, 2^31 tokens in all; larger ones are refused."""
    rng = random.Random(laid.case.seed)
    num_ranks = min(2048, 2 ** rng.randrange(12) + rng.randrange(4))
    local = rng.randrange(1, 2048 // num_ranks + 1)
    tokens = 2**31 // num_ranks >> rng.randrange(3)
    hidden, topk = 128 * rng.randrange(1, 129), rng.randrange(1, 33)

    buffer = layout.LowLatencyBuffer(num_ranks, tokens, hidden, topk)
    message, row = buffer.dispatch_message_bytes(), buffer.combine_message_bytes()
    payload = 2 * (4 * num_ranks * 4 + (num_ranks + 1) * tokens * message + tokens * topk * row)
    if not payload <= buffer.total_bytes() <= payload + 2 * 128 * 5:
        raise Violation(f"low-latency buffer: {buffer.total_bytes()} bytes for {payload} of slots")
    ends = {
        "dispatch_send": (buffer.dispatch_send(1, tokens - 1) + message, buffer.dispatch_slot(0, 0, 0)),
        "dispatch_slot": (
            buffer.dispatch_slot(1, num_ranks - 1, tokens - 1) + message,
            buffer.combine_slot(0, 0, 0),
        ),
        "combine_slot": (buffer.combine_slot(1, tokens - 1, topk - 1) + row, buffer.total_bytes()),
    }
    for name, (end, limit) in ends.items():
        if not limit - 128 < end <= limit:
            raise Violation(f"{name}: the last slot ends at {end}, its region at {limit}")
    hint = layout.low_latency_rdma_size_hint(tokens, hidden, num_ranks, num_ranks * local, topk)
    check_equal("low_latency_rdma_size_hint", 0, buffer.total_bytes(), hint)

    arriving, scales = num_ranks * tokens, hidden // 128
    each_row = 2 * hidden + 4 + 4 * scales + topk * 12
    slot = layout.receive_slot_bytes(arriving, 2 * hidden, scales, topk)
    if not arriving * each_row <= slot <= arriving * each_row + 5 * 128:
        raise Violation(f"receive slot: {slot} bytes for {arriving} rows of {each_row}")

    alignment = 2 ** rng.randrange(8)
    for has_duplicates, each in ((True, topk), (False, min(topk, local))):
        want = reference.align_up(num_ranks * tokens * each + (alignment - 1) * local, alignment)
        got = layout.max_rows_expanded(num_ranks, tokens, topk, local, alignment, has_duplicates)
        check_equal("max_rows_expanded", 0, want, got)
    check_equal("max_rows_received", 0, num_ranks * tokens, layout.max_rows_received(num_ranks, tokens))

    sms, queue = rng.randrange(2, 133), rng.randrange(2, 2**20)
    config = Config(sms, 1, queue, 1, queue)
    channels, nodes = sms // 2, -(-num_ranks // 8)
    record = 2 * hidden + 8 + 128 * (8 + 4 + 4)
    nvl = channels * min(num_ranks, 8) * ((2 * nodes + 3) * 4 + queue * record)
    rdma = channels * nodes * ((8 * 2 + 2) * 2 * 4 + 2 * queue * (record + 16)) if num_ranks > 8 else 0
    for name, bytes_, hint in (
        ("nvl", nvl, config.get_nvl_buffer_size_hint(2 * hidden, num_ranks)),
        ("rdma", rdma, config.get_rdma_buffer_size_hint(2 * hidden, num_ranks)),
    ):
        check_equal(f"{name}_buffer_size_hint", 0, reference.align_up(bytes_, 128), hint)

    counts = [[rng.randrange(2**31) for _ in range(5)] for _ in range(5)]
    sent = layout.first_rows(torch.tensor(counts, dtype=torch.int32))
    firsts = [[sum(counts[s][r] for s in range(source)) for r in range(5)] for source in range(6)]
    check_equal("first_row", 0, firsts[:5], sent.first_row)
    check_equal("num_received", 0, firsts[5], sent.num_received)
    rows = layout.send_rows(torch.ones(2, 5, dtype=torch.bool), sent.first_row[4])
    check_equal("send_rows", 4, [firsts[4], [first + 1 for first in firsts[4]]], rows)

    half = rng.randrange(2**30)
    ranges = layout.low_latency_ranges(torch.tensor([[half], [2**30]], dtype=torch.int32).repeat(1, 2), 1)
    check_equal("layout_range", 1, [[half, half << 32 | 2**30]], ranges.layout_range)
    check_equal("recv_count", 1, [half + 2**30], ranges.recv_count)
    try:
        layout.LowLatencyBuffer(num_ranks, 2**31, 2**31, topk)
    except OverflowError:
        pass
    else:
        raise Violation("a low-latency buffer of more than 2^63 bytes was not refused")


CoreProperty = Callable[[Laid], None]

#: What a dispatch is laid out by: cheap enough for a thousand small cases a second.
ROUTING: tuple[CoreProperty, ...] = (counts_are_the_references, rows_are_in_source_order)

PROPERTIES: tuple[CoreProperty, ...] = (
    *ROUTING,
    masks_are_the_table,
    entries_are_local,
    expanded_rows_are_aligned,
    low_latency_rows_are_packed,
    two_levels_deliver_the_same,
    slots_do_not_overlap,
    sizes_hold_at_scale,
)


def check_core(case: Case, properties: Iterable[CoreProperty] = PROPERTIES) -> None:
    """Raises Violation if the core breaks one of the properties on this case."""
    laid = Laid(case)
    for holds in properties:
        holds(laid)


def same(rank: int, what: str, want: Tensor | None, got: Tensor | None) -> None:
    """Equal in presence, dtype, shape and value."""
    if want is None or got is None:
        if want is not got:
            raise Violation(f"rank {rank}: {what}: expected {want}, got {got}", rank)
        return
    if want.dtype != got.dtype:
        raise Violation(f"rank {rank}: {what}: expected {want.dtype}, got {got.dtype}", rank)
    if not torch.equal(want, got):
        check_equal(what, rank, want.numpy(), got.numpy())
