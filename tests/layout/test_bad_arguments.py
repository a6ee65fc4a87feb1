"""Odd values for every parameter of deepep.layout's functions: the library's own error, which names it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import bad_arguments as bad

from deepep import layout

R, E, K, T = 4, 8, 2, 3
IDX = torch.tensor([[0, 3], [7, -1], [2, 5]])
IN_RANK = layout.dispatch_layout(IDX, E, R).is_token_in_rank
COUNTS = torch.ones(R, R, dtype=torch.int32)
ROWS = torch.ones(R, E, dtype=torch.int32)
FIRST = torch.zeros(R, dtype=torch.int64)
OF_IDX = {"topk_idx": IDX, "num_experts": E, "num_ranks": R}

GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    layout.dispatch_layout: {**OF_IDX, "ranks_per_node": 2},
    layout.received_topk: {**OF_IDX, "rank": 1},
    layout.rank_masks: OF_IDX,
    layout.first_rows: {"counts": COUNTS},
    layout.send_rows: {"is_token_in_rank": IN_RANK, "first_row": FIRST, "num_parts": 1},
    layout.receive_rows: {"is_token_in_rank": [IN_RANK] * R, "rank": 1},
    layout.sources_of_rows: {"first_row": FIRST, "num_rows": 3},
    layout.expanded_layout: {
        "recv_topk_idx": torch.tensor([[0, -1]]),
        "num_local_experts": 2,
        "alignment": 1,
        "num_parts": 1,
    },
    layout.low_latency_counts: OF_IDX,
    layout.low_latency_ranges: {"rows_per_expert": ROWS, "rank": 1},
    layout.low_latency_send_rows: {
        "topk_idx": IDX,
        "rows_per_expert": ROWS,
        "source": 1,
        "num_max_tokens": T,
        "num_parts": 1,
    },
    layout.forwarding_rank: {"source": 1, "node": 1, "num_ranks": R, "ranks_per_node": 2},
    layout.living_gateway: {
        "source": 1,
        "node": 1,
        "ranks_per_node": 2,
        "alive": torch.ones(R, dtype=torch.bool),
    },
    layout.node_routes: {"is_token_in_rank": IN_RANK, "ranks_per_node": 2, "num_parts": 1},
    layout.forwarded_rows: {"local_ranks": torch.zeros(2, dtype=torch.int64), "first_row": FIRST},
    layout.max_rows_received: {"num_ranks": R, "num_max_tokens": T},
    layout.max_rows_expanded: {
        "num_ranks": R,
        "num_max_tokens": T,
        "num_topk": K,
        "num_local_experts": 2,
        "alignment": 1,
        "has_duplicates": True,
    },
    layout.receive_slot_bytes: {
        "num_rows": 3,
        "row_bytes": 32,
        "num_scales": 0,
        "num_topk": 0,
        "index_bytes": 8,
    },
    layout.low_latency_rdma_size_hint: {
        "num_max_tokens": T,
        "hidden": 128,
        "num_ranks": R,
        "num_experts": E,
        "num_topk": K,
    },
    layout.low_latency_nic_bytes: {
        "num_max_tokens": T,
        "hidden": 128,
        "num_ranks": R,
        "num_experts": E,
        "ranks_per_domain": 1,
        "num_topk": K,
        "returns_entries": True,
        "has_gateways": False,
    },
    layout.window_turn: {"number": 3},
    layout.windows: {"num_tokens": 100, "window": 64},
    layout.records_in_chunks: {"num_records": 40, "window": 64},
    layout.chunk_of_record: {"position": 33},
    layout.default_window: {"num_domains": 2},
    layout.peer_of_domain: {"domain": 2, "own": 1},
    layout.domain_of_peer: {"peer": 1, "own": 1},
}


def test_every_function_is_tried() -> None:
    public = {
        function
        for name, function in vars(layout).items()
        if inspect.isfunction(function) and function.__module__ == layout.__name__ and name[0] != "_"
    }
    assert public == set(GOOD)


@pytest.mark.parametrize("function", GOOD, ids=[function.__name__ for function in GOOD])
def test_odd_arguments(function: Callable[..., Any]) -> None:
    found = bad.complaints_of(function, GOOD[function])
    assert not found, "\n".join(found)
