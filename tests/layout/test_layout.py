"""deepep.layout as an interface: memory is not copied; bad arguments are named; the GIL is free."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from deepep import _core, layout

TABLE = torch.tensor([[True, False], [True, True], [False, True]])
TOPK = torch.tensor([[0, 3], [-1, 1]])
ZEROS = torch.zeros(8, dtype=torch.int32)


def test_numpy_and_torch_give_the_same() -> None:
    for dtype in (torch.int32, torch.int64):
        given = TOPK.to(dtype)
        from_torch = layout.dispatch_layout(given, 4, 2)
        from_numpy = layout.dispatch_layout(given.numpy(), 4, 2)
        assert torch.equal(from_torch.is_token_in_rank, from_numpy.is_token_in_rank)
        assert from_torch.num_tokens_per_rank.tolist() == from_numpy.num_tokens_per_rank.tolist() == [2, 1]
        assert from_torch.num_tokens_per_expert.tolist() == [1, 1, 0, 1]
        assert from_torch.num_tokens_per_node is None
    nodes = layout.dispatch_layout(TOPK, 4, 2, ranks_per_node=1).num_tokens_per_node
    assert nodes is not None
    assert nodes.tolist() == [2, 1]


def test_results_land_in_the_memory_given() -> None:
    rows = torch.full((3, 2), -7)
    _core.send_rows(TABLE.numpy(), torch.tensor([10, 20]).numpy(), 1, rows.numpy())
    assert rows.tolist() == [[10, -1], [11, 20], [-1, 21]]


@pytest.mark.parametrize("case", ["dtype", "strided", "read-only"])
def test_memory_that_cannot_be_filled_in_place_is_refused(case: str) -> None:
    rows = np.zeros((3, 4), np.int64)
    if case == "dtype":
        wrong, error = np.zeros((3, 2), np.int32), TypeError
    elif case == "strided":
        wrong, error = rows[:, ::2], TypeError
    else:
        wrong, error = np.zeros((3, 2), np.int64), ValueError
        wrong.flags.writeable = False
    with pytest.raises(error):
        _core.send_rows(TABLE.numpy(), np.array([10, 20]), 1, wrong)
    assert not rows.any()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "float topk": (
        lambda: layout.dispatch_layout(torch.zeros(2, 2), 4, 2),
        "topk_idx: got float32; allowed: int32 or int64",
    ),
    "1-d topk": (lambda: layout.dispatch_layout(TOPK[0], 4, 2), r"topk_idx: got \[2\]; allowed: 2 dim"),
    "strided": (
        lambda: layout.dispatch_layout(TOPK.T, 4, 2),
        "topk_idx: got strides .*; allowed: contiguous",
    ),
    "too large": (lambda: layout.dispatch_layout(TOPK, 2, 2), r"got 3 at \[0, 1\]; allowed: -1 or 0 .. 1"),
    "index -2": (lambda: layout.dispatch_layout(TOPK - 1, 4, 2), r"topk_idx: got -2 at \[1, 0\]"),
    "experts do not divide": (lambda: layout.dispatch_layout(TOPK, 5, 2), "num_experts: got 5"),
    "no experts": (lambda: layout.dispatch_layout(TOPK, 0, 2), "num_experts: got 0"),
    "no ranks": (lambda: layout.dispatch_layout(TOPK, 4, 0), "num_ranks: got 0; allowed: 1 or more"),
    "negative ranks": (lambda: layout.dispatch_layout(TOPK, 4, -2), "num_ranks: got -2"),
    "no ranks in a node": (lambda: layout.dispatch_layout(TOPK, 4, 2, 0), "ranks_per_node: got 0"),
    "too many for a mask": (lambda: layout.rank_masks(TOPK, 65, 65), "num_ranks: got 65"),
    "rank outside": (lambda: layout.received_topk(TOPK, 4, 2, 2), r"rank: got 2; allowed: 0 .. 1"),
    "other first rows": (lambda: layout.send_rows(TABLE, ZEROS[:3].long()), "first_row: got shape"),
    "no parts": (lambda: layout.send_rows(TABLE, ZEROS[:2].long(), 0), "num_parts: got 0"),
    "counts not square": (lambda: layout.first_rows(ZEROS[:6].view(2, 3)), "counts: got shape"),
    "other tables": (lambda: layout.receive_rows([TABLE], 0), "is_token_in_rank: got"),
    "no tables": (lambda: layout.receive_rows([], 0), "rank: got 0"),
    "alignment 0": (lambda: layout.expanded_layout(TOPK, 4, 0), "alignment: got 0"),
    "not a local expert": (lambda: layout.expanded_layout(TOPK, 3), r"recv_topk_idx: got 3 at \[0, 1\]"),
    "more tokens than M": (
        lambda: layout.low_latency_send_rows(TOPK, ZEROS.view(2, 4), 0, 1),
        "num_max_tokens: got 1; allowed: at least the 2 tokens",
    ),
    "no ranks' counts": (lambda: layout.low_latency_ranges(ZEROS[:0].view(0, 4), 0), "got no ranks"),
    "negative counts": (lambda: layout.first_rows(ZEROS[:1].view(1, 1) - 1), "counts: got -1"),
    "on another device": (lambda: layout.dispatch_layout(TOPK.to("meta"), 4, 2), "got a tensor on meta"),
    "node outside": (lambda: layout.forwarding_rank(0, 2, 4, 2), r"node: got 2; allowed: 0 .. 1"),
    "node too large": (lambda: layout.node_routes(torch.zeros(1, 65).bool(), 65), "at most 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_named(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_other_threads_run_meanwhile() -> None:
    """This thread is never kept from running for as long as another thread's layout takes."""
    topk_idx = torch.randint(0, 256, (250_000, 32), dtype=torch.int32)

    def longest_pause() -> tuple[float, float]:
        spans: list[float] = []

        def lay_out() -> None:
            began = time.perf_counter()
            layout.low_latency_counts(topk_idx, 256, 64)
            spans.append(time.perf_counter() - began)

        thread = threading.Thread(target=lay_out)
        longest, last = 0.0, time.perf_counter()
        thread.start()
        while thread.is_alive():
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        thread.join()
        return longest, spans[0]

    # Another process may hold the core for a while; with the GIL held, every attempt pauses for all of it.
    assert any(pause < span / 2 for pause, span in (longest_pause() for _ in range(3)))
