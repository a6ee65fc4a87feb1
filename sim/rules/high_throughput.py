"""Properties of high-throughput dispatch and combine."""

from __future__ import annotations

from collections import Counter

import numpy as np

from deepep.sim.cases.case import Case
from deepep.sim.cases.values import decode_id, other_rows
from deepep.sim.rules.checking import (
    Property,
    Violation,
    always,
    arriving,
    bf16,
    check_equal,
    destinations,
    floats,
    need,
    ordered_sum,
    sent,
)
from deepep.sim.rules.observed import RankView, bits
from deepep.sim.rules.oracle import worst_tokens


def tokens_arrive_exactly_once(case: Case, views: list[RankView]) -> None:
    """Every selected (token, rank) pair arrives exactly once, and nothing else does; in whatever order."""
    for rank in case.dispatch_members:
        expected = Counter(sent(case, source).x[token].tobytes() for source, token in arriving(case, rank))
        got = Counter(row.tobytes() for row in need(views[rank].recv_x, "recv_x"))
        if expected != got:
            lost, extra = expected - got, got - expected
            raise Violation(
                f"rank {rank}: {sum(lost.values())} rows did not arrive, "
                f"{sum(extra.values())} arrived that should not",
                rank,
            )


def rows_are_in_source_order(case: Case, views: list[RankView]) -> None:
    """Row i is the i-th (source rank, source token) pair, to the bit, NaN payloads included."""
    for rank in case.dispatch_members:
        pairs = arriving(case, rank)
        got = need(views[rank].recv_x, "recv_x")
        if len(got) != len(pairs):
            raise Violation(f"rank {rank}: expected {len(pairs)} rows, got {len(got)}", rank)
        for row, (source, token) in enumerate(pairs):
            if not np.array_equal(got[row], sent(case, source).x[token]):
                seen = ""
                if case.options.values == "ids" and case.options.payload == "bf16":
                    seen = ", got token {1} of rank {0}".format(*decode_id(got[row]))
                raise Violation(
                    f"rank {rank}: row {row}: expected token {token} of rank {source}{seen}", rank, (row,)
                )
        if views[rank].src_rank is not None:
            check_equal("src_rank", rank, [source for source, _ in pairs], views[rank].src_rank)
            check_equal("src_token", rank, [token for _, token in pairs], views[rank].src_token)


def layout_counts_are_right(case: Case, views: list[RankView]) -> None:
    """Counts per rank, node and expert and token-in-rank, counted one by one."""
    per_node = case.options.ranks_per_node
    num_nodes = -(-case.num_ranks // per_node)
    for rank in case.dispatch_members:
        owners = [
            [e // case.num_local_experts for e in choices if e >= 0]
            for choices in case.topk_idx[rank].tolist()
        ]
        table = [[r in own for r in range(case.num_ranks)] for own in owners]
        view = views[rank]
        expected = np.array(table, dtype=bool).reshape(-1, case.num_ranks)
        check_equal("is_token_in_rank", rank, expected, need(view.is_token_in_rank))
        check_equal("num_tokens_per_rank", rank, expected.sum(axis=0), need(view.num_tokens_per_rank))
        entries = Counter(e for choices in case.topk_idx[rank].tolist() for e in choices)
        check_equal(
            "num_tokens_per_expert",
            rank,
            [entries[e] for e in range(case.num_experts)],
            need(view.num_tokens_per_expert),
        )
        if num_nodes == 1:
            if view.num_tokens_per_node is not None:
                raise Violation(f"rank {rank}: num_tokens_per_node: expected None for one node", rank)
        else:
            nodes = [sum(any(r // per_node == d for r in own) for own in owners) for d in range(num_nodes)]
            check_equal("num_tokens_per_node", rank, nodes, need(view.num_tokens_per_node))


def counts_agree_on_both_sides(case: Case, views: list[RankView]) -> None:
    """Receivers get what senders announce: rows, and entries per expert, rounded up."""
    local, alignment = case.num_local_experts, case.options.expert_alignment
    for rank in case.dispatch_members:
        view = views[rank]
        announced = sum(int(need(views[s].num_tokens_per_rank)[rank]) for s in case.dispatch_members)
        if announced != len(need(view.recv_x)):
            raise Violation(f"rank {rank}: senders announced {announced} rows, {len(need(view.recv_x))} came")
        expected_rows = worst_tokens(case) or announced
        if view.num_rows != expected_rows:
            raise Violation(
                f"rank {rank}: expected tensors of {expected_rows} rows, got {view.num_rows}", rank
            )
        per_expert = [need(views[s].num_tokens_per_expert) for s in case.dispatch_members]
        mine = np.stack(per_expert).astype(np.int64).sum(axis=0)[rank * local : (rank + 1) * local]
        rounded = [] if worst_tokens(case) else -(-mine // alignment) * alignment
        check_equal("expert counts", rank, rounded, need(view.expert_counts))
        if view.recv_topk_idx is not None:
            came = [(view.recv_topk_idx == expert).sum() for expert in range(local)]
            check_equal("entries received per expert", rank, mine, came)


def indices_and_weights_travel(case: Case, views: list[RankView]) -> None:
    """An entry arrives as its local index and weight where its expert lives, as -1 and +0.0 elsewhere."""
    local = case.num_local_experts
    for rank in case.dispatch_members:
        indices = need(views[rank].recv_topk_idx, "recv_topk_idx")
        weights = need(views[rank].recv_topk_weights, "recv_topk_weights")
        pairs = arriving(case, rank)
        if len(weights) != len(pairs) or len(indices) < len(pairs):
            raise Violation(f"rank {rank}: expected {len(pairs)} rows of weights, got {len(weights)}", rank)
        for row, (source, token) in enumerate(pairs):
            expert = case.topk_idx[source][token]
            here = (expert >= 0) & (expert // local == rank)
            check_equal(
                f"indices of row {row}", rank, np.where(here, expert - rank * local, -1), indices[row]
            )
            source_bits = sent(case, source).topk_weights[token]
            check_equal(f"weights of row {row}", rank, np.where(here, source_bits, 0), weights[row])
        check_equal(
            "indices past the rows", rank, np.full_like(indices[len(pairs) :], -1), indices[len(pairs) :]
        )
        expected = np.int32 if case.options.idx_dtype == "int32" else np.int64
        if indices.dtype != expected:
            raise Violation(f"rank {rank}: recv_topk_idx is {indices.dtype}, topk_idx was {expected}", rank)


def scales_travel_with_their_rows(case: Case, views: list[RankView]) -> None:
    """Row i of the scales belongs to row i of x, whatever the strides it was read with."""
    for rank in case.dispatch_members:
        got = need(views[rank].recv_scales, "recv_scales")
        for row, (source, token) in enumerate(arriving(case, rank)):
            check_equal(f"scales of row {row}", rank, need(sent(case, source).scales)[token], got[row])


def handle_equals_fresh_dispatch(case: Case, views: list[RankView]) -> None:
    """A dispatch by handle delivers the new rows where a fresh one would."""
    for rank in case.dispatch_members:
        pairs = arriving(case, rank)
        got = need(views[rank].again_x, "rows by handle")
        if len(got) != len(pairs):
            raise Violation(f"rank {rank}: by handle: expected {len(pairs)} rows, got {len(got)}", rank)
        for row, (source, token) in enumerate(pairs):
            given = sent(case, source, again=True)
            check_equal(f"row {row} by handle", rank, given.x[token], got[row])
            if given.scales is not None:
                by_handle = need(views[rank].again_scales, "scales by handle")
                check_equal(f"scales of row {row} by handle", rank, given.scales[token], by_handle[row])


def combine_returns_multiples(case: Case, views: list[RankView]) -> None:
    """Combining what was dispatched gives each token times the number of its ranks, exactly.

    Between domains it is the sum of such multiples, one for each domain, rounded.
    """
    for rank in case.members:
        x = floats(sent(case, rank).x)
        sums = np.full_like(x, -0.0)  # which adds nothing, whatever the sign of the first term
        nowhere = np.ones(len(x), dtype=bool)
        for domain in case.domains:
            counts = [len(set(destinations(case, rank, token)) & set(domain)) for token in range(len(x))]
            times = np.array(counts, dtype=np.float32)[:, None]
            sums += np.where(times > 0, floats(bf16(x * times)), np.float32(-0.0))
            nowhere &= times[:, 0] == 0
        sums[nowhere] = 0.0
        check_equal("combined x", rank, bf16(sums), need(views[rank].combined_x))


def combine_sums_in_rank_order(case: Case, views: list[RankView]) -> None:
    """Biases first, then each rank's row, ranks ascending, in float32, rounded once.

    Between domains, each domain's rows make one term: their sum, rounded.
    """
    row_of = {rank: {pair: row for row, pair in enumerate(arriving(case, rank))} for rank in case.members}
    returned = {
        rank: floats(bits(other_rows(case, rank, int(views[rank].num_rows or 0)))) for rank in case.members
    }
    if case.options.combine_rows == "same":
        returned = {rank: floats(need(views[rank].recv_x)) for rank in case.members}
    for rank in case.members:
        biases = [floats(bias) for bias in sent(case, rank).biases]
        combined = need(views[rank].combined_x)
        for token in range(case.num_tokens[rank]):
            terms = [bias[token] for bias in biases]
            going_to = destinations(case, rank, token)
            for domain in case.domains:
                rows = [returned[r][row_of[r][rank, token]] for r in going_to if r in domain]
                if case.sums_by_domain and rows:
                    rows = [floats(bf16(ordered_sum(rows, case.hidden)))]
                terms += rows
            total = bf16(ordered_sum(terms, case.hidden))
            check_equal(f"combined token {token}", rank, total, combined[token])


def weights_return_to_their_tokens(case: Case, views: list[RankView]) -> None:
    """Every entry that went to a living rank brings its weight back to (token, k); the others give +0.0."""
    for rank in case.members:
        idx = case.topk_idx[rank]
        owner = idx // case.num_local_experts
        alive = (idx >= 0) & ~np.isin(owner, case.masked)
        weights = sent(case, rank).topk_weights.view(np.float32)
        expected = np.where(alive, np.float32(0.0) + weights, np.float32(0.0))
        got = need(views[rank].combined_weights).view(np.float32)
        same = (expected.view(np.uint32) == got.view(np.uint32)) | (np.isnan(expected) & np.isnan(got))
        if expected.shape != got.shape or not same.all():
            place = tuple(int(i) for i in np.argwhere(~same)[0])
            raise Violation(
                f"rank {rank}: combined weights{list(place)}: expected {expected[place]}, got {got[place]}",
                rank,
                place,
            )


def _ht(case: Case) -> bool:
    return case.options.mode == "ht"


HIGH_THROUGHPUT = (
    Property("layout counts are right", always, layout_counts_are_right),
    Property("tokens arrive exactly once", _ht, tokens_arrive_exactly_once),
    Property("rows are in source order", _ht, rows_are_in_source_order),
    Property("counts agree on both sides", _ht, counts_agree_on_both_sides),
    Property(
        "indices and weights travel", lambda case: _ht(case) and case.options.topk, indices_and_weights_travel
    ),
    Property(
        "scales travel with their rows",
        lambda case: _ht(case) and case.options.payload != "bf16",
        scales_travel_with_their_rows,
    ),
    Property(
        "handle equals fresh dispatch",
        lambda case: _ht(case) and case.options.cached,
        handle_equals_fresh_dispatch,
    ),
    Property(
        "combine returns multiples",
        lambda case: (
            _ht(case)
            and case.options.combine_rows == "same"
            and case.options.biases == 0
            and case.options.values != "nonfinite"
        ),
        combine_returns_multiples,
    ),
    Property("combine sums in rank order", _ht, combine_sums_in_rank_order),
    Property(
        "weights return to their tokens",
        lambda case: _ht(case) and case.options.combine_weights,
        weights_return_to_their_tokens,
    ),
)
