"""Round trips of low latency on GPUs: drawn inputs, and what the oracle gives for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from deepep.reference import low_latency as oracle


@dataclass(frozen=True)
class LowLatencyShape:
    """One case: tokens per rank, and the arguments of the calls. per_domain: in two levels, P; else 0."""

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
    exact: bool = False
    logfmt: bool = False
    per_domain: int = 0

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


def prepare(shape: LowLatencyShape, seed: int, masked: tuple[int, ...] = ()) -> PreparedLowLatency:
    """Draws what all ranks draw alike. masked: ranks that are left out."""
    inputs = [draw(shape, r, seed) for r in range(shape.ranks)]
    xs, idx, weights = (list(each) for each in zip(*inputs, strict=True))
    sizes = {"num_max_tokens": shape.num_max_tokens, "num_experts": shape.num_experts, "masked": masked}
    layouts = oracle.dispatch(
        xs, idx, **sizes, fp8=shape.fp8, round_scale=shape.round_scale, ue8m0=shape.ue8m0
    )
    generator = torch.Generator().manual_seed(seed)
    size = (shape.local_experts, shape.ranks * shape.num_max_tokens, shape.hidden)
    rows = [torch.randn(size, generator=generator).to(torch.bfloat16) for _ in inputs]
    if shape.logfmt:  # below 1 where it applies: not in every chunk
        rows = [
            r * torch.exp2(torch.randint(-20, 1, size[:2], generator=generator).unsqueeze(-1)) for r in rows
        ]
        rows = [r.to(torch.bfloat16) for r in rows]
    reduce = "domain" if shape.per_domain else "token" if shape.exact else "rank"
    how = {"logfmt": shape.logfmt, "ranks_per_domain": shape.per_domain}
    sums = oracle.combine(rows, idx, weights, layouts, **sizes, reduce=reduce, **how)
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


FORMATS = {
    "bf16": {},
    "fp8": {"fp8": True},
    "rounded": {"fp8": True, "round_scale": True},
    "ue8m0": {"fp8": True, "round_scale": True, "ue8m0": True},
}


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
        entry_stretches=1 if shape.exact else 0,
        num_domains=shape.ranks // shape.per_domain if shape.per_domain else 0,
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
        sums = domain.combine(plans, rows, given, hooked=shape.hooked, in_logfmt=shape.logfmt)
        assert domain.faults() == [None] * shape.ranks
        for got, wanted in zip(sums, case.sums, strict=True):
            assert torch.equal(bits(got), bits(wanted))
