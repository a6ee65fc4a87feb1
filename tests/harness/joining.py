"""Members and newcomers of a Buffer: what they do on any backend, judged by the oracle."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

import deepep

TIMEOUT = 30.0
EXPERTS, TOPK, TOKENS, HIDDEN, MOST = 12, 3, 5, 128, 6


def buffer_for(ctx: Any, backend: str, **options: Any) -> Any:
    """A buffer of the group of a world's rank."""
    given = {"low_latency_mode": True, "enable_shrink": True, "timeout": TIMEOUT, **options}
    return deepep.Buffer(ctx.group, backend=backend, **given)


def rounds(buffer: Any, vacant: tuple[int, ...]) -> None:
    """Both modes, with R ranks of which some are vacant: rows, counts and sums are the oracle's."""
    from deepep.reference import low_latency

    ranks, rank, device = buffer.group_size, buffer.rank, buffer.info.device
    status = torch.zeros(ranks, dtype=torch.int32, device=device)
    buffer.low_latency_query_mask_buffer(status)
    assert tuple(status.nonzero().flatten().tolist()) == vacant == buffer.info.masked_ranks

    def made(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    scores = [torch.rand(TOKENS, EXPERTS, generator=made(r)) for r in range(ranks)]
    idx = [s.topk(TOPK, dim=1).indices for s in scores]
    xs = [torch.randn(TOKENS, HIDDEN, generator=made(20 + r)).bfloat16() for r in range(ranks)]
    weights = [torch.rand(TOKENS, TOPK, generator=made(40 + r)) for r in range(ranks)]
    x, mine, weight = xs[rank].to(device), idx[rank].to(device), weights[rank].to(device)

    sent = low_latency.dispatch(xs, idx, MOST, EXPERTS, fp8=False, masked=vacant)
    rows, count, handle, _, _ = buffer.low_latency_dispatch(x, mine, MOST, EXPERTS, use_fp8=False)
    assert torch.equal(count.cpu(), sent[rank].recv_count)
    for expert, n in enumerate(count.tolist()):
        assert torch.equal(rows[expert, :n].cpu(), sent[rank].recv_x[expert, :n])
    got, _, _ = buffer.low_latency_combine(rows, mine, weight, handle)
    wanted = low_latency.combine(
        [o.recv_x for o in sent],
        idx,
        weights,
        sent,
        num_max_tokens=MOST,
        num_experts=EXPERTS,
        reduce="rank",
        masked=vacant,
    )
    assert torch.equal(got.cpu(), wanted[rank])

    # High throughput: what goes to a vacant rank stays away, as if it were routed nowhere.
    local = EXPERTS // ranks
    kept = [torch.where(torch.isin(i // local, torch.tensor(vacant)), -1, i) for i in idx]
    comes = [x[((i // local == rank) & (i >= 0)).any(dim=1)] for x, i in zip(xs, kept, strict=True)]
    there = torch.cat([rows for r, rows in enumerate(comes) if r not in vacant])
    recv, _, _, _, handle, _ = buffer.dispatch(
        x, topk_idx=kept[rank].to(device), topk_weights=weight, num_experts=EXPERTS
    )
    assert torch.equal(recv.cpu(), there)
    back, _, _ = buffer.combine(recv, handle)
    ranks_of = [len({int(e) // local for e in token if e >= 0}) for token in kept[rank]]
    assert torch.equal(back.cpu(), xs[rank] * torch.tensor(ranks_of).unsqueeze(1))


def hand_over(ctx: Any, buffer: Any, ranks: tuple[int, ...], path: str) -> str:
    """An invitation, which the newcomers find in a file."""
    invitation: str = buffer.invite(ranks)
    if ctx.rank == 0:
        Path(path + ".new").write_text(invitation)
        os.rename(path + ".new", path)
    return invitation


def newcomer(ctx: Any, path: str, rank: int, then: Any, **options: Any) -> Any:
    """Does what a new process does: waits for its invitation, joins, and goes on."""
    while not Path(path).exists():
        time.sleep(0.01)
    buffer = deepep.Buffer.join(Path(path).read_text(), rank, timeout=TIMEOUT, **options)
    assert (buffer.rank, buffer.enable_shrink, buffer.low_latency_mode) == (rank, True, True)
    return then(buffer)
