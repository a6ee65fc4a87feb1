"""The two-level kernels on virtual ranks of one GPU against the oracle, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.round_trips import Shape, check_received, draw_rank, prepared, round_trip, same_bits, to_gpu

from deepep.reference import high_throughput as oracle

pytestmark = pytest.mark.gpu

GRIDS = [(4, 2), (8, 4), (8, 2), (6, 4), (16, 4), (3, 1)]  # ranks, ranks per domain
MANY = [(33, 8), (40, 8), (40, 4), (64, 16), (64, 8)]  # more ranks than a mask has bits
WINDOW = 32


@pytest.fixture(scope="module")
def domains() -> Any:
    """A factory that keeps one group per (ranks, ranks per domain, SMs); puts are up to 20 us late."""
    from harness.virtual_domains import VirtualDomains

    from deepep.backends.cuda.two_level import LargestCall

    kept: dict[tuple[int, int, int], VirtualDomains] = {}

    def domain(ranks: int, per_domain: int, num_sms: int = 0) -> VirtualDomains:
        key = (ranks, per_domain, num_sms)
        if key not in kept:
            largest = LargestCall(8192, row_bytes=2 * 7168, num_scales=70, num_topk=32, window=WINDOW)
            kept[key] = VirtualDomains(
                ranks, num_sms, ranks_per_domain=per_domain, largest=largest, delay=20e-6
            )
        return kept[key]

    return domain


def shapes(ranks: int, per_domain: int) -> list[Shape]:
    """Every option that a kernel sees; more tokens than two windows, fewer than one, and none."""
    tokens = ((257, 130, 33, 1, 0, 70, 64, 7) * 4)[:ranks]
    fp8 = Shape(tokens, fp8=True, hidden=640, per_domain=per_domain)
    bf16 = Shape(tokens, per_domain=per_domain)
    return [
        replace(bf16, hidden=7168, topk=8, local_experts=32),
        replace(bf16, hidden=136, pattern="holes", index_dtype=torch.int32),
        replace(bf16, hidden=512, with_topk=False),
        replace(bf16, pattern="duplicates", topk=32, local_experts=2),
        replace(bf16, pattern="one_rank"),
        replace(bf16, pattern="none"),
        replace(bf16, tokens=(0,) * ranks),
        fp8,
        replace(fp8, scale_layout="column", hidden=7168, topk=8, local_experts=32),
        replace(fp8, scale_layout="padded", scale_dtype=torch.int32),
        replace(fp8, scale_layout="every other", with_topk=False),
    ]


@pytest.mark.parametrize(("ranks", "per_domain"), GRIDS)
def test_round_trip(domains: Any, ranks: int, per_domain: int) -> None:
    for seed, shape in enumerate(shapes(ranks, per_domain)):  # the seed gives the number of biases, 0 to 2
        round_trip(domains(ranks, per_domain), shape, seed)


@pytest.mark.parametrize(("ranks", "per_domain"), MANY)
def test_more_ranks_than_a_mask_has_bits(domains: Any, ranks: int, per_domain: int) -> None:
    tokens = ((67, 33, 1, 0, 17, 50, 8, 2) * 8)[:ranks]
    bf16 = Shape(tokens, per_domain=per_domain)
    many = [
        replace(bf16, topk=8),
        replace(bf16, hidden=136, pattern="holes", index_dtype=torch.int32, local_experts=2),
        replace(bf16, hidden=7168, tokens=tuple(t // 8 for t in tokens), topk=2),
        replace(bf16, pattern="one_rank", with_topk=False),
        replace(bf16, fp8=True, hidden=640),
    ]
    for seed, shape in enumerate(many):
        round_trip(domains(ranks, per_domain), shape, seed)


@pytest.mark.parametrize("num_sms", [1, 2, 5, 24])
def test_results_do_not_depend_on_sms(domains: Any, num_sms: int) -> None:
    for seed, shape in enumerate(shapes(4, 2)):
        round_trip(domains(4, 2, num_sms), shape, seed)


def test_small_shapes(domains: Any) -> None:
    """Every option with few tokens and few blocks: what compute-sanitizer has time for."""
    for seed, shape in enumerate(shapes(4, 2)):
        small = replace(shape, tokens=(35, 5, 0, 33), hidden=min(shape.hidden, 256), local_experts=4)
        round_trip(domains(4, 2, 3), small, seed)


def test_random_shapes(domains: Any) -> None:
    generator = torch.Generator().manual_seed(7)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    patterns = ["uniform", "one_rank", "starved", "none", "holes", "duplicates"]
    for case in range(90):
        ranks, per_domain = GRIDS[pick(0, 3)]
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
            per_domain=per_domain,
        )
        round_trip(domains(ranks, per_domain), shape, case)


@pytest.mark.parametrize("room", [0, 5])
def test_num_worst_tokens_marks_the_rest(domains: Any, room: int) -> None:
    shape = Shape((50, 61, 0, 77), topk=3)
    given = [draw_rank(shape, r, 1) for r in range(4)]
    expected = oracle.dispatch(given, 16)
    most = max(want.src_token.numel() for want in expected) + room
    arrived = domains(4, 2).dispatch(
        [to_gpu(g) for g in given], capacity=most, num_worst_tokens=most, post_counts=False
    )
    for got, want in zip(arrived, expected, strict=True):
        rows = want.src_token.numel()
        assert same_bits(got.received.x[:rows], want.recv_x)
        assert same_bits(got.received.topk_idx[:rows], want.recv_topk_idx)
        assert (got.received.topk_idx[rows:] == -1).all()


def test_too_many_rows_is_told_before_a_row_moves(domains: Any) -> None:
    from deepep.backends.cuda.launch import Phase

    domain = domains(4, 2)
    shape = Shape((50, 50, 50, 50), pattern="one_rank", per_domain=2)
    arrived = domain.dispatch(
        [to_gpu(draw_rank(shape, r, 1)) for r in range(4)], capacity=199, num_experts=16
    )
    for got in arrived:
        assert got.counts.phase == Phase.TOO_MANY_ROWS
        assert got.counts.max_rows == 200
    round_trip(domain, shape, 2)


@pytest.mark.parametrize(("ranks", "per_domain", "masked"), [(6, 3, 1), (6, 3, 2), (36, 8, 34)])
def test_a_masked_gateway_has_another_in_its_place(ranks: int, per_domain: int, masked: int) -> None:
    from harness.virtual_domains import VirtualDomains

    live = [r for r in range(ranks) if r != masked]
    domain = VirtualDomains(ranks, ranks_per_domain=per_domain, live=sum(1 << r for r in live))
    shape = Shape(((50, 51, 52, 53, 0, 300) * 6)[:ranks], per_domain=per_domain)
    given = [draw_rank(shape, r, 1) for r in range(ranks)]
    expected = oracle.dispatch(given, 4 * ranks, masked={masked})
    skip = frozenset({masked})
    arrived = domain.dispatch(
        [to_gpu(g) for g in given], capacity=sum(shape.tokens), num_experts=4 * ranks, skip=skip
    )
    plans = {r: got.plan for r, got in zip(live, arrived, strict=True)}
    for got, r in zip(arrived, live, strict=True):
        check_received(got, expected[r])
    generator = torch.Generator().manual_seed(masked)
    rows = [torch.randn(want.recv_x.shape, generator=generator).to(torch.bfloat16) for want in expected]
    sums = oracle.combine(
        rows, [g.is_token_in_rank for g in given], masked={masked}, ranks_per_domain=per_domain
    )
    got_sums = domain.combine(
        [r.cuda() for r in rows],
        [plans.get(r, plans[live[0]]) for r in range(ranks)],
        hidden=shape.hidden,
        skip=skip,
    )
    for r in live:
        assert same_bits(got_sums[r][0], sums[r].x)
        assert domain.endpoints[r].take_fault(0) is None


def test_a_refusal_is_learned_by_all_ranks(domains: Any) -> None:
    """Of a dispatch and of a combine; then the group goes on."""
    from deepep.backends.cuda.launch import Phase

    domain = domains(4, 2)
    shape = Shape((50, 70, 0, 90), per_domain=2)
    want = prepared(shape, 0)
    given = [to_gpu(g) for g in want.inputs]
    domain.refusing = {1: "dispatch"}
    domain.dispatch(given, capacity=210, num_experts=16, skip=frozenset({1}))
    assert expect_faults(domain, {"dispatch"}) == {Phase.DISAGREEMENT.name.lower()}
    domain.refusing = {}
    plans = [got.plan for got in domain.dispatch(given, capacity=210, num_experts=16)]
    domain.refusing = {2: "combine"}
    domain.combine([r.cuda() for r in want.rows], plans, hidden=shape.hidden, skip=frozenset({2}))
    assert expect_faults(domain, {"combine"}) == {Phase.DISAGREEMENT.name.lower()}
    domain.refusing = {}
    round_trip(domain, shape, 1)


# Faults


def expect_faults(domain: Any, operations: set[str]) -> set[str]:
    """Phases of what ranks report; some rank does, and the context lives."""
    faults = [endpoint.take_fault(0) for endpoint in domain.endpoints]
    found = [fault for fault in faults if fault is not None]
    assert found
    assert {fault.operation for fault in found} <= operations
    assert torch.zeros(1, device="cuda").item() == 0
    return {fault.phase for fault in found}


@pytest.mark.parametrize(("ranks", "per_domain", "missing"), [(4, 2, 2), (40, 8, 35)])
def test_a_rank_that_does_not_arrive_is_waited_for_no_longer_than_the_deadline(
    ranks: int, per_domain: int, missing: int
) -> None:
    from harness.virtual_domains import VirtualDomains

    domain = VirtualDomains(ranks, ranks_per_domain=per_domain, timeout=0.5)
    shape = Shape((50,) * ranks)
    inputs = [to_gpu(draw_rank(shape, r, 1)) for r in range(ranks)]
    domain.dispatch(inputs, capacity=50 * ranks, num_experts=4 * ranks, skip=frozenset({missing}))
    for r in sorted(set(range(ranks)) - {missing}):
        fault = domain.endpoints[r].take_fault(0)
        assert fault is not None
        assert fault.operation == "dispatch"
        assert missing in fault.waited_on  # and by its neighbours what it should have relayed
    assert torch.zeros(1, device="cuda").item() == 0  # the context lives


@pytest.mark.parametrize("lost", [0, 1, 2, 5, 9, 14])
def test_a_nic_that_falls_silent_in_a_dispatch(lost: int) -> None:
    """Its counts, some of its chunks, or the credit that it grants do not come."""
    from harness.virtual_domains import VirtualDomains

    from deepep.backends.cuda.two_level import LargestCall

    largest = LargestCall(1024, row_bytes=512, num_scales=0, num_topk=4, window=WINDOW)
    domain = VirtualDomains(4, largest=largest, timeout=0.5, silent_from={1: lost})
    shape = Shape((200, 200, 200, 200))
    inputs = [to_gpu(draw_rank(shape, r, 1)) for r in range(4)]
    domain.dispatch(inputs, capacity=800, num_experts=16)
    expect_faults(domain, {"dispatch"})


@pytest.mark.parametrize("lost", [0, 1, 4, 8])
def test_a_nic_that_falls_silent_in_a_combine(lost: int) -> None:
    from harness.virtual_domains import VirtualDomains

    from deepep.backends.cuda.two_level import LargestCall

    largest = LargestCall(1024, row_bytes=512, num_scales=0, num_topk=4, window=WINDOW)
    domain = VirtualDomains(4, largest=largest, timeout=0.5)
    shape = Shape((100, 100, 100, 100), per_domain=2)
    want = prepared(shape, 0)
    arrived = domain.dispatch([to_gpu(g) for g in want.inputs], capacity=400, num_experts=16)
    orders = int(domain.domains[2]._put_state.view(torch.int32)[0])
    domain.silent_from[2] = orders + lost
    domain.combine([r.cuda() for r in want.rows], [got.plan for got in arrived], hidden=shape.hidden)
    expect_faults(domain, {"combine"})


@pytest.mark.slow
def test_ten_thousand_operations(domains: Any) -> None:
    """Dispatch, combine, cached dispatch: 3334 times in a row, shapes at random, on the same memory."""
    generator = torch.Generator().manual_seed(11)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    for case in range(3334):
        ranks, per_domain = GRIDS[case % 3]
        shape = Shape(
            tuple(pick(0, 60) * pick(0, 2) for _ in range(ranks)),
            hidden=128 * pick(1, 4),
            topk=pick(1, 8),
            local_experts=pick(1, 8),
            pattern=("uniform", "holes", "one_rank", "duplicates")[pick(0, 3)],
            per_domain=per_domain,
        )
        round_trip(domains(ranks, per_domain), shape, case)
