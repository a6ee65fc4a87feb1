"""Round trips of throughput kernels on virtual ranks: drawn inputs, and what the oracle gives for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from deepep.reference import high_throughput as oracle
from deepep.reference.layout import dispatch_layout
from harness.device_calls import laid_out


@dataclass(frozen=True)
class Shape:
    """One case: tokens per rank, hidden size, top-k, experts per rank, and how indices are drawn.

    per_domain: ranks whose rows are summed and rounded by themselves; None: all.
    """

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
    per_domain: int | None = None

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
        assert arrived.counts.phase == 0, f"phase {arrived.counts.phase}"
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
    sums = oracle.combine(
        rows, tables, topk_weights=weights, biases=biases, ranks_per_domain=shape.per_domain
    )
    return Prepared(inputs, expected, rows, biases, sums, moved, expected_again)


def round_trip(  # type: ignore[no-untyped-def]
    domain, shape: Shape, seed: int, late: int | None = None, by_topk: frozenset[int] = frozenset()
) -> None:
    """Dispatch, combine with every extra, a cached dispatch of other data: all ranks against the oracle."""
    want = prepared(shape, seed)
    experts = shape.local_experts * shape.ranks
    capacity = max(1, sum(shape.tokens))
    arrived = domain.dispatch(
        [to_gpu(given) for given in want.inputs],
        capacity=capacity,
        num_experts=experts,
        late=late,
        by_topk=by_topk,
    )
    for got, expected, given in zip(arrived, want.expected, want.inputs, strict=True):
        check_received(got, expected)
        assert same_bits(got.plan.in_rank, given.is_token_in_rank)
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
