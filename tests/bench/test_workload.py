"""Workloads: bytes by hand, routing drawn and replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepep.bench.sweep import Shape, Sweep
from deepep.bench.workload import Workload, draw
from deepep.errors import ArgumentError
from deepep.reference.layout import dispatch_layout
from deepep.trace import TraceWriter

SHAPE = Shape(tokens=9, hidden=128, topk=3, experts=8)


def workload(topk_idx: list[list[list[int]]], shape: Shape) -> Workload:
    indices = [torch.tensor(idx) for idx in topk_idx]
    layouts = [dispatch_layout(idx, shape.experts, len(indices)) for idx in indices]
    return Workload(shape, 0, indices, [torch.ones(idx.shape) for idx in indices], layouts)


def test_bytes_by_hand() -> None:
    """Two ranks, experts 0 and 1 on rank 0, 2 and 3 on rank 1. A token crosses once for both."""
    shape = Shape(tokens=3, hidden=256, topk=2, experts=4)
    load = workload([[[0, 1], [0, 2], [2, 3]], [[0, 1], [0, 3], [1, -1]]], shape)
    assert load.rows.tolist() == [[2, 2], [3, 1]]
    bf16, fp8 = 512, 256 + 2 * 4
    dispatched = load.dispatched("bf16")
    assert dispatched.pairs == ((2 * bf16, 2 * bf16), (3 * bf16, 1 * bf16))
    assert dispatched.wire == 3 * bf16  # rank 1 to rank 0
    assert dispatched.logical == 5 * bf16  # rank 0 receives two of its own besides
    assert load.dispatched("fp8").wire == 3 * fp8
    combined = load.combined()
    assert combined.pairs == ((2 * bf16, 3 * bf16), (2 * bf16, 1 * bf16))
    assert (combined.wire, combined.logical) == (3 * bf16, 5 * bf16)
    skew = load.skew
    assert (skew.receiving, skew.sending) == (5 / 4, 1)  # rank 0 gets five rows; both send four
    assert skew.expert == 4 / (11 / 4)  # expert 0 is chosen four times, of eleven over four experts
    assert (skew.crossing, skew.port) == (5 / 8, 3 / 2.5)


def test_no_rows_have_no_skew() -> None:
    skew = workload([[[-1]], [[-1]]], Shape(tokens=1, hidden=8, topk=1, experts=2)).skew
    assert (skew.receiving, skew.sending, skew.expert, skew.crossing, skew.port) == (1, 1, 1, 0, 1)


def test_the_busiest_port_may_be_a_receiver() -> None:
    """Three ranks of one expert each; ranks 1 and 2 send one token each to rank 0."""
    load = workload([[[-1]], [[0]], [[0]]], Shape(tokens=1, hidden=8, topk=1, experts=3))
    assert load.dispatched("bf16").wire == 2 * 16
    assert load.combined().wire == 2 * 16  # which sends as much when they go back


def traced(tmp_path: Path, ranks: int, lengths: list[list[int]]) -> tuple[str, list[list[torch.Tensor]]]:
    """A trace of two layers, E = 8, K = 3: (its file, the indices of layer 1 by step and rank)."""
    generator = torch.Generator().manual_seed(1)
    writer = TraceWriter(num_layers=2, num_ranks=ranks, num_experts=8, num_topk=3)
    layer_one = []
    for step, tokens in enumerate(lengths):
        for layer in range(2):
            idx = [torch.randint(-1, 8, (n, 3), generator=generator) for n in tokens]
            writer.add(step, layer, idx, [i.float() / 8 for i in idx])
        layer_one.append(idx)
    path = tmp_path / f"{ranks}.safetensors"
    writer.finish().save(path)
    return str(path), layer_one


def test_a_trace_is_replayed_in_order_and_again(tmp_path: Path) -> None:
    path, steps = traced(tmp_path, 2, [[3, 4], [2, 0]])
    load = draw(Sweep(2, (SHAPE,), routing="trace", trace=path, layer=1), SHAPE)
    for rank in range(2):
        once = torch.cat([step[rank] for step in steps])
        assert torch.equal(load.topk_idx[rank], torch.cat([once] * 3)[: SHAPE.tokens])
        assert torch.equal(load.topk_weights[rank], load.topk_idx[rank].float() / 8)
        expected = dispatch_layout(load.topk_idx[rank], 8, 2)
        assert torch.equal(load.layouts[rank].is_token_in_rank, expected.is_token_in_rank)


def test_a_trace_of_other_ranks_is_dealt_anew(tmp_path: Path) -> None:
    path, steps = traced(tmp_path, 1, [[8], [6]])
    load = draw(Sweep(2, (SHAPE,), routing="trace", trace=path, layer=1), SHAPE)
    second = torch.cat([steps[0][0][4:], steps[1][0][3:]])
    assert torch.equal(load.topk_idx[1], torch.cat([second] * 2)[: SHAPE.tokens])


@pytest.mark.parametrize(
    ("lengths", "layer", "shape", "complaint"),
    [
        ([[3, 3]], 2, SHAPE, "layer: got 2; allowed: 0 to 1"),
        ([[3, 3]], 0, Shape(9, 128, 2, 8), "topk: got 2; allowed: 3, as in the trace"),
        ([[3, 3]], 0, Shape(9, 128, 3, 16), "experts: got 16; allowed: 8, as in the trace"),
        ([[3, 0]], 0, SHAPE, "no tokens of rank 1"),
        ([], 0, SHAPE, "no tokens of rank 0"),
    ],
)
def test_a_trace_that_does_not_fit(
    tmp_path: Path, lengths: list[list[int]], layer: int, shape: Shape, complaint: str
) -> None:
    path, _ = traced(tmp_path, 2, lengths)
    with pytest.raises(ArgumentError, match=complaint):
        draw(Sweep(2, (shape,), routing="trace", trace=path, layer=layer), shape)


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_drawn_routing(routing: str) -> None:
    shape = Shape(tokens=200, hidden=128, topk=3, experts=8)
    load = draw(Sweep(2, (shape,), routing=routing), shape)
    assert [idx.shape for idx in load.topk_idx] == [(200, 3)] * 2
    assert not torch.equal(load.topk_idx[0], load.topk_idx[1])
    counts = sum(layout.num_tokens_per_expert for layout in load.layouts)
    assert counts.sum() == 2 * 200 * 3
    # 1200 draws: 150 an expert if uniform, give or take some 10; Zipf's first gets almost all 400 tokens.
    assert (counts.max() > 250) == (routing == "zipf")
    assert not (load.x(0) == 0).any()
    assert not torch.equal(load.x(0), load.x(1))
    assert torch.equal(load.x(1), draw(Sweep(2, (shape,), routing=routing), shape).x(1))
