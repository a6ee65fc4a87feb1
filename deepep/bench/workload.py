"""All ranks' routing and rows of one shape, drawn from a seed, and the bytes that sending them makes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from deepep.bench.sweep import Dtype, Shape, Sweep
from deepep.errors import ArgumentError
from deepep.formats import column_major_scales, fp8_cast
from deepep.reference.layout import DispatchLayout, dispatch_layout
from deepep.sim.cases.routing import PATTERNS, RoutingShape
from deepep.trace import RoutingTrace

Matrix = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Traffic:
    """The bytes of one operation. pairs[s][d]: from rank s to rank d, rank-local ones on the diagonal.

    They are those of rows and scales alone; what else is sent (indices, weights, counts) is overhead, and
    no bandwidth is claimed for it.
    """

    pairs: Matrix
    logical: int  # of the busiest rank, rank-local rows included: DeepEP's convention

    @property
    def wire(self) -> int:
        """Bytes through the busiest rank's port, in the busier direction."""
        ranks = range(len(self.pairs))
        sent = [sum(self.pairs[r][d] for d in ranks if d != r) for r in ranks]
        received = [sum(self.pairs[s][r] for s in ranks if s != r) for r in ranks]
        return max(sent + received)


@dataclass(frozen=True)
class Skew:
    """Imbalance of a routing; 1 is even.

    receiving, sending: rows of the busiest rank over the mean of the ranks, rank-local ones included.
    expert: top-k entries of the busiest expert over the mean of the experts. crossing: the share of rows that
    go to another rank. port: of those, what goes through the busiest port over the mean of what ranks send.
    """

    receiving: float
    sending: float
    expert: float
    crossing: float
    port: float

    def __str__(self) -> str:
        return (
            f"busiest over mean: rows received {self.receiving:.2f}, sent {self.sending:.2f}, "
            f"port {self.port:.2f}, expert {self.expert:.2f}; {self.crossing:.0%} of rows cross"
        )


@dataclass(frozen=True)
class Workload:
    """Rows and routing of every rank. Lists are indexed by rank; tensors lie on the CPU, alike everywhere."""

    shape: Shape
    seed: int
    topk_idx: list[Tensor]  # R x [T, K] int64, global expert or -1
    topk_weights: list[Tensor]  # R x [T, K] float32
    layouts: list[DispatchLayout]

    @property
    def num_ranks(self) -> int:
        return len(self.topk_idx)

    @cached_property
    def rows(self) -> Tensor:
        """[R, R] int64: rows from rank s to rank d, every token once per rank."""
        return torch.stack([layout.num_tokens_per_rank.long() for layout in self.layouts])

    @property
    def skew(self) -> Skew:
        """Measures how uneven the routing is."""
        received, sent = self.rows.sum(0).double(), self.rows.sum(1).double()
        chosen = torch.stack([layout.num_tokens_per_expert for layout in self.layouts]).sum(0).double()
        crossing = float(self.rows.sum() - self.rows.diagonal().sum())
        total = float(self.rows.sum())
        busiest = self.dispatched("bf16").wire / self.shape.row_bytes("bf16")
        return Skew(
            _over_mean(received),
            _over_mean(sent),
            _over_mean(chosen),
            crossing / total if total else 0.0,
            busiest / (crossing / self.num_ranks) if crossing else 1.0,
        )

    def dispatched(self, dtype: Dtype) -> Traffic:
        """The bytes of a dispatch."""
        pairs = self.rows * self.shape.row_bytes(dtype)
        return Traffic(_matrix(pairs), int(pairs.sum(0).max()))

    def combined(self) -> Traffic:
        """The bytes of a combine: the rows go back, in bf16."""
        pairs = self.rows * self.shape.row_bytes("bf16")
        return Traffic(_matrix(pairs.t()), int(pairs.sum(0).max()))

    def x(self, rank: int) -> Tensor:
        """[T, H] bf16: a rank's rows. No zeros, whose sign a sum that starts from zero would lose."""
        generator = torch.Generator().manual_seed(self.seed * 1009 + rank)
        tokens = len(self.topk_idx[rank])
        x = torch.randn(tokens, self.shape.hidden, generator=generator).bfloat16()
        return x.masked_fill_(x == 0, 1.0)


def fp8_rows(x: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """x [T, H] as (e4m3 [T, H], float32 [T, P]), the scales lying as the sweep says."""
    values, scale_inv = fp8_cast(x)
    return values, column_major_scales(scale_inv) if scales == "column-major" else scale_inv


def expert_stand_in(recv_x: Tensor, rank: int) -> Tensor:
    """[N, H] bf16 -> [N, H] bf16: what stands for the experts of `rank`, different on every rank."""
    return (recv_x.float() * (1 + rank / 8)).bfloat16()


def draw(sweep: Sweep, shape: Shape) -> Workload:
    """The workload of one shape, the same on every rank.

    Raises TraceError for a file that is no trace, ArgumentError for one that does not fit the sweep.
    """
    if sweep.routing == "trace":
        assert sweep.trace is not None
        batches = _from_trace(RoutingTrace.load(sweep.trace), sweep, shape)
    else:
        batches = _from_pattern(sweep, shape)
    layouts = [dispatch_layout(idx, shape.experts, sweep.num_ranks) for idx, _ in batches]
    return Workload(shape, sweep.seed, [idx for idx, _ in batches], [w for _, w in batches], layouts)


def _from_pattern(sweep: Sweep, shape: Shape) -> list[tuple[Tensor, Tensor]]:
    tokens = (shape.tokens,) * sweep.num_ranks
    routing = RoutingShape(sweep.num_ranks, shape.experts, shape.topk, tokens)
    idx = torch.from_numpy(PATTERNS[sweep.routing](routing, np.random.default_rng(sweep.seed)))
    weights = torch.rand(idx.shape, generator=torch.Generator().manual_seed(sweep.seed))
    return list(zip(idx.split(shape.tokens), weights.split(shape.tokens), strict=True))


def _from_trace(trace: RoutingTrace, sweep: Sweep, shape: Shape) -> list[tuple[Tensor, Tensor]]:
    """One layer's steps in a row, from the first again when they are through, T tokens for every rank.

    A trace of another number of ranks is dealt anew.
    """
    if not 0 <= sweep.layer < trace.num_layers:
        raise ArgumentError("layer", str(sweep.layer), f"0 to {trace.num_layers - 1}")
    for name, asked, own in (
        ("topk", shape.topk, trace.num_topk),
        ("experts", shape.experts, trace.num_experts),
    ):
        if asked != own:
            raise ArgumentError(name, str(asked), f"{own}, as in the trace")
    steps = [trace.batch(step, sweep.layer) for step in range(trace.num_steps)]
    if trace.num_ranks != sweep.num_ranks:
        steps = [batch.reshard(sweep.num_ranks) for batch in steps]
    drawn = []
    for rank in range(sweep.num_ranks):
        if not any(len(batch.topk_idx[rank]) for batch in steps):
            raise ArgumentError("trace", f"no tokens of rank {rank} in layer {sweep.layer}", "some")
        idx = torch.cat([batch.topk_idx[rank] for batch in steps])
        weights = torch.cat([batch.topk_weights[rank] for batch in steps])
        again = torch.arange(shape.tokens) % len(idx)
        drawn.append((idx[again], weights[again]))
    return drawn


def _over_mean(values: Tensor) -> float:
    mean = float(values.mean())
    return float(values.max()) / mean if mean else 1.0


def _matrix(table: Tensor) -> Matrix:
    return tuple(tuple(row) for row in table.tolist())
