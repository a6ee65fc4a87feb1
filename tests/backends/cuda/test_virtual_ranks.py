"""The high-throughput kernels on virtual ranks of one GPU against the oracle, bit for bit."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
from harness.round_trips import Shape, draw_indices, draw_rank, prepared, round_trip, same_bits, to_gpu

from deepep.reference import high_throughput as oracle
from deepep.reference.layout import dispatch_layout

pytestmark = pytest.mark.gpu

#: Of the long run: set DEEPEP_TEST_SEED to run others.
SEED = int(os.environ.get("DEEPEP_TEST_SEED", "11"))


SHAPES = [
    Shape((17,), pattern="holes"),
    Shape((64, 64)),
    Shape((4097, 1030), hidden=7168, topk=8, local_experts=128),
    Shape((33, 0), pattern="duplicates"),
    Shape((0, 0)),
    Shape((100, 7, 55), hidden=136, topk=2),
    Shape((40, 41, 42, 43), pattern="one_rank", topk=32, local_experts=9),
    Shape((40, 0, 1, 2000), pattern="holes", index_dtype=torch.int32),
    Shape((31, 64, 2, 9), pattern="none"),
    Shape((128,) * 8, hidden=7168, topk=8, local_experts=32),
    Shape((70, 1, 0, 300, 5, 64, 65, 1025), pattern="starved", topk=1, local_experts=1),
    Shape((128, 130), fp8=True, hidden=7168, scale_layout="column"),
    Shape((128, 130, 3), fp8=True, hidden=384, scale_dtype=torch.int32, scale_layout="column"),
    Shape((1500, 2100), fp8=True, hidden=4224, topk=6, scale_layout="every other", index_dtype=torch.int32),
    Shape((1100, 33, 0, 700), fp8=True, hidden=8960, topk=32, pattern="starved", scale_layout="padded"),
    Shape((3000, 2049), fp8=True, hidden=896, topk=1, pattern="holes"),
    Shape((50, 60), fp8=True, hidden=512, with_topk=False),
    Shape((50, 60), hidden=520, with_topk=False),
]


@pytest.fixture(scope="module")
def domains():  # type: ignore[no-untyped-def]
    """A factory that keeps one domain per (ranks, SMs)."""
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
def test_round_trip(domains, shape: Shape) -> None:  # type: ignore[no-untyped-def]
    for seed in range(3):
        round_trip(domains(shape.ranks), shape, seed)


def option_shapes(ranks: int) -> list[Shape]:
    """Every option that a kernel sees, on `ranks` ranks with different numbers of tokens."""
    tokens = (257, 130, 33, 1, 0, 70, 64, 7)[:ranks]
    fp8 = Shape(tokens, fp8=True, hidden=640)
    return [
        Shape(tokens, hidden=7168, topk=8, local_experts=32),
        Shape(tokens, hidden=136, pattern="holes", index_dtype=torch.int32),
        Shape(tokens, hidden=512, with_topk=False),
        Shape(tokens, pattern="duplicates", topk=32, local_experts=2),
        fp8,
        replace(fp8, scale_layout="column", hidden=7168, topk=8, local_experts=32),
        replace(fp8, scale_layout="padded", scale_dtype=torch.int32),
        replace(fp8, scale_layout="every other", with_topk=False),
    ]


#: As many SMs a rank as fit together on 132; 132 themselves for a rank alone.
SMS = [
    (ranks, sms)
    for ranks, most in ((1, 132), (2, 66), (3, 44), (4, 33), (8, 16))
    for sms in (1, 2, 3, 8, 24, most)
    if sms <= most
]


@pytest.mark.parametrize(("ranks", "num_sms"), SMS)
def test_results_do_not_depend_on_sms(domains, ranks: int, num_sms: int) -> None:  # type: ignore[no-untyped-def]
    domain = domains(ranks, num_sms)
    for seed, shape in enumerate(option_shapes(ranks)):  # the seed gives the number of biases, 0 to 2
        round_trip(domain, shape, seed)
    for room in (0, 5):
        worst_case(domain, Shape((50, 61, 0, 7, 1, 33, 8, 90)[:ranks], topk=3), room)


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 0), (2, 0), (2, 2), (3, 0), (4, 0), (4, 3)])
def test_small_shapes(domains, monkeypatch, ranks: int, chunks: int) -> None:  # type: ignore[no-untyped-def]
    """Every option with few tokens and few blocks: what compute-sanitizer has time for."""
    monkeypatch.setattr(domains(ranks, 4), "ce_chunks", (chunks, 70))
    for seed, shape in enumerate(option_shapes(ranks)):
        small = replace(shape, tokens=(19, 5, 0, 33)[:ranks], hidden=min(shape.hidden, 256), local_experts=4)
        round_trip(domains(ranks, 4), small, seed)


def test_random_shapes(domains) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(7)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    patterns = ["uniform", "one_rank", "starved", "none", "holes", "duplicates"]
    for case in range(120):
        ranks = (1, 2, 3, 4, 8)[pick(0, 4)]
        shape = Shape(
            tuple(pick(0, 200) * pick(0, 1) for _ in range(ranks)),
            hidden=128 * pick(1, 12),
            topk=pick(1, 16),
            local_experts=pick(1, 40),
            fp8=pick(0, 3) == 0,
            index_dtype=(torch.int32, torch.int64)[pick(0, 1)],
            pattern=patterns[pick(0, 5)],
            scale_layout=("row", "column", "padded", "every other")[pick(0, 3)],
            with_topk=bool(pick(0, 3)),
        )
        round_trip(domains(ranks), shape, case)


def test_too_many_rows_is_told_before_a_row_moves(domains) -> None:  # type: ignore[no-untyped-def]
    from deepep.backends.cuda.launch import Phase

    domain = domains(4)
    shape = Shape((50, 50, 50, 50), pattern="one_rank")
    inputs = [to_gpu(draw_rank(shape, r, 1)) for r in range(4)]
    arrived = domain.dispatch(inputs, capacity=199, num_experts=16)
    for got in arrived:
        assert got.counts.phase == Phase.TOO_MANY_ROWS
        assert got.counts.max_rows == 200
    round_trip(domain, shape, 2)


def test_a_rank_that_does_not_arrive_is_named(domains) -> None:  # type: ignore[no-untyped-def]
    from harness.virtual_ranks import VirtualDomain

    domain = VirtualDomain(4, timeout=0.5)
    shape = Shape((50, 50, 50, 50))
    inputs = [to_gpu(draw_rank(shape, r, 1)) for r in range(4)]
    domain.dispatch(inputs, capacity=200, num_experts=16, skip=frozenset({2}))
    for r in (0, 1, 3):
        fault = domain.endpoints[r].take_fault(0)
        assert fault is not None
        assert (fault.operation, fault.phase, fault.waited_on) == ("dispatch", "counts", (2,))
    assert torch.zeros(1, device="cuda").item() == 0  # the context lives


def test_masked_ranks_are_left_out(domains) -> None:  # type: ignore[no-untyped-def]
    from harness.virtual_ranks import VirtualDomain

    domain = VirtualDomain(4, timeout=2.0)
    shape = Shape((50, 51, 52, 53))
    given = [draw_rank(shape, r, 1) for r in range(4)]
    expected = oracle.dispatch(given, 16, masked={2})
    for r in (0, 1, 3):
        domain.endpoints[r].set_live(0b1011)
    arrived = domain.dispatch([to_gpu(g) for g in given], capacity=206, num_experts=16, skip=frozenset({2}))
    for got, r in zip(arrived, (0, 1, 3), strict=True):
        rows = expected[r].src_token.numel()
        assert got.counts.num_rows == rows
        assert same_bits(got.received.x[:rows], expected[r].recv_x)
        assert domain.endpoints[r].take_fault(0) is None


def worst_case(domain, shape: Shape, room: int) -> None:  # type: ignore[no-untyped-def]
    """A dispatch that does not tell its host, with room for the most rows that any rank gets, and more."""
    given = [draw_rank(shape, r, 1) for r in range(shape.ranks)]
    expected = oracle.dispatch(given, shape.local_experts * shape.ranks)
    most = max(1, *(want.src_token.numel() for want in expected)) + room
    arrived = domain.dispatch(
        [to_gpu(g) for g in given], capacity=most, num_worst_tokens=most, post_counts=False
    )
    for got, want in zip(arrived, expected, strict=True):
        rows = want.src_token.numel()
        assert same_bits(got.received.topk_idx[:rows], want.recv_topk_idx)
        assert (got.received.topk_idx[rows:] == -1).all()
        assert same_bits(got.received.x[:rows], want.recv_x)


def test_num_worst_tokens_marks_the_rest(domains) -> None:  # type: ignore[no-untyped-def]
    worst_case(domains(2), Shape((50, 60), topk=3), 190)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_layout(index_dtype: torch.dtype) -> None:
    from deepep.backends.cuda.layout import LayoutKernel

    for ranks, tokens, topk, local in [(1, 9, 1, 1), (2, 4096, 8, 128), (8, 777, 32, 7), (3, 0, 4, 2)]:
        shape = Shape(
            (tokens,) * ranks, topk=topk, local_experts=local, pattern="holes", index_dtype=index_dtype
        )
        idx = draw_indices(shape, 0, torch.Generator().manual_seed(tokens))
        for per_domain in (8, 2):
            want = dispatch_layout(idx, local * ranks, ranks, ranks_per_node=per_domain)
            kernel = LayoutKernel(ranks, torch.device("cuda", torch.cuda.current_device()))
            stream = torch.cuda.current_stream().cuda_stream
            rank_counts, domain_counts, expert_counts, in_rank = kernel.launch(
                idx.cuda(), local * ranks, per_domain, stream
            )
            assert same_bits(rank_counts, want.num_tokens_per_rank)
            assert same_bits(expert_counts, want.num_tokens_per_expert)
            assert same_bits(in_rank, want.is_token_in_rank)
            if want.num_tokens_per_node is not None:
                assert same_bits(domain_counts, want.num_tokens_per_node)


@pytest.mark.parametrize("host", [False, True], ids=["late on the device", "late on the host"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_late_in_turn(domains, monkeypatch, ranks: int, host: bool) -> None:  # type: ignore[no-untyped-def]
    """By 100 ms for every call. On the host, where one thread launches all: so are the ranks after it."""
    domain = domains(ranks)
    if host:
        monkeypatch.setattr(domain, "_hold_back", lambda rank, late: rank == late and time.sleep(0.1))
    tokens = (60, 61, 62, 63, 0, 64, 65, 1)[:ranks]
    for late in range(ranks):
        round_trip(domain, Shape(tokens, pattern="holes"), late, late=late)
        round_trip(domain, Shape(tokens, fp8=True, scale_layout="padded"), late, late=late)


def chunks_carried(domain, rank: int) -> int:  # type: ignore[no-untyped-def]
    """By the rank's copy engine, so far."""
    from deepep import _cuda

    return int(domain.endpoints[rank]._state.view(torch.int32)[_cuda.CE_COMPLETED])


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 1), (2, 4), (3, 3), (4, 2)])
def test_copy_engine_returns_the_rows(domains, monkeypatch, ranks: int, chunks: int) -> None:  # type: ignore[no-untyped-def]
    domain = domains(ranks, 8)
    monkeypatch.setattr(domain, "ce_chunks", (chunks, 100 - 10 * chunks))
    before = chunks_carried(domain, 0)
    shapes = [shape for shape in option_shapes(ranks) if not shape.fp8]
    shapes.append(Shape((4097, 1030, 0, 700)[:ranks], hidden=7168, topk=8, local_experts=64))
    for seed, shape in enumerate(shapes):
        round_trip(domain, shape, seed)
    for late in range(ranks):
        round_trip(domain, Shape((60, 61, 62, 63)[:ranks], pattern="holes"), late, late=late)
    assert chunks_carried(domain, 0) == before + chunks * (len(shapes) + ranks)
    monkeypatch.setattr(domain, "ce_chunks", (0, 100))
    round_trip(domain, shapes[0], 0)


def test_who_is_given_up_hears_that_its_staging_was_overwritten() -> None:
    """Nobody takes back what the copy engine was ordered: it writes, and says so before."""
    from harness.virtual_ranks import VirtualDomain

    from deepep.backends.cuda.launch import Phase

    domain = VirtualDomain(2, num_sms=8, timeout=0.5, ce_chunks=(3, 100))
    shape = Shape((600, 500))
    round_trip(domain, shape, 0)
    want = prepared(shape, 1)
    given = [to_gpu(g) for g in want.inputs]
    plans = [got.plan for got in domain.dispatch(given, capacity=1100, num_experts=8)]
    rows = [r.cuda() for r in want.rows]
    domain.combine(rows, plans, hidden=shape.hidden)
    domain.combine(rows, plans, hidden=shape.hidden, skip=frozenset({1}))
    fault = domain.endpoints[0].take_fault(0)
    assert fault is not None
    assert fault.waited_on == (1,)
    assert "staging" in fault.phase
    domain.combine(rows, plans, hidden=shape.hidden, skip=frozenset({0}))
    fault = domain.endpoints[1].take_fault(0)
    assert fault is not None
    assert fault.waited_on == (0,)
    assert Phase.OVERWRITTEN.name.lower() in fault.phase
    assert torch.zeros(1, device="cuda").item() == 0  # the context lives


@pytest.mark.slow
def test_ten_thousand_operations(domains) -> None:  # type: ignore[no-untyped-def]
    """Dispatch, combine, cached dispatch: 3334 times in a row, shapes at random, on the same heaps."""
    print(f"seed {SEED} (DEEPEP_TEST_SEED)")
    generator = torch.Generator().manual_seed(SEED)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for case in range(3334):
        ranks = (2, 4, 8)[case % 3]
        shape = Shape(
            tuple(pick(0, 40) * pick(0, 2) for _ in range(ranks)),
            hidden=128 * pick(1, 4),
            topk=pick(1, 8),
            local_experts=pick(1, 8),
            pattern=("uniform", "holes", "one_rank", "duplicates")[pick(0, 3)],
        )
        round_trip(domains(ranks), shape, case)
