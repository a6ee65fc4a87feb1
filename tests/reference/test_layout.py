"""The layout rules against counting by hand: plain Python over single entries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepep.reference.layout import (
    align_up,
    dispatch_layout,
    expanded_rows,
    local_experts,
    receive_rows,
    two_level_routes,
)


@st.composite
def topk_tables(draw: st.DrawFn, num_ranks: int | None = None) -> tuple[int, int, list[list[list[int]]]]:
    """R, E and by rank T rows of K entries: any indices, duplicates and -1 included."""
    ranks = num_ranks or draw(st.integers(1, 9))
    num_experts = ranks * draw(st.integers(1, 3))
    num_topk = draw(st.integers(1, 5))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=num_topk, max_size=num_topk)
    return ranks, num_experts, [draw(st.lists(row, max_size=5)) for _ in range(ranks)]


def tensor(rows: list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(rows, dtype=dtype) if rows else torch.zeros(0, 3, dtype=dtype)


@settings(max_examples=150, deadline=None)
@given(topk_tables(), st.integers(1, 8), st.sampled_from([torch.int32, torch.int64]))
def test_dispatch_layout_counts(
    case: tuple[int, int, list[list[list[int]]]], ranks_per_node: int, dtype: torch.dtype
) -> None:
    num_ranks, num_experts, tables = case
    rows = tables[0]
    layout = dispatch_layout(tensor(rows, dtype), num_experts, num_ranks, ranks_per_node)
    ranks_of = [{e * num_ranks // num_experts for e in row if e >= 0} for row in rows]
    assert layout.is_token_in_rank.tolist() == [[r in ranks for r in range(num_ranks)] for ranks in ranks_of]
    assert layout.num_tokens_per_rank.tolist() == [sum(r in s for s in ranks_of) for r in range(num_ranks)]
    assert layout.num_tokens_per_expert.tolist() == [
        sum(row.count(e) for row in rows) for e in range(num_experts)
    ]
    if num_ranks <= ranks_per_node:
        assert layout.num_tokens_per_node is None
    else:
        nodes_of = [{r // ranks_per_node for r in ranks} for ranks in ranks_of]
        num_nodes = (num_ranks + ranks_per_node - 1) // ranks_per_node
        assert layout.num_tokens_per_node is not None
        assert layout.num_tokens_per_node.tolist() == [
            sum(n in s for s in nodes_of) for n in range(num_nodes)
        ]
        assert layout.num_tokens_per_node.dtype == torch.int32
    assert layout.num_tokens_per_rank.dtype == layout.num_tokens_per_expert.dtype == torch.int32
    assert layout.is_token_in_rank.dtype == torch.bool


def test_dispatch_layout_by_hand() -> None:
    # 4 ranks of 2 experts, 2 ranks to a node. Token 0: experts 1 and 0 (rank 0), 7 (rank 3). Token 1: none.
    # Token 2: expert 2 twice (rank 1).
    topk_idx = torch.tensor([[1, 0, 7], [-1, -1, -1], [2, -1, 2]])
    layout = dispatch_layout(topk_idx, num_experts=8, num_ranks=4, ranks_per_node=2)
    assert layout.num_tokens_per_rank.tolist() == [1, 1, 0, 1]
    assert layout.num_tokens_per_node is not None
    assert layout.num_tokens_per_node.tolist() == [2, 1]
    assert layout.num_tokens_per_expert.tolist() == [1, 1, 2, 0, 0, 0, 0, 1]
    assert layout.is_token_in_rank.int().tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]


@settings(max_examples=100, deadline=None)
@given(topk_tables(), st.data())
def test_receive_rows_come_by_source_rank_then_token(
    case: tuple[int, int, list[list[list[int]]]], data: st.DataObject
) -> None:
    num_ranks, num_experts, tables = case
    masked = data.draw(st.sets(st.integers(0, num_ranks - 1), max_size=num_ranks - 1))
    in_rank = [dispatch_layout(tensor(t), num_experts, num_ranks).is_token_in_rank for t in tables]
    for rank in range(num_ranks):
        rows = receive_rows(in_rank, rank, masked)
        pairs = [
            (source, token)
            for source, table in enumerate(in_rank)
            for token, ranks in enumerate(table.tolist())
            if ranks[rank] and source not in masked and rank not in masked
        ]
        assert list(zip(rows.src_rank.tolist(), rows.src_token.tolist(), strict=True)) == pairs
        assert rows.src_rank.dtype == rows.src_token.dtype == torch.int32


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 8), st.sampled_from([1, 2, 7, 128]), st.data())
def test_expanded_rows(
    num_local: int, num_topk: int, num_rows: int, alignment: int, data: st.DataObject
) -> None:
    entry = st.integers(-1, num_local - 1)
    flat = data.draw(st.lists(entry, min_size=num_rows * num_topk, max_size=num_rows * num_topk))
    table = torch.tensor(flat, dtype=torch.int32).view(num_rows, num_topk)
    row, psum = expanded_rows(table, num_local, alignment)
    want, ends, next_row = [-1] * len(flat), [], 0
    for expert in range(num_local):
        while next_row % alignment:
            next_row += 1
        for entry_index, chosen in enumerate(flat):
            if chosen == expert:
                want[entry_index] = next_row
                next_row += 1
        ends.append(next_row)
    assert row.flatten().tolist() == want
    assert psum.tolist() == ends


@settings(max_examples=100, deadline=None)
@given(topk_tables(), st.integers(1, 5))
def test_two_levels_deliver_what_one_does(
    case: tuple[int, int, list[list[list[int]]]], ranks_per_node: int
) -> None:
    num_ranks, num_experts, tables = case
    in_rank = [dispatch_layout(tensor(t), num_experts, num_ranks).is_token_in_rank for t in tables]
    routes = two_level_routes(in_rank, ranks_per_node)
    crossings = set()
    for gateway, held in enumerate(routes.gateway_rows):
        pairs = list(zip(held.src_rank.tolist(), held.src_token.tolist(), strict=True))
        assert pairs == sorted(pairs)
        for source, token in pairs:
            crossing = (source, token, gateway // ranks_per_node)
            assert crossing not in crossings, "a token goes to a node once"
            crossings.add(crossing)
            if gateway // ranks_per_node == source // ranks_per_node:
                assert gateway == source, "on its own node a token stays where it is"
    wanted = {
        (source, token, rank // ranks_per_node)
        for source, table in enumerate(in_rank)
        for token, rank in table.nonzero().tolist()
    }
    assert crossings == wanted, "and only to nodes that want it"
    for rank, (gateway, gateway_row) in enumerate(routes.final_rows):
        assert all(g // ranks_per_node == rank // ranks_per_node for g in gateway.tolist())
        flat = receive_rows(in_rank, rank)
        picked = [
            (int(routes.gateway_rows[g].src_rank[i]), int(routes.gateway_rows[g].src_token[i]))
            for g, i in zip(gateway.tolist(), gateway_row.tolist(), strict=True)
        ]
        assert picked == list(zip(flat.src_rank.tolist(), flat.src_token.tolist(), strict=True))


def test_align_up() -> None:
    assert [align_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dispatch_layout(torch.zeros(3, dtype=torch.int64), 4, 2), "topk_idx"),
        (lambda: dispatch_layout(torch.zeros(3, 2), 4, 2), "topk_idx.*float32"),
        (lambda: dispatch_layout(torch.full((3, 2), 4), 4, 2), "topk_idx"),
        (lambda: dispatch_layout(torch.full((3, 2), -2), 4, 2), "topk_idx"),
        (lambda: dispatch_layout(torch.zeros(3, 2, dtype=torch.int64), 5, 2), "num_experts: got 5"),
        (lambda: dispatch_layout(torch.zeros(3, 2, dtype=torch.int64), 4, 2, 0), "ranks_per_node"),
        (lambda: local_experts(0, 2), "num_experts"),
        (lambda: receive_rows([torch.zeros(3, 2, dtype=torch.bool)], 0), r"rank 0.*\[3, 2\].*\[T, 1\]"),
        (lambda: receive_rows([torch.zeros(3, 1, dtype=torch.int32)], 0), "is_token_in_rank"),
        (lambda: receive_rows([], 0), "is_token_in_rank"),
        (lambda: receive_rows([torch.zeros(3, 1, dtype=torch.bool)], -1), "rank: got -1"),
        (lambda: expanded_rows(torch.zeros(3, 2, dtype=torch.int64), 1, 0), "alignment"),
        (lambda: expanded_rows(torch.ones(3, 2, dtype=torch.int64), 1), "topk_idx"),
        (lambda: two_level_routes([torch.zeros(3, 1, dtype=torch.bool)], 0), "ranks_per_node"),
    ],
)
def test_refuses(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
