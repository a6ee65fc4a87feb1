"""The CUDA engine while processes join its ranks and go, on stubs: no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.joining import TIMEOUT, hand_over, newcomer

from deepep.sim import World

pytestmark = pytest.mark.alone


class Watched:
    """The engine's heaps and launches in this process.

    exported: names of this rank's heaps. mapped: of the last ones that it mapped, by rank. live: of the last
    memory of each mode, as bits.
    """

    def __init__(self) -> None:
        from harness import stub_cuda

        stub_cuda.install(8)
        stub_cuda.serve()
        import uuid

        from deepep.backends.cuda.memory import generations
        from deepep.backends.cuda.memory.ipc import SymmetricHeap
        from deepep.runtime.control.membership import Membership

        Membership.payload = lambda membership: None  # NCCL's, which carries nothing of the host
        self.exported: list[str] = []
        self.mapped: list[str | None] = []
        self.live: dict[str, int] = {}

        def export_heap(own: Any) -> bytes:
            self.exported.append(uuid.uuid4().hex)
            return self.exported[-1].encode()

        def map_heaps(own: Any, rank: int, exported: list[bytes | None]) -> SymmetricHeap:
            self.mapped = [None if raw is None else raw.decode() for raw in exported]
            return SymmetricHeap(own, [own] * len(exported))

        def set_live(domain: Any, live: int) -> None:
            self.live[type(domain).__name__] = live

        generations.export_heap, generations.map_heaps = export_heap, map_heaps
        stub_cuda.Domain.set_live = set_live

    def calls(self, buffer: Any, members: tuple[int, ...]) -> list[str | None]:
        """A dispatch of each mode; the heaps of the later one, by rank."""
        import torch

        experts = 2 * buffer.group_size
        x, idx = torch.zeros((8, 256), dtype=torch.bfloat16), torch.zeros((8, 1), dtype=torch.int64)
        buffer.dispatch(x, topk_idx=idx, topk_weights=torch.ones((8, 1)), num_experts=experts)
        buffer.low_latency_dispatch(x, idx, 8, experts, use_fp8=False)
        bits = sum(1 << rank for rank in members)
        assert self.live == {"Domain": bits, "LowLatencyDomain": bits}
        assert tuple(rank for rank, heap in enumerate(self.mapped) if heap is not None) == members
        assert self.mapped[buffer.rank] == self.exported[-1]
        return self.mapped


def kept(buffer: Any) -> int:
    return int(buffer.info.memory["kept memory"])


def test_members_change(tmp_path: Path) -> None:
    """A group grows by a rank, one takes the place of a rank that is silent, and one is dismissed. All map
    heaps of those who are there, and none of before; what a silent rank may write to is kept.
    """

    def member(ctx: Any, path: str) -> None:
        import os

        import torch

        import deepep

        os.environ["DEEPEP_SYMMETRIC_BYTES"] = str(1 << 20)
        watched = Watched()
        options = {"low_latency_mode": True, "enable_shrink": True, "timeout": TIMEOUT}
        buffer = deepep.Buffer(ctx.group, backend="stub", device="cpu", max_num_ranks=3, **options)
        assert buffer.info.masked_ranks == (2,)
        first = watched.calls(buffer, (0, 1))
        torch.cuda.is_current_stream_capturing = lambda: True
        with pytest.raises(deepep.ArgumentError, match="outside of a graph"):
            buffer.invite([2])
        torch.cuda.is_current_stream_capturing = lambda: False
        with pytest.raises(deepep.RangeError, match="invitation"):
            buffer.admit("another text")
        assert watched.calls(buffer, (0, 1)) is first  # nothing has happened

        buffer.admit(hand_over(ctx, buffer, (2,), f"{path}-grow"))
        assert buffer.info.memory["low-latency memory"] > 0
        second = watched.calls(buffer, (0, 1, 2))
        assert not set(first) & set(second)
        assert kept(buffer) == 0

        buffer.low_latency_update_mask_buffer(2, True)  # it lives, and knows of nothing
        watched.calls(buffer, (0, 1))
        buffer.admit(hand_over(ctx, buffer, (2,), f"{path}-replace"))
        third = watched.calls(buffer, (0, 1, 2))
        assert not set(second) & set(third)
        assert kept(buffer) > 1 << 20
        if ctx.rank == 0:
            Path(f"{path}-replaced").touch()
        wait_for(f"{path}-ended")
        buffer.dismiss([2])
        assert not set(third) & set(watched.calls(buffer, (0, 1)))
        assert kept(buffer) == 0
        buffer.destroy()

    def wait_for(path: str) -> None:
        import time

        while not Path(path).exists():
            time.sleep(0.01)

    def replaced(buffer: Any, watched: Watched, path: str) -> None:
        assert None not in watched.calls(buffer, (0, 1, 2))
        wait_for(f"{path}-replaced")
        buffer.__exit__(RuntimeError, RuntimeError(), None)  # abandons: the others are not to come
        Path(f"{path}-ended").touch()

    def dismissed(buffer: Any, watched: Watched, path: str) -> None:
        assert None not in watched.calls(buffer, (0, 1, 2))
        buffer.dismiss([2])

    def other(ctx: Any, path: str, name: str, then: Any) -> None:
        watched = Watched()
        newcomer(ctx, f"{path}-{name}", 2, lambda buffer: then(buffer, watched, path), device="cpu")

    path = str(tmp_path / "invitation")
    with World(2) as members, World(1) as first, World(1) as second:
        coming = [
            first.submit(other, path, "grow", replaced),
            second.submit(other, path, "replace", dismissed),
        ]
        members.run(member, path)
        for each in coming:
            each.results()
