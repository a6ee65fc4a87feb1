"""Sessions: what the users of one group share, and what they do not."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deepep
from deepep.runtime import session
from deepep.runtime.control.transport import gather_bytes, private_group
from deepep.runtime.session import Session

CPU = torch.device("cpu")


def group_of_one() -> dist.ProcessGroup:
    return private_group(dist.HashStore(), 0, 1, 30.0, "cpu")


def test_a_group_has_one_session_as_long_as_somebody_uses_it() -> None:
    group, other = group_of_one(), group_of_one()
    first = Session.of(group, CPU)
    assert Session.of(group, CPU) is first
    assert Session.of(other, CPU) is not first
    assert (first.rank, first.num_ranks, first.device, first.stream) == (0, 1, torch.device("cpu"), None)
    seen = weakref.ref(first)
    del first
    gc.collect()
    assert seen() is None
    assert Session.of(group, CPU).group is group


def test_the_last_buffer_ends_the_session() -> None:
    group = group_of_one()
    buffers = [deepep.Buffer(group, device="cpu", timeout=30.0) for _ in range(2)]
    seen = weakref.ref(Session.of(group, CPU))
    buffers.pop().destroy()
    gc.collect()
    assert seen() is Session.of(group, CPU)
    buffers.pop().destroy()
    gc.collect()
    assert seen() is None


def masks_of_two(ctx: Any) -> None:
    """One buffer leaves rank 2 out; the other never knows of it."""
    shrunk, whole = (
        deepep.Buffer(ctx.group, low_latency_mode=True, enable_shrink=True, timeout=30.0) for _ in range(2)
    )
    assert shrunk.runtime._control.session is whole.runtime._control.session
    x, num_experts = torch.ones(4, 128).bfloat16(), 2 * ctx.num_ranks
    idx = torch.arange(num_experts)[None].repeat(4, 1)  # everything to everybody

    def sources(buffer: Any) -> set[int]:
        ranges = buffer.low_latency_dispatch(x, idx, 4, num_experts, use_fp8=False)[2][1]
        return {rank for rank in range(ctx.num_ranks) if (ranges[:, rank] & 0xFFFFFFFF).any()}

    whole_before = sources(whole)
    assert 2 in whole_before
    if ctx.rank != 2:
        shrunk.low_latency_update_mask_buffer(2, True)
        assert 2 not in sources(shrunk)
    assert sources(whole) == whole_before
    status = torch.full((ctx.num_ranks,), -1, dtype=torch.int32)
    whole.low_latency_query_mask_buffer(status)
    assert not status.any()
    whole.destroy()
    if ctx.rank != 2:
        assert 2 not in sources(shrunk)
        shrunk.destroy()


def test_masks_are_a_buffers_own(world_of: Any) -> None:
    world_of(3).run(masks_of_two)


def gathered(ctx: Any) -> None:
    mine = bytes(range(ctx.rank * 7)) * 3
    assert gather_bytes(ctx.group, mine) == [bytes(range(rank * 7)) * 3 for rank in range(ctx.num_ranks)]
    assert gather_bytes(ctx.group, b"") == [b""] * ctx.num_ranks


def test_bytes_of_any_length_are_gathered(world_of: Any) -> None:
    world_of(3).run(gathered)


def test_keys_are_of_a_run_and_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's store outlives an attempt whose ranks died, and its keys with it."""
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert session.run_prefix() == "deepep"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert session.run_prefix() == "deepep/job/1"
