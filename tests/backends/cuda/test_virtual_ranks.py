"""The high-throughput kernels on virtual ranks of one GPU against the oracle, bit for bit."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, replace

import pytest
import torch
from harness.device_calls import laid_out

from deepep.reference import high_throughput as oracle
from deepep.reference.layout import dispatch_layout

pytestmark = pytest.mark.gpu

#: Of the long run: set DEEPEP_TEST_SEED to run others.
SEED = int(os.environ.get("DEEPEP_TEST_SEED", "11"))


@dataclass(frozen=True)
class Shape:
    """One case: tokens per rank, hidden size, top-k, experts per rank, and how indices are drawn."""

    tokens: tuple[int, ...]
    hidden: int = 256
    topk: int = 4
    local_experts: int = 4
    fp8: bool = False
    scale_dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    pattern: str = "uniform"
    scale_layout: str = "row"
    with_topk: bool = True

    @property
    def ranks(self) -> int:
        return len(self.tokens)


def draw_indices(shape: Shape, rank: int, generator: torch.Generator) -> torch.Tensor:
    """[T, K] expert indices; patterns that routing code gets wrong."""
    tokens, experts = shape.tokens[rank], shape.local_experts * shape.ranks
    idx = torch.randint(0, experts, (tokens, shape.topk), generator=generator)
    if shape.pattern == "one_rank":
        idx = idx % shape.local_experts + (shape.ranks - 1) * shape.local_experts
    elif shape.pattern == "starved":
        idx = idx % max(1, experts - shape.local_experts)
    elif shape.pattern == "none":
        idx = torch.full_like(idx, -1)
    elif shape.pattern == "holes":
        idx[torch.rand(idx.shape, generator=generator) < 0.4] = -1
        idx[::3] = -1
    elif shape.pattern == "duplicates":
        idx[:, 1:] = idx[:, :1]
    return idx.to(shape.index_dtype)


def draw_rank(shape: Shape, rank: int, seed: int) -> oracle.DispatchInput:
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    tokens, hidden = shape.tokens[rank], shape.hidden
    idx = draw_indices(shape, rank, generator)
    layout = dispatch_layout(idx, shape.local_experts * shape.ranks, shape.ranks)
    scales = None
    if shape.fp8:
        x = torch.randint(0, 256, (tokens, hidden), generator=generator, dtype=torch.uint8).view(
            torch.float8_e4m3fn
        )
        columns = max(1, hidden // 128)
        bits = torch.randint(-(2**31), 2**31 - 1, (tokens, columns), generator=generator, dtype=torch.int32)
        if shape.scale_dtype == torch.float32:
            bits = torch.rand((tokens, columns), generator=generator).view(torch.int32)
        scales = laid_out(bits, shape.scale_layout).view(shape.scale_dtype)
    else:
        x = torch.randn((tokens, hidden), generator=generator).to(torch.bfloat16)
    return oracle.DispatchInput(
        x=x,
        is_token_in_rank=layout.is_token_in_rank,
        scales=scales,
        topk_idx=idx if shape.with_topk else None,
        topk_weights=torch.rand((tokens, shape.topk), generator=generator) if shape.with_topk else None,
        num_tokens_per_expert=layout.num_tokens_per_expert,
    )


def to_gpu(given: oracle.DispatchInput):  # type: ignore[no-untyped-def]
    from harness.virtual_ranks import RankInputs

    def move(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None or t.is_contiguous():
            return None if t is None else t.to("cuda")
        # .to() keeps the strides of dense tensors alone.
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)

    return RankInputs(
        x=given.x.to("cuda"),
        is_token_in_rank=given.is_token_in_rank.to("cuda"),
        tokens_per_rank=given.is_token_in_rank.sum(0).to(torch.int32).to("cuda"),
        tokens_per_expert=move(given.num_tokens_per_expert),
        scales=move(given.scales),
        topk_idx=move(given.topk_idx),
        topk_weights=move(given.topk_weights),
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_received(arrived, expected: oracle.DispatchOutput, cached: bool = False) -> None:  # type: ignore[no-untyped-def]
    rows = expected.src_token.numel()
    got = arrived.received
    if not cached:
        assert arrived.counts.phase == 0
        assert arrived.counts.num_rows == rows
        assert arrived.counts.per_expert == expected.num_recv_tokens_per_expert
        assert same_bits(got.source[:rows], expected.src_token)
    assert same_bits(got.x[:rows], expected.recv_x[:rows])
    if expected.recv_scales is not None:
        assert same_bits(got.scales[:rows], expected.recv_scales[:rows])
    if expected.recv_topk_idx is not None and not cached:
        assert same_bits(got.topk_idx[:rows], expected.recv_topk_idx[:rows])
        assert same_bits(got.topk_weights[:rows], expected.recv_topk_weights[:rows])


@dataclass(frozen=True)
class Prepared:
    """Inputs of a round trip and what it must give, by rank; on the CPU."""

    inputs: list[oracle.DispatchInput]
    expected: list[oracle.DispatchOutput]
    rows: list[torch.Tensor]  # to return, [N, H] bf16; none for FP8
    biases: list[tuple[torch.Tensor, ...]]
    sums: list[oracle.CombineOutput]
    moved: list[oracle.DispatchInput]  # for the cached dispatch: other data
    expected_again: list[oracle.DispatchOutput]


@functools.lru_cache(maxsize=16)
def prepared(shape: Shape, seed: int) -> Prepared:
    """Kept, since the same round trip is made with many numbers of SMs. seed % 3 is the number of biases."""
    experts = shape.local_experts * shape.ranks
    inputs = [draw_rank(shape, r, seed) for r in range(shape.ranks)]
    expected = oracle.dispatch(inputs, experts)
    again = [draw_rank(shape, r, seed + 1) for r in range(shape.ranks)]
    moved = [
        oracle.DispatchInput(x=new.x, is_token_in_rank=old.is_token_in_rank, scales=new.scales)
        for new, old in zip(again, inputs, strict=True)
    ]
    expected_again = oracle.dispatch(moved, experts)
    if shape.fp8:
        return Prepared(inputs, expected, [], [], [], moved, expected_again)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(want.recv_x.shape, generator=generator).to(torch.bfloat16) for want in expected]
    biases = [
        tuple(torch.randn(given.x.shape, generator=generator).to(torch.bfloat16) for _ in range(seed % 3))
        for given in inputs
    ]
    weights = [want.recv_topk_weights for want in expected] if shape.with_topk else None
    tables = [given.is_token_in_rank for given in inputs]
    sums = oracle.combine(rows, tables, topk_weights=weights, biases=biases)
    return Prepared(inputs, expected, rows, biases, sums, moved, expected_again)


def round_trip(domain, shape: Shape, seed: int, late: int | None = None) -> None:  # type: ignore[no-untyped-def]
    """Dispatch, combine with every extra, a cached dispatch of other data: all ranks against the oracle."""
    want = prepared(shape, seed)
    experts = shape.local_experts * shape.ranks
    capacity = max(1, sum(shape.tokens))
    arrived = domain.dispatch(
        [to_gpu(given) for given in want.inputs], capacity=capacity, num_experts=experts, late=late
    )
    for got, expected in zip(arrived, want.expected, strict=True):
        check_received(got, expected)
    plans = [got.plan for got in arrived]

    if not shape.fp8:
        weights = [e.recv_topk_weights.cuda() for e in want.expected] if shape.with_topk else None
        got_rows = domain.combine(
            [r.cuda() for r in want.rows],
            plans,
            hidden=shape.hidden,
            topk_weights=weights,
            biases=[tuple(b.cuda() for b in pair) for pair in want.biases],
            late=late,
        )
        for (x, w), sums in zip(got_rows, want.sums, strict=True):
            assert same_bits(x, sums.x)
            if w is not None:
                assert same_bits(w, sums.topk_weights)

    again = domain.dispatch(
        [to_gpu(given) for given in want.moved], capacity=capacity, plans=plans, late=late
    )
    for got, expected in zip(again, want.expected_again, strict=True):
        check_received(got, expected, cached=True)
    for endpoint in domain.endpoints:
        assert endpoint.take_fault(0) is None


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
