"""The low-latency kernels against the oracle, bit for bit: virtual ranks of one GPU."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.low_latency_trips import (
    FORMATS,
    LowLatencyShape,
    bits,
    check_received,
    form_of,
    prepared,
    round_trip,
    to_gpu,
)

from deepep.reference import logfmt
from deepep.reference import low_latency as oracle

pytestmark = pytest.mark.gpu

#: Of the long runs: set DEEPEP_TEST_SEED to run others.
SEED = int(os.environ.get("DEEPEP_TEST_SEED", "3"))


def domain_of(shape: LowLatencyShape, **how: Any) -> Any:
    from harness.virtual_low_latency import VirtualLowLatency

    return VirtualLowLatency(shape.ranks, form_of(shape).room, **how)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, with_weights: bool, hooked: bool) -> None:
    shape = LowLatencyShape((37, 64), hidden=1024, with_weights=with_weights, hooked=hooked, **FORMATS[form])
    domain = domain_of(shape)
    for seed in range(3):
        round_trip(domain, shape, seed)


@pytest.mark.parametrize("form", FORMATS)
def test_channels_that_are_not_finite(form: str) -> None:
    for exact in (False, True):
        shape = LowLatencyShape((37, 64), hidden=1024, nonfinite=True, exact=exact, **FORMATS[form])
        round_trip(domain_of(shape), shape, seed=2)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("exact", [False, True])
def test_numbers_of_ranks(num_ranks: int, hooked: bool, exact: bool) -> None:
    tokens = tuple(32 - 3 * r for r in range(num_ranks))
    shape = LowLatencyShape(tokens, topk=6, hooked=hooked, exact=exact)
    domain = domain_of(shape)
    for seed in range(3):
        round_trip(domain, shape, seed)


@pytest.mark.parametrize("pattern", ["uniform", "one_rank", "one_expert", "none", "holes"])
@pytest.mark.parametrize("tokens", [(0, 0), (1, 0), (0, 128), (128, 128), (5, 97)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_routings(pattern: str, tokens: tuple[int, int], index_dtype: torch.dtype) -> None:
    for exact in (False, True):
        shape = LowLatencyShape(tokens, most=128, pattern=pattern, index_dtype=index_dtype, exact=exact)
        round_trip(domain_of(shape), shape, seed=1)


@pytest.mark.parametrize("hidden", [8, 264, 1288, 2560, 7168])
@pytest.mark.parametrize("topk", [1, 8, 31, 32])
@pytest.mark.parametrize("exact", [False, True])
def test_widths(hidden: int, topk: int, exact: bool) -> None:
    shape = LowLatencyShape((24, 31), hidden=hidden, topk=topk, local_experts=20, exact=exact)
    round_trip(domain_of(shape), shape, seed=2)


@pytest.mark.parametrize("hidden", [128, 384, 640, 896, 1024, 1536, 2048, 7168])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_logfmt(hidden: int, exact: bool, hooked: bool) -> None:
    shape = LowLatencyShape((24, 31, 9), hidden=hidden, topk=8, exact=exact, hooked=hooked, logfmt=True)
    domain = domain_of(shape)
    for seed in range(2):
        round_trip(domain, shape, seed)
    round_trip(domain, replace(shape, nonfinite=True, with_weights=True, pattern="holes"), 2)


@pytest.mark.parametrize("num_ranks", [1, 5, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_logfmt_between_ranks(num_ranks: int, exact: bool) -> None:
    tokens = tuple(32 - 3 * r for r in range(num_ranks))
    shape = LowLatencyShape(tokens, hidden=1024, topk=13, exact=exact, logfmt=True)
    round_trip(domain_of(shape), shape, 1)


def test_logfmt_to_the_last_bit_of_float32() -> None:
    """A row less what it decodes to, rounded to bf16, where that travels as it is: the rest is of float32."""
    shape = LowLatencyShape((64,), hidden=1024, topk=2, local_experts=2, exact=True, logfmt=True)
    case = prepared(shape, 0)
    x, _, _ = case.inputs[0]
    idx = torch.tensor([[0, 1]]).expand(64, 2).contiguous()
    weights = torch.tensor([[1.0, -1.0]]).expand(64, 2).contiguous()
    generator = torch.Generator().manual_seed(7)
    ends = torch.exp2(torch.randint(-90, -8, (64, 1), generator=generator))
    rows = (torch.randn((2, 64, 1024), generator=generator) * ends * 0.1).to(torch.bfloat16)
    rows[1] = logfmt.logfmt_roundtrip(rows[0]).to(torch.bfloat16)
    rows[1, :, 0] = 2.0  # so it does not qualify
    layouts = oracle.dispatch([x], [idx], 64, 2, fp8=False)
    sizes = {"num_max_tokens": 64, "num_experts": 2}
    (wanted,) = oracle.combine([rows], [idx], [weights], layouts, **sizes, reduce="token", logfmt=True)
    assert 0 < wanted[:, 1:].float().abs().max() < 0.01 * ends.max()
    domain, given = domain_of(shape), [to_gpu((x, idx, weights))]
    ((plan, _),) = domain.dispatch(form_of(shape), given)
    (got,) = domain.combine([plan], [rows.cuda()], given, in_logfmt=True)
    assert torch.equal(bits(got), bits(wanted))


def test_a_decode_step_of_full_size() -> None:
    shape = LowLatencyShape(
        (128, 128), hidden=7168, topk=8, local_experts=128, pattern="distinct", fp8=True, with_weights=True
    )
    domain = domain_of(shape)
    for seed in range(2):
        round_trip(domain, shape, seed)
    round_trip(domain, replace(shape, hooked=True, with_weights=False), 3)
    round_trip(domain, replace(shape, logfmt=True), 4)
    exact = replace(shape, exact=True)
    round_trip(domain_of(exact), exact, 5)


@pytest.mark.parametrize("num_blocks", [1, 2, 16])
@pytest.mark.parametrize("exact", [False, True])
def test_any_number_of_blocks_gives_the_same_bits(num_blocks: int, exact: bool) -> None:
    shape = LowLatencyShape((50, 7, 64, 33), topk=5, with_weights=True, exact=exact)
    domain = domain_of(shape, num_blocks=num_blocks)
    for hooked in (False, True):
        round_trip(domain, replace(shape, hooked=hooked), seed=4)


@pytest.mark.parametrize("exact", [False, True])
def test_many_calls_in_a_row_of_any_shape(exact: bool) -> None:
    """Shapes, formats and halves take turns on one memory, far beyond what there are epochs of slots."""
    largest = LowLatencyShape((64, 64, 64), hidden=1024, topk=8, local_experts=8, exact=exact)
    domain = domain_of(largest)
    generator = torch.Generator().manual_seed(SEED)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    for number in range(200):
        shape = LowLatencyShape(
            tuple(pick(0, 1, 17, 64) for _ in range(3)),
            most=64,
            hidden=pick(128, 512, 1024),
            topk=pick(1, 4, 8),
            local_experts=pick(1, 5, 8),
            index_dtype=pick(torch.int32, torch.int64),
            pattern=pick("uniform", "holes", "one_rank"),
            with_weights=pick(False, True),
            hooked=pick(False, True),
            exact=exact,
            logfmt=pick(False, True),
            **FORMATS[pick("bf16", "fp8", "rounded")],
        )
        round_trip(domain, shape, number % 7)


# faults and refusals


def test_a_missing_rank_is_named_and_the_context_lives() -> None:
    shape = LowLatencyShape((16, 16, 16))
    case, form = prepared(shape, 0), form_of(shape)
    given = [to_gpu(one) for one in case.inputs]
    for hooked in (False, True):
        domain = domain_of(shape, timeout=0.3)
        domain.dispatch(form, given)
        for rank in (0, 2):
            domain.dispatch_rank(rank, form, given[rank], hooked=hooked)
        torch.cuda.synchronize()
        assert domain.faults() == [("counts", (1,)), None, ("counts", (1,))]
    round_trip(domain_of(shape), shape, 1)


def test_a_refusal_stops_the_others_at_once_and_nothing_else() -> None:
    shape = LowLatencyShape((16, 16, 16))
    case, form = prepared(shape, 0), form_of(shape)
    given = [to_gpu(one) for one in case.inputs]
    domain = domain_of(shape, timeout=60.0)
    made = domain.dispatch(form, given)
    plans, rows = [plan for plan, _ in made], [r.to("cuda") for r in case.rows]
    for combine, elsewhere in ((False, False), (True, False), (False, True), (True, True)):
        for rank in (0, 2):
            if combine:
                domain.combine_rank(rank, plans[rank], rows[rank], given[rank], hooked=elsewhere)
            else:
                domain.dispatch_rank(rank, form, given[rank], hooked=elsewhere)
        stream = domain.streams[1].cuda_stream
        domain.endpoints[1].stay_out(combine=combine, elsewhere=elsewhere, stream=stream)
        torch.cuda.synchronize()
        assert all(fault is not None and fault[0] == "disagreement" for fault in domain.faults())
        round_trip(domain, shape, 2)
    for combine in (False, True):
        for rank in range(3):
            stream = domain.streams[rank].cuda_stream
            domain.endpoints[rank].stay_out(combine=combine, elsewhere=True, stream=stream)
        torch.cuda.synchronize()
        assert domain.faults() == [None] * 3
        round_trip(domain, shape, 3)


@pytest.mark.parametrize("change", ["hidden", "num_max_tokens", "num_topk", "use_fp8", "with_weights"])
def test_ranks_that_pass_different_arguments_all_stop(change: str) -> None:
    shape = LowLatencyShape((16, 16), hidden=256, most=32)
    form = form_of(shape)
    value = {"hidden": 128, "num_max_tokens": 16, "num_topk": 3, "use_fp8": True, "with_weights": True}
    other = replace(form, **{change: value[change]})
    given = [to_gpu(one) for one in prepared(shape, 0).inputs]
    x, idx, weights = prepared(shape, 0).inputs[1]
    domain = domain_of(shape, timeout=60.0)
    domain.dispatch_rank(0, form, given[0])
    changed = (x[:, : other.hidden], idx[:, : other.num_topk], weights[:, : other.num_topk])
    domain.dispatch_rank(1, other, to_gpu(tuple(t.contiguous() for t in changed)))
    torch.cuda.synchronize()
    assert [fault and fault[0] for fault in domain.faults()] == ["disagreement"] * 2
    round_trip(domain, shape, 1)


def test_ranks_of_which_one_combines_in_logfmt_all_stop() -> None:
    shape = LowLatencyShape((16, 16))
    case, form = prepared(shape, 0), form_of(shape)
    given = [to_gpu(one) for one in case.inputs]
    domain = domain_of(shape, timeout=60.0)
    plans = [plan for plan, _ in domain.dispatch(form, given)]
    for rank in range(2):
        domain.combine_rank(rank, plans[rank], case.rows[rank].cuda(), given[rank], in_logfmt=rank == 1)
    torch.cuda.synchronize()
    assert [fault and fault[0] for fault in domain.faults()] == ["disagreement"] * 2
    round_trip(domain, shape, 1)


@pytest.mark.parametrize("exact", [False, True])
def test_other_indices_than_the_dispatchs_stop_a_combine(exact: bool) -> None:
    shape = LowLatencyShape((16, 16), exact=exact)
    case, form = prepared(shape, 0), form_of(shape)
    given = [to_gpu(one) for one in case.inputs]
    domain = domain_of(shape, timeout=60.0)
    plans = [plan for plan, _ in domain.dispatch(form, given)]
    changed = [given[0], replace(given[1], topk_idx=given[1].topk_idx.roll(1, 0))]
    domain.combine(plans, [r.to("cuda") for r in case.rows], changed)
    assert [fault and fault[0] for fault in domain.faults()] == ["disagreement"] * 2
    round_trip(domain, shape, 1)


# graphs


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("pairs", [1, 2, 3])
@pytest.mark.parametrize(("exact", "logfmt"), [(False, False), (True, False), (False, True)])
def test_graphs_of_any_number_of_operations_among_eager_calls(
    pairs: int, hooked: bool, exact: bool, logfmt: bool
) -> None:
    """A graph a rank: dispatches, each with its combine; replays with new inputs, among eager calls."""
    shape = LowLatencyShape((32, 20), topk=4, hooked=hooked, exact=exact, logfmt=logfmt)
    form, domain = form_of(shape), domain_of(shape)
    cases = [prepared(shape, seed) for seed in range(4)]
    held = [to_gpu(one) for one in cases[0].inputs]
    rows = [r.to("cuda") for r in cases[0].rows]
    round_trip(domain, shape, 0)
    graphs, made = [], []
    for rank in range(2):
        graph, results = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph, stream=domain.streams[rank], capture_error_mode="thread_local"):
            for _ in range(pairs):
                plan, out = domain.dispatch_rank(rank, form, held[rank], hooked=hooked)
                sums = domain.combine_rank(
                    rank, plan, rows[rank], held[rank], hooked=hooked, in_logfmt=logfmt
                )
                results.append((out, sums))
        graphs.append(graph)
        made.append(results)
    for turn in range(20):
        case = cases[turn % 4]
        for rank in range(2):
            for to, new in zip(vars(held[rank]).values(), case.inputs[rank], strict=True):
                to.copy_(new)
            rows[rank].copy_(case.rows[rank])
        torch.cuda.synchronize()
        for rank in range(2):
            with torch.cuda.stream(domain.streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        assert domain.faults() == [None, None]
        for rank in range(2):
            for out, sums in made[rank]:
                check_received(out, case.layouts[rank])
                assert torch.equal(bits(sums), bits(case.sums[rank]))
        if turn % 3 == 0:
            round_trip(domain, shape, turn % 4)
