"""Recovery: ranks that were late, missed a call, were masked or raised are back in the next call."""

from __future__ import annotations

import time
from typing import Any

import pytest
from harness.rank_threads import Ranks, raised, works

import deepep
from deepep.errors import DestroyedError, PeerTimeoutError

pytestmark = pytest.mark.alone

SHORT, LONG = 1.0, 60.0


def buffer_on(ranks: Ranks, rank: int, timeout: float, **options: Any) -> Any:
    return deepep.Buffer(ranks.groups[rank], timeout=timeout, **options)


@pytest.mark.parametrize("masks", [False, True])
def test_a_rank_that_missed_a_call_is_taken_in_again(masks: bool) -> None:
    """It never called, and knows of nothing; all take all in again, and the next call works."""
    ranks = Ranks(3 if masks else 2)

    def part(rank: int) -> Any:
        buffer = buffer_on(ranks, rank, SHORT, enable_shrink=True)
        assert works(buffer, rank, ranks.num_ranks)
        named = []
        for _ in range(2):
            if rank != 1:
                error = raised(lambda: works(buffer, rank, ranks.num_ranks))
                assert isinstance(error, PeerTimeoutError)
                named.append(error.record.waited_on)
                if masks:
                    buffer.low_latency_update_mask_buffer(1, True)
                    works(buffer, rank, ranks.num_ranks)
            ranks.meet()
            buffer.low_latency_clean_mask_buffer()
            assert works(buffer, rank, ranks.num_ranks)
        buffer.destroy()
        return named

    for rank, named in enumerate(ranks.run(part)):
        assert named == ([] if rank == 1 else [(1,), (1,)])


def test_a_late_rank_needs_no_masks_to_come_back() -> None:
    """Late twice: each time all are told, with its name, and the next call works."""
    ranks = Ranks(3)

    def part(rank: int) -> list[Any]:
        buffer = buffer_on(ranks, rank, SHORT)
        named = []
        for _ in range(2):
            assert works(buffer, rank, 3)
            if rank == 1:
                time.sleep(2.5 * SHORT)
            error = raised(lambda: works(buffer, rank, 3))
            assert isinstance(error, PeerTimeoutError), error
            named.append(error.record.waited_on)
            ranks.meet()
        assert works(buffer, rank, 3)
        buffer.destroy()
        return named

    assert ranks.run(part) == [[(1,), (1,)]] * 3


def test_a_rank_that_left_out_a_call_is_told_once() -> None:
    """Without masks: the call after the one that it missed fails at once on all, the next one works."""
    ranks = Ranks(2)

    def part(rank: int) -> list[Any]:
        buffer = buffer_on(ranks, rank, SHORT)
        tale = []
        if rank == 0:
            tale.append(raised(lambda: works(buffer, rank, 2)))
        ranks.meet()
        tale.append(raised(lambda: works(buffer, rank, 2)))
        ranks.meet()
        assert works(buffer, rank, 2)
        buffer.destroy()
        return [error.record.waited_on for error in tale if isinstance(error, PeerTimeoutError)]

    assert ranks.run(part) == [[(1,), (1,)], [(1,)]]


@pytest.mark.parametrize("phase", ["control", "payload"])
@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt()])
def test_what_a_rank_raises_in_a_call_the_others_learn_at_once(phase: str, error: BaseException) -> None:
    ranks = Ranks(3)

    def part(rank: int) -> Any:
        buffer = buffer_on(ranks, rank, LONG)
        assert works(buffer, rank, 3)

        def fail(operation: str, where: str) -> None:
            if (operation, where) == ("dispatch", phase):
                raise error

        if rank == 1:
            buffer.runtime.observe(fail)
        found = raised(lambda: works(buffer, rank, 3))
        buffer.runtime.observe(None)
        ranks.meet()
        assert works(buffer, rank, 3)
        buffer.destroy()
        return found

    found = ranks.run(part)
    assert type(found[1]) is type(error)
    for other in (found[0], found[2]):
        assert isinstance(other, PeerTimeoutError), other
        assert other.record.waited_on == (1,)
        assert f"rank 1 raised {type(error).__name__}" in str(other)


def test_reconnecting_leaves_nothing_in_the_store() -> None:
    ranks = Ranks(3)
    counts = []

    def part(rank: int) -> None:
        buffer = buffer_on(ranks, rank, LONG, enable_shrink=True)
        for _ in range(6):
            if rank != 2:
                buffer.low_latency_update_mask_buffer(2, True)
                works(buffer, rank, 3)
            ranks.meet()
            if rank != 2:
                buffer.low_latency_update_mask_buffer(2, False)
            assert works(buffer, rank, 3)
            ranks.meet()
            if rank == 0:
                counts.append(ranks.store.num_keys())
            ranks.meet()
        buffer.destroy()

    assert ranks.run(part) == [None] * 3
    assert counts[-1] == counts[2], counts


def test_hooks_of_a_destroyed_buffer() -> None:
    """A hook that was never called says that the buffer is gone; one that was, does nothing."""
    import torch

    ranks = Ranks(2)

    def part(rank: int) -> Any:
        buffer = buffer_on(ranks, rank, LONG, low_latency_mode=True)
        x, idx = torch.ones(1, 128).bfloat16(), torch.tensor([[0, 1]])
        hooks = []
        for _ in range(2):
            dispatched = buffer.low_latency_dispatch(x, idx, 2, 2, use_fp8=False, return_recv_hook=True)
            hooks.append(dispatched[4])
            if len(hooks) == 1:
                hooks[0]()
        buffer.destroy()
        hooks[0]()
        return raised(hooks[1])

    assert all(isinstance(error, DestroyedError) for error in ranks.run(part))
