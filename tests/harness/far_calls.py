"""Low-latency calls between domains that two buffers make alike, their bits, the bytes that have to cross.

All ranks draw the inputs of all, so each knows what it sends to whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep import gate

MOST, LOCAL_EXPERTS, HIDDEN, TOPK = 24, 4, 512, 4
FORMATS: tuple[dict[str, bool], ...] = (
    {"use_fp8": False},
    {"use_fp8": True},
    {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
)


@dataclass(frozen=True)
class FarCall:
    """A dispatch and its combine. x [T, H], idx and weights [T, K] of every rank; rows [L, R*M, H] of this
    one's experts. form: of the dispatch. is_hooked: both by halves. carries_weights: with the dispatch.
    """

    rank: int
    per_domain: int
    x: list[Tensor]
    idx: list[Tensor]
    weights: list[Tensor]
    rows: Tensor
    form: dict[str, bool]
    is_hooked: bool
    carries_weights: bool

    @property
    def num_ranks(self) -> int:
        return len(self.x)

    @property
    def domains(self) -> Tensor:
        """[T, K]: the domains of this rank's entries; -1 for no expert."""
        return self.idx[self.rank].div(LOCAL_EXPERTS * self.per_domain, rounding_mode="floor")

    def bytes_to(self, peer: int) -> int:
        """Bytes that cross from this rank to one of another domain: a token's message for each rank that has
        an expert of it, a row back for each that came from there, and the words (docs/low_latency.md).
        """
        if peer // self.per_domain == self.rank // self.per_domain:
            return 0

        def tokens(source: int, target: int) -> int:
            there = (self.idx[source] >= 0) & (self.idx[source] // LOCAL_EXPERTS == target)
            return int(there.any(1).sum())

        out, back = tokens(self.rank, peer), tokens(peer, self.rank)
        words = _aligned(8 * (1 + -(-MOST // 32) + LOCAL_EXPERTS))
        channels = HIDDEN + 4 * (HIDDEN // 128) if self.form["use_fp8"] else 2 * HIDDEN
        message = _aligned(8 * TOPK) + _aligned(channels)
        digests = 16 + (0 if self.carries_weights else 4 * TOPK * out)
        return words + out * message + digests + 16 + back * 2 * HIDDEN


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def draw(seed: int, rank: int, num_ranks: int, per_domain: int) -> FarCall:
    """The call of this number. Every second one has a gate that keeps a single domain of each token."""
    num_experts, domains = LOCAL_EXPERTS * num_ranks, -(-num_ranks // per_domain)
    x, idx, weights = [], [], []
    for source in range(num_ranks):
        generator = torch.Generator().manual_seed(1000 * seed + source)
        tokens = (MOST, 0, 17, 5)[(source + seed) % 4]
        x.append(torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16))
        logits = torch.randn(tokens, num_experts, generator=generator)
        if seed % 2:
            chosen = gate.group_limited_topk(logits, TOPK, num_groups=domains, num_kept_groups=1).topk_idx
        else:
            chosen = logits.topk(TOPK).indices
            chosen[::5, 1:] = -1
        idx.append(chosen.contiguous())
        weights.append(torch.rand(tokens, TOPK, generator=generator))
    generator = torch.Generator().manual_seed(1000 * seed + 500 + rank)
    rows = torch.randn(LOCAL_EXPERTS, num_ranks * MOST, HIDDEN, generator=generator).to(torch.bfloat16)
    return FarCall(
        rank,
        per_domain,
        x,
        idx,
        weights,
        rows,
        FORMATS[seed % len(FORMATS)],
        is_hooked=seed // 2 % 2 == 1,
        carries_weights=seed // 3 % 2 == 1,
    )


@dataclass(frozen=True)
class Given:
    """A call's inputs of this rank on the device that it is made on."""

    call: FarCall
    x: Tensor
    idx: Tensor
    weights: Tensor
    rows: Tensor

    @classmethod
    def of(cls, call: FarCall, device: str) -> Given:
        mine = (call.x[call.rank], call.idx[call.rank], call.weights[call.rank], call.rows)
        return cls(call, *(one.to(device) for one in mine))


def play(buffer: Any, given: Given) -> list[Tensor]:
    """Outputs of both operations, as bytes; zeros where a row is nobody's. The host waits for nothing."""
    call = given.call
    extra = {"topk_weights": given.weights} if call.carries_weights else {}
    num_experts = LOCAL_EXPERTS * call.num_ranks
    how: dict[str, Any] = {**call.form, **extra, "return_recv_hook": call.is_hooked}
    got, count, handle, _, hook = buffer.low_latency_dispatch(given.x, given.idx, MOST, num_experts, **how)
    if call.is_hooked:
        hook()
    rows, scales = got if call.form["use_fp8"] else (got, None)
    is_row = torch.arange(rows.shape[1], device=count.device) < count[:, None]
    made = [count, handle[1], torch.where(is_row, handle[0], 0)]
    made.append(torch.where(is_row[..., None], rows.view(torch.uint8), 0))
    if scales is not None:
        made.append(torch.where(is_row[..., None], scales, 0))
    summed, _, hook = buffer.low_latency_combine(
        given.rows, given.idx, given.weights, handle, return_recv_hook=call.is_hooked
    )
    if call.is_hooked:
        hook()
    return [one.reshape(-1).view(torch.uint8) for one in (*made, summed)]
