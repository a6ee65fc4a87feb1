"""Dispatches that find out from top-k indices where tokens go: virtual ranks against the oracle, Buffers of
two processes against dispatches that are given their layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.device_calls import draw_on_device, same_bits
from harness.round_trips import Shape, prepared, round_trip, to_gpu

from deepep.sim import World

pytestmark = pytest.mark.gpu

SHAPES = [
    Shape((17,), pattern="holes"),
    Shape((128, 128), hidden=7168, topk=8, local_experts=128),
    Shape((4096, 1030), hidden=1024, topk=8, local_experts=128),
    Shape((33, 0), pattern="duplicates"),
    Shape((0, 0)),
    Shape((513, 512, 511), hidden=136, topk=2),
    Shape((40, 41, 42, 43), pattern="one_rank", topk=32, local_experts=9),
    Shape((40, 0, 1, 2000), pattern="holes", index_dtype=torch.int32),
    Shape((31, 64, 2, 9), pattern="none"),
    Shape((70, 1, 0, 300, 5, 64, 65, 1025), pattern="starved", topk=1, local_experts=1),
    Shape((1500, 2100), fp8=True, hidden=4224, topk=6, scale_layout="every other", index_dtype=torch.int32),
]


@pytest.fixture(params=[512, 0], ids=["alone", "together"])
def alone_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each block counts up to 512 tokens for itself; or all blocks count together, however few they are."""
    from deepep.backends.cuda import launch

    monkeypatch.setattr(launch, "ALONE_TOKENS", request.param)
    return request.param


@pytest.fixture(scope="module")
def domains() -> Any:
    from harness.virtual_ranks import VirtualDomain

    kept: dict[tuple[int, int], VirtualDomain] = {}

    def domain(ranks: int, num_sms: int = 0) -> VirtualDomain:
        if (ranks, num_sms) not in kept:
            kept[ranks, num_sms] = VirtualDomain(
                ranks, num_sms=num_sms, staging_bytes=192 << 20, heap_bytes=400 << 20
            )
        return kept[ranks, num_sms]

    return domain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(domains: Any, alone_tokens: int, shape: Shape) -> None:
    everybody = frozenset(range(shape.ranks))
    for seed, by_topk in enumerate((everybody, frozenset({shape.ranks - 1}))):
        round_trip(domains(shape.ranks), shape, seed, by_topk=by_topk)


@pytest.mark.parametrize(("ranks", "num_sms"), [(1, 1), (1, 132), (2, 1), (2, 2), (2, 24), (2, 66), (4, 3)])
def test_results_do_not_depend_on_sms(domains: Any, alone_tokens: int, ranks: int, num_sms: int) -> None:
    shape = Shape((257, 1030, 33, 1)[:ranks], topk=8, pattern="holes", local_experts=16)
    for seed, late in enumerate((None, 0, ranks - 1)):
        round_trip(domains(ranks, num_sms), shape, seed, late=late, by_topk=frozenset(range(ranks)))


def test_many_calls_in_a_row(domains: Any, alone_tokens: int) -> None:
    """Claims and totals of one call are gone in the next."""
    for seed in range(30):
        shape = Shape((seed * 37 % 700, 5 + seed, 600 - 20 * seed), hidden=128, topk=1 + seed % 8)
        round_trip(domains(3), replace(shape, local_experts=1 + seed % 5), seed, by_topk=frozenset({0, 1, 2}))


def test_nobody_waits(domains: Any, alone_tokens: int) -> None:
    """With a worst case, rows past the last carry no expert, and experts are not counted."""
    shape = Shape((300, 700), hidden=256, topk=4)
    want = prepared(shape, 0)
    arrived = domains(2).dispatch(
        [to_gpu(given) for given in want.inputs],
        capacity=1000,
        num_worst_tokens=1000,
        num_experts=8,
        post_counts=False,
        by_topk=frozenset({0, 1}),
    )
    for got, expected in zip(arrived, want.expected, strict=True):
        rows = len(expected.recv_x)
        assert same_bits(got.received.x[:rows], expected.recv_x)
        assert same_bits(got.received.topk_idx[:rows], expected.recv_topk_idx)
        assert (got.received.topk_idx[rows:1000] == -1).all()


# Buffers


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=120) as world:
        yield world


def buffer_of(ctx: Any) -> Any:
    import deepep

    if "buffer" not in ctx.scratch:
        ctx.scratch["buffer"] = deepep.Buffer(ctx.group, timeout=20.0)
    assert ctx.scratch["buffer"].runtime.info.backend == "cuda"
    return ctx.scratch["buffer"]


def compare(ctx: Any, tokens: int, hidden: int, early: bool, worst: bool) -> None:
    buffer, experts = buffer_of(ctx), 64
    given = draw_on_device(3, ctx.rank, tokens, ctx.device, hidden=hidden, num_experts=experts)
    how: dict[str, Any] = {"num_worst_tokens": 2 * tokens} if worst else {}
    if early:
        how["async_finish"] = True
    topk = {"topk_idx": given.idx, "topk_weights": given.weights}
    made = buffer.get_dispatch_layout(given.idx, experts)
    wanted = buffer.dispatch(
        given.x,
        num_tokens_per_rank=made.num_tokens_per_rank,
        is_token_in_rank=made.is_token_in_rank,
        num_tokens_per_expert=made.num_tokens_per_expert,
        **topk,
        **how,
    )
    for _ in range(3):
        got = buffer.dispatch(given.x, num_experts=experts, **topk, **how)
        if early:
            wanted.event.current_stream_wait()
            got.event.current_stream_wait()
        rows = int(got.handle[0][-1, ctx.rank])
        assert rows > 0
        assert same_bits(got.recv_x[:rows], wanted.recv_x[:rows])
        assert same_bits(got.recv_topk_idx, wanted.recv_topk_idx)
        assert same_bits(got.recv_topk_weights[:rows], wanted.recv_topk_weights[:rows])
        assert got.num_recv_tokens_per_expert_list == wanted.num_recv_tokens_per_expert_list
        assert all(same_bits(got.handle[i], wanted.handle[i]) for i in (0, 4))
        assert same_bits(got.handle[3][:rows], wanted.handle[3][:rows])  # sources: of rows that came
        again = buffer.dispatch(given.x, handle=got.handle)
        assert same_bits(again.recv_x[:rows], wanted.recv_x[:rows])
        sums = [buffer.combine(wanted.recv_x, result.handle).combined_x for result in (wanted, got)]
        assert same_bits(*sums)


@pytest.mark.parametrize("tokens", [128, 4096, 20000])  # the last with a layout kernel before
@pytest.mark.parametrize(("early", "worst"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_buffer_gives_the_same(pair: World, tokens: int, early: bool, worst: bool) -> None:
    pair.run(compare, tokens, 512, early, worst)


def replayed(ctx: Any) -> None:
    buffer, experts, tokens = buffer_of(ctx), 64, 700
    held = draw_on_device(0, ctx.rank, tokens, ctx.device, hidden=512, num_experts=experts)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        got = buffer.dispatch(
            held.x,
            topk_idx=held.idx,
            topk_weights=held.weights,
            num_experts=experts,
            num_worst_tokens=2 * tokens,
        )
        return got.recv_x, got.recv_topk_idx, buffer.combine(got.recv_x, got.handle).combined_x

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(1, 6):
        new = draw_on_device(seed, ctx.rank, tokens, ctx.device, hidden=512, num_experts=experts)
        held.x.copy_(new.x)
        held.idx.copy_(new.idx)
        held.weights.copy_(new.weights)
        wanted = [tensor.clone() for tensor in step()]
        graph.replay()
        assert same_bits(out[1], wanted[1])
        assert same_bits(out[2], wanted[2])
        rows = int((wanted[1] >= 0).any(1).sum())
        assert same_bits(out[0][:rows], wanted[0][:rows])


def test_a_graph_replays_it(pair: World) -> None:
    pair.run(replayed)
