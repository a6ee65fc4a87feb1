"""Dispatches that spread rows as they come, on virtual ranks: bits of the oracle's expanded layout."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from deepep.reference import elastic as oracle
from deepep.reference.layout import align_up

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Shape:
    """tokens: of each rank. worst: no host waits; short: expanded rows that are missing."""

    tokens: tuple[int, ...]
    hidden: int = 1024
    topk: int = 8
    local_experts: int = 8
    alignment: int = 128
    num_scales: int = 0
    num_sms: int = 0
    worst: bool = False
    short: int = 0
    has_duplicates: bool = False
    index_dtype: torch.dtype = torch.int64


SHAPES = [
    Shape((96, 96)),
    Shape((4096, 4000), hidden=7168, local_experts=128, topk=8),
    Shape((4096, 4096), hidden=3584, num_scales=56, local_experts=128),
    Shape((700, 650), hidden=256, num_sms=24, num_scales=3, index_dtype=torch.int32),
    Shape((513, 1), hidden=136, alignment=1, has_duplicates=True),
    Shape((300, 0, 200), hidden=512, worst=True),
    Shape((300, 310), hidden=512, worst=True, short=40, alignment=16),
    Shape((200, 210), hidden=512, short=1),
    Shape((128,) * 8, hidden=2048, local_experts=4, num_scales=16, worst=True),
    Shape((1000,) * 4, hidden=264, topk=3, alignment=8),
    Shape((333,), hidden=768, num_sms=20),
    Shape((0, 0)),
]


def draw(shape: Shape) -> list[oracle.ElasticInput]:
    generator = torch.Generator(device="cpu").manual_seed(11)
    experts, made = shape.local_experts * len(shape.tokens), []
    for tokens in shape.tokens:
        idx = torch.rand(tokens, experts, generator=generator, device="cpu").topk(shape.topk, 1).indices
        if shape.has_duplicates:
            idx = torch.randint(0, experts, idx.shape, generator=generator, device="cpu")
        idx = idx.masked_fill(torch.rand(idx.shape, generator=generator, device="cpu") < 0.1, -1)
        x = torch.randn(tokens, shape.hidden, generator=generator, device="cpu").bfloat16()
        scales = (
            torch.rand(tokens, shape.num_scales, generator=generator, device="cpu")
            if shape.num_scales
            else None
        )
        weights = torch.rand(idx.shape, generator=generator, device="cpu")
        made.append(oracle.ElasticInput(x, idx.to(shape.index_dtype), weights, scales))
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_spread_as_they_come(shape: Shape) -> None:
    from harness.expanded_ranks import ExpandedDomain
    from harness.virtual_ranks import VirtualDomain

    ranks, given = len(shape.tokens), draw(shape)
    experts, room = shape.local_experts * ranks, max(1, sum(shape.tokens))
    wanted = oracle.dispatch(
        given, experts, num_max_tokens=max(1, *shape.tokens), alignment=shape.alignment, expand=True
    )
    domain = VirtualDomain(ranks, num_sms=shape.num_sms, heap_bytes=(1 << 30) if ranks < 8 else 256 << 20)
    calls = ExpandedDomain(
        domain,
        given,
        experts,
        capacities=[
            align_up(room * shape.topk, shape.alignment) + (shape.alignment * shape.local_experts)
            if shape.worst and not shape.short
            else max(1, want.num_rows - shape.short)
            for want in wanted
        ],
        room=room,
        alignment=shape.alignment,
        column_major=shape.num_scales > 3,
        zero_padding=True,
        worst=room if shape.worst else 0,
    )
    for _ in range(3):
        calls.launch()
        if not shape.worst:
            assert calls.wait_counts() == [want.rank_ends[-1] for want in wanted]
        torch.cuda.synchronize()
        for endpoint in domain.endpoints:
            assert endpoint.take_fault(torch.cuda.current_stream().cuda_stream) is None
        for mine, want in zip(calls.ranks, wanted, strict=True):
            got, received = mine.expanded, want.rank_ends[-1]
            capacity = got.x.shape[0]
            assert mine.received.topk_idx is not None
            if want.num_rows > capacity and not shape.worst:  # rows stay as a dispatch leaves them
                assert bool((got.slots[:received] == -1).all())
                continue
            rows = min(want.num_rows, capacity)
            assert torch.equal(got.x[:rows].cpu().view(torch.int16), want.recv_x[:rows].view(torch.int16))
            assert want.recv_topk_weights is not None
            assert torch.equal(got.weights[:rows].cpu(), want.recv_topk_weights[:rows])
            slots = want.metadata[:, 2:].long()
            is_out = slots >= capacity
            assert torch.equal(got.slots[:received].cpu(), slots.masked_fill(is_out, -1))
            assert got.expert_counts.tolist() == want.expert_counts
            assert got.overflow is not None
            assert bool(got.overflow) == bool(is_out.any())
            if want.recv_scales is not None and got.scales is not None:
                columns = want.recv_scales.shape[1]
                if shape.num_scales > 3:
                    padded = align_up(capacity if shape.worst else want.num_rows, 4)
                    found = got.scales[: padded * columns].view(columns, padded).t()[:rows]
                else:
                    found = got.scales[: rows * columns].view(rows, columns)
                assert torch.equal(found.cpu(), want.recv_scales[:rows])
