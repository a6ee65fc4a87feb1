"""The low-latency kernels against the oracle, bit for bit: virtual ranks of one GPU, then two processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from deepep.reference import low_latency as oracle
from deepep.sim import World

pytestmark = pytest.mark.gpu

#: Of the long runs: set DEEPEP_TEST_SEED to run others.
SEED = int(os.environ.get("DEEPEP_TEST_SEED", "3"))


@dataclass(frozen=True)
class LowLatencyShape:
    """One case: tokens per rank, and the arguments of the calls."""

    tokens: tuple[int, ...]
    most: int = 0
    hidden: int = 512
    topk: int = 4
    local_experts: int = 4
    index_dtype: torch.dtype = torch.int64
    pattern: str = "uniform"
    fp8: bool = False
    round_scale: bool = False
    ue8m0: bool = False
    with_weights: bool = False
    hooked: bool = False
    nonfinite: bool = False

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def num_experts(self) -> int:
        return self.ranks * self.local_experts

    @property
    def num_max_tokens(self) -> int:
        return self.most or max(1, *self.tokens)


def draw(shape: LowLatencyShape, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx and topk_weights of a rank, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = shape.tokens[rank]
    idx = torch.randint(0, shape.num_experts, (tokens, shape.topk), generator=generator)
    if shape.pattern == "one_rank":
        idx = idx % shape.local_experts + (shape.ranks - 1) * shape.local_experts
    elif shape.pattern == "one_expert":
        idx = torch.full_like(idx, shape.num_experts - 1)
    elif shape.pattern == "none":
        idx = torch.full_like(idx, -1)
    elif shape.pattern == "holes":
        idx[torch.rand(idx.shape, generator=generator) < 0.4] = -1
        idx[::3] = -1
    elif shape.pattern == "distinct":
        idx = torch.rand((tokens, shape.num_experts), generator=generator).topk(shape.topk, dim=1).indices
    x = torch.randn((tokens, shape.hidden), generator=generator)
    x = (x * torch.exp2(torch.randint(-12, 4, x.shape, generator=generator))).to(torch.bfloat16)
    if shape.nonfinite:
        for value in (float("nan"), float("inf"), float("-inf"), 1e-40, 0.0, -0.0):
            x[torch.rand(x.shape, generator=generator) < 0.05] = value
        x[: tokens // 2, :128] = float("nan")  # a whole group
    weights = torch.rand((tokens, shape.topk), generator=generator)
    return x, idx.to(shape.index_dtype), weights


@dataclass(frozen=True)
class PreparedLowLatency:
    """Inputs of a round trip and what it must give, by rank; on the CPU."""

    inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    layouts: list[oracle.LowLatencyOutput]
    rows: list[torch.Tensor]
    sums: list[torch.Tensor]


def prepare(shape: LowLatencyShape, seed: int) -> PreparedLowLatency:
    """Draws what all ranks draw alike."""
    inputs = [draw(shape, r, seed) for r in range(shape.ranks)]
    xs, idx, weights = (list(each) for each in zip(*inputs, strict=True))
    sizes = {"num_max_tokens": shape.num_max_tokens, "num_experts": shape.num_experts}
    layouts = oracle.dispatch(
        xs, idx, **sizes, fp8=shape.fp8, round_scale=shape.round_scale, ue8m0=shape.ue8m0
    )
    generator = torch.Generator().manual_seed(seed)
    size = (shape.local_experts, shape.ranks * shape.num_max_tokens, shape.hidden)
    rows = [torch.randn(size, generator=generator).to(torch.bfloat16) for _ in inputs]
    sums = oracle.combine(rows, idx, weights, layouts, **sizes, reduce="rank")
    return PreparedLowLatency(inputs, layouts, rows, sums)


prepared = functools.lru_cache(maxsize=16)(prepare)
"""The same, kept."""


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def check_received(got: Any, wanted: oracle.LowLatencyOutput) -> None:
    """got: x, scales, count, source, ranges."""
    count = got.count.cpu()
    assert torch.equal(count, wanted.recv_count)
    assert torch.equal(got.source.cpu(), wanted.recv_src_info)
    assert torch.equal(got.ranges.cpu(), wanted.layout_range)
    x, scales = got.x.cpu(), None if got.scales is None else got.scales.cpu()
    assert (scales is None) == (wanted.recv_scales is None)
    for expert, rows in enumerate(count.tolist()):
        assert torch.equal(bits(x[expert, :rows]), bits(wanted.recv_x[expert, :rows]))
        if scales is not None:
            assert torch.equal(bits(scales[expert, :rows]), bits(wanted.recv_scales[expert, :rows]))


def form_of(shape: LowLatencyShape) -> Any:
    from deepep.backends.cuda.low_latency_launch import LowLatencyFormat

    return LowLatencyFormat(
        shape.ranks,
        shape.local_experts,
        shape.num_max_tokens,
        shape.topk,
        shape.hidden,
        shape.index_dtype,
        shape.fp8,
        shape.round_scale,
        shape.ue8m0,
        shape.with_weights,
    )


def to_gpu(given: tuple[torch.Tensor, ...]) -> Any:
    from harness.virtual_low_latency import VirtualGiven

    return VirtualGiven(*(t.to("cuda") for t in given))


def round_trip(domain: Any, shape: LowLatencyShape, seed: int) -> None:
    """A dispatch, and two combines along its handle."""
    case, form = prepared(shape, seed), form_of(shape)
    given = [to_gpu(one) for one in case.inputs]
    made = domain.dispatch(form, given, hooked=shape.hooked)
    assert domain.faults() == [None] * shape.ranks
    for (_, out), wanted in zip(made, case.layouts, strict=True):
        check_received(out, wanted)
    plans, rows = [plan for plan, _ in made], [r.to("cuda") for r in case.rows]
    for _ in range(2):
        sums = domain.combine(plans, rows, given, hooked=shape.hooked)
        assert domain.faults() == [None] * shape.ranks
        for got, wanted in zip(sums, case.sums, strict=True):
            assert torch.equal(bits(got), bits(wanted))


def domain_of(shape: LowLatencyShape, **how: Any) -> Any:
    from harness.virtual_low_latency import VirtualLowLatency

    return VirtualLowLatency(shape.ranks, form_of(shape).room, **how)


FORMATS = {
    "bf16": {},
    "fp8": {"fp8": True},
    "rounded": {"fp8": True, "round_scale": True},
    "ue8m0": {"fp8": True, "round_scale": True, "ue8m0": True},
}


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
    shape = LowLatencyShape((37, 64), hidden=1024, nonfinite=True, **FORMATS[form])
    round_trip(domain_of(shape), shape, seed=2)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_numbers_of_ranks(num_ranks: int, hooked: bool) -> None:
    shape = LowLatencyShape(tuple(32 - 3 * r for r in range(num_ranks)), topk=6, hooked=hooked)
    domain = domain_of(shape)
    for seed in range(3):
        round_trip(domain, shape, seed)


@pytest.mark.parametrize("pattern", ["uniform", "one_rank", "one_expert", "none", "holes"])
@pytest.mark.parametrize("tokens", [(0, 0), (1, 0), (0, 128), (128, 128), (5, 97)])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_routings(pattern: str, tokens: tuple[int, int], index_dtype: torch.dtype) -> None:
    shape = LowLatencyShape(tokens, most=128, pattern=pattern, index_dtype=index_dtype)
    round_trip(domain_of(shape), shape, seed=1)


@pytest.mark.parametrize("hidden", [8, 264, 1288, 2560, 7168])
@pytest.mark.parametrize("topk", [1, 8, 31, 32])
def test_widths(hidden: int, topk: int) -> None:
    shape = LowLatencyShape((24, 31), hidden=hidden, topk=topk, local_experts=20)
    round_trip(domain_of(shape), shape, seed=2)


def test_a_decode_step_of_full_size() -> None:
    shape = LowLatencyShape(
        (128, 128), hidden=7168, topk=8, local_experts=128, pattern="distinct", fp8=True, with_weights=True
    )
    domain = domain_of(shape)
    for seed in range(2):
        round_trip(domain, shape, seed)
    round_trip(domain, replace(shape, hooked=True, with_weights=False), 3)


@pytest.mark.parametrize("num_blocks", [1, 2, 16])
def test_any_number_of_blocks_gives_the_same_bits(num_blocks: int) -> None:
    shape = LowLatencyShape((50, 7, 64, 33), topk=5, with_weights=True)
    domain = domain_of(shape, num_blocks=num_blocks)
    for hooked in (False, True):
        round_trip(domain, replace(shape, hooked=hooked), seed=4)


def test_many_calls_in_a_row_of_any_shape() -> None:
    """Shapes, formats and halves take turns on one memory, far beyond what there are epochs of slots."""
    largest = LowLatencyShape((64, 64, 64), hidden=1024, topk=8, local_experts=8)
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


def test_other_indices_than_the_dispatchs_stop_a_combine() -> None:
    shape = LowLatencyShape((16, 16))
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
def test_graphs_of_any_number_of_operations_among_eager_calls(pairs: int, hooked: bool) -> None:
    """A graph a rank: dispatches, each with its combine; replays with new inputs, among eager calls."""
    shape = LowLatencyShape((32, 20), topk=4, hooked=hooked)
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
                sums = domain.combine_rank(rank, plan, rows[rank], held[rank], hooked=hooked)
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


# two processes


@pytest.fixture(scope="module")
def pair() -> Iterator[World]:
    with World(2, backend="nccl", timeout=120) as world:
        yield world


def buffer_of(ctx: Any) -> Any:
    import deepep

    if "buffer" not in ctx.scratch:
        ctx.scratch["buffer"] = deepep.Buffer(
            ctx.group, low_latency_mode=True, timeout=20.0, reduction="expert_rank"
        )
    assert ctx.scratch["buffer"].info.operations["low-latency dispatch"] == "CUDA kernels"
    return ctx.scratch["buffer"]


def through_buffer(ctx: Any, shape: LowLatencyShape, seed: int, early: str, zero_copy: bool) -> None:
    """A round trip of `Buffer` and its bits."""
    from deepep.backends.cuda.low_latency_launch import LowLatencyArrays

    buffer, case = buffer_of(ctx), prepare(shape, seed)
    x, idx, weights = (t.cuda() for t in case.inputs[ctx.rank])
    how = {"async_finish": early == "event", "return_recv_hook": early == "hook"}
    stats = torch.full((shape.local_experts,), 5, dtype=torch.int32, device="cuda")
    received, count, handle, event, hook = buffer.low_latency_dispatch(
        *(x, idx, shape.num_max_tokens, shape.num_experts, stats),
        use_fp8=shape.fp8,
        round_scale=shape.round_scale,
        use_ue8m0=shape.ue8m0,
        topk_weights=weights if shape.with_weights else None,
        **how,
    )
    if early == "event":
        event.current_stream_wait()
    if hook is not None:
        hook()
    rows, scales = received if shape.fp8 else (received, None)
    check_received(LowLatencyArrays(rows, scales, count, handle[0], handle[1]), case.layouts[ctx.rank])
    assert torch.equal(stats.cpu(), case.layouts[ctx.rank].recv_count + 5)
    outputs = case.rows[ctx.rank].cuda()
    if zero_copy:
        buffer.get_next_low_latency_combine_buffer(handle).copy_(outputs)
    out = torch.empty((len(x), shape.hidden), dtype=torch.bfloat16, device="cuda") if zero_copy else None
    sums, event, hook = buffer.low_latency_combine(
        outputs, idx, weights, tuple(handle), zero_copy=zero_copy, out=out, **how
    )
    if early == "event":
        event.current_stream_wait()
    if hook is not None:
        hook()
    assert out is None or sums is out
    assert torch.equal(bits(sums), bits(case.sums[ctx.rank]))


@pytest.mark.parametrize("early", ["sync", "event", "hook"])
@pytest.mark.parametrize("zero_copy", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_buffer(pair: World, form: str, zero_copy: bool, early: str) -> None:
    shape = LowLatencyShape(
        (64, 50), most=64, hidden=1536, topk=8, local_experts=16, pattern="distinct", **FORMATS[form]
    )
    for with_weights in (False, True):
        pair.run(through_buffer, replace(shape, with_weights=with_weights), 0, early, zero_copy)


def test_buffer_at_full_size(pair: World) -> None:
    shape = LowLatencyShape(
        (128, 100), most=128, hidden=7168, topk=8, local_experts=128, pattern="distinct", fp8=True
    )
    pair.run(through_buffer, shape, 0, "sync", False)


def test_memory_grows_with_the_shapes_of_calls_and_graphs_go_on(pair: World) -> None:
    def run(ctx: Any, through: Any, shapes: list[LowLatencyShape]) -> None:
        import deepep

        if "buffer" in ctx.scratch:
            ctx.scratch.pop("buffer").destroy()
        sizes = []
        for shape in shapes:
            through(ctx, shape, 1, "sync", False)
            memory = ctx.scratch["buffer"].info.memory
            sizes.append(memory["low-latency memory"])
            assert memory["symmetric memory"] == 0
        assert sizes[0] < sizes[1] <= sizes[2] == sizes[3]
        assert isinstance(ctx.scratch["buffer"], deepep.Buffer)

    small = LowLatencyShape((5, 8), hidden=256)
    large = LowLatencyShape((64, 60), hidden=2048, topk=8)
    pair.run(run, through_buffer, [small, large, replace(large, hidden=1024, local_experts=8), small])


def test_what_one_rank_does_wrong_all_raise(pair: World) -> None:
    """A refusal, and arguments that differ: MismatchError on both, no time-out, and the buffer goes on."""

    def run(ctx: Any, through: Any, shape: LowLatencyShape) -> None:
        import deepep

        through(ctx, shape, 0, "sync", False)
        buffer = ctx.scratch["buffer"]
        x = torch.zeros((4, shape.hidden), dtype=torch.bfloat16, device="cuda")
        idx = torch.zeros((4, shape.topk), dtype=torch.int64, device="cuda")
        most = shape.num_max_tokens

        def call(num_max_tokens: int, **how: bool) -> None:
            buffer.low_latency_dispatch(x, idx, num_max_tokens, shape.num_experts, use_fp8=False, **how)
            torch.cuda.synchronize()

        # Rank 1 has too many tokens: it raises at once, rank 0 by the next call, which both make.
        if ctx.rank == 1:
            with pytest.raises(deepep.CapacityError):
                call(2)
            call(most)
        else:
            call(most)
            with pytest.raises(deepep.MismatchError):
                call(most)
        # Rank 1 wants what ranks have not agreed on: it is told so by the kernel of rank 0.
        if ctx.rank == 1:
            with pytest.raises(deepep.MismatchError):
                call(4 * most)
            call(most)
        else:
            call(most)
            with pytest.raises(deepep.MismatchError):
                call(most)
        # Both want other new sizes: they meet, and each is told the name of what differs.
        with pytest.raises(deepep.MismatchError, match="num_max_dispatch_tokens_per_rank"):
            call((8 + ctx.rank) * most)
        through(ctx, shape, 1, "hook", False)

    pair.run(run, through_buffer, LowLatencyShape((16, 16), most=16))


def test_a_captured_decode_step(pair: World) -> None:
    """Dispatch, a stand-in for experts and combine in a graph, with hooks, replayed with new inputs."""

    def run(ctx: Any, shape: LowLatencyShape, cases: Any, buffer_of: Any) -> None:
        buffer, seeds = buffer_of(ctx), range(4)
        held = [t.cuda() for t in cases(shape, 0).inputs[ctx.rank]]

        def step(hooked: bool) -> torch.Tensor:
            rows, _, handle, _, hook = buffer.low_latency_dispatch(
                *(held[0], held[1], shape.num_max_tokens, shape.num_experts),
                use_fp8=False,
                return_recv_hook=hooked,
            )
            if hook is not None:
                hook()
            sums, _, hook = buffer.low_latency_combine(
                rows * 2, held[1], held[2], handle, return_recv_hook=hooked
            )
            if hook is not None:
                hook()
            return sums

        def take(seed: int) -> None:
            for to, new in zip(held, cases(shape, seed).inputs[ctx.rank], strict=True):
                to.copy_(new)

        wanted = []
        for seed in seeds:
            take(seed)
            wanted.append(step(False).clone())
        graphs = []
        for hooked in (False, True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = step(hooked)
            graphs.append((graph, out))
        for turn in range(200):
            take(turn % 4)
            graph, out = graphs[turn % 3 % 2]
            if turn % 5 == 4:
                assert torch.equal(bits(step(turn % 2 == 0)), bits(wanted[turn % 4]))
                continue
            graph.replay()
            assert torch.equal(bits(out), bits(wanted[turn % 4]))

    pair.run(run, LowLatencyShape((32, 30), most=32), prepare, buffer_of)
