"""Recovery: ranks that were late, missed a call, were masked or raised are back in the next call."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
from harness.rank_threads import Ranks, be_patient, raised, works

import deepep
from deepep.errors import DestroyedError, PeerTimeoutError

pytestmark = pytest.mark.alone

SHORT, LONG = 2.0, 60.0


def buffer_on(ranks: Ranks, rank: int, timeout: float, **options: Any) -> Any:
    return deepep.Buffer(ranks.groups[rank], timeout=timeout, **options)


@pytest.mark.parametrize("masks", [False, True])
def test_a_rank_that_missed_a_call_is_taken_in_again(masks: bool) -> None:
    """It never called, and knows of nothing; all take all in again, and the next call works."""
    ranks = Ranks(3 if masks else 2)

    def part(rank: int) -> Any:
        buffer = buffer_on(ranks, rank, LONG, enable_shrink=True)
        assert works(buffer, rank, ranks.num_ranks)
        named = []
        for _ in range(2):
            if rank != 1:
                be_patient(buffer, SHORT)
                error = raised(lambda: works(buffer, rank, ranks.num_ranks))
                be_patient(buffer, LONG)
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
        buffer = buffer_on(ranks, rank, LONG)
        named = []
        for _ in range(2):
            assert works(buffer, rank, 3)
            if rank == 1:
                ranks.meet()  # the others have given it up
                error = raised(lambda: works(buffer, rank, 3))
            else:
                be_patient(buffer, SHORT)
                error = raised(lambda: works(buffer, rank, 3))
                be_patient(buffer, LONG)
                ranks.meet()
            assert isinstance(error, PeerTimeoutError), error
            named.append(error.record.waited_on)
            ranks.meet()
        assert works(buffer, rank, 3)
        buffer.destroy()
        return named

    assert ranks.run(part) == [[(1,), (1,)]] * 3


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_left_out_a_call_is_told_once(first: int) -> None:
    """Without masks: the call after the one that it missed fails at once on it, and on those that make their
    next one before; the next call of all works.
    """
    ranks = Ranks(2)

    def part(rank: int) -> list[Any]:
        buffer = buffer_on(ranks, rank, LONG)
        tale = []
        if rank == 0:
            be_patient(buffer, SHORT)
            tale.append(raised(lambda: works(buffer, rank, 2)))
            be_patient(buffer, LONG)
        for turn in (first, 1 - first):
            ranks.meet()
            if rank == turn and (rank == 1 or first == 0):
                tale.append(raised(lambda: works(buffer, rank, 2)))
        ranks.meet()
        assert works(buffer, rank, 2)
        buffer.destroy()
        return [error.record.waited_on for error in tale if isinstance(error, PeerTimeoutError)]

    assert ranks.run(part) == [[(1,)] * (2 - first), [(1,)]]


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


class Raises:
    """An argument whose conversion raises something of its own."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __index__(self) -> int:
        raise type(self.error)(*self.error.args)


class RaisingHandle(tuple[Any, ...]):
    """The same of a handle."""

    def __new__(cls, error: BaseException) -> RaisingHandle:
        return super().__new__(cls, (error,))

    def __len__(self) -> int:
        raise type(self[0])(*self[0].args)


@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt()])
def test_what_a_rank_raises_before_the_engine_the_others_learn_at_once(error: BaseException) -> None:
    """In each collective call: while its arguments are converted."""
    import torch

    ranks = Ranks(2)
    odd, idx = Raises(error), torch.tensor([[0]])
    calls: dict[str, dict[str, Any]] = {
        "get_dispatch_layout": {"topk_idx": idx, "num_experts": odd},
        "dispatch": {"x": None, "expert_alignment": odd},
        "combine": {"x": None, "handle": RaisingHandle(error)},
        "clean_low_latency_buffer": {
            "num_max_dispatch_tokens_per_rank": 1,
            "hidden": odd,
            "num_experts": 2,
        },
        "low_latency_dispatch": {
            "x": None,
            "topk_idx": idx,
            "num_max_dispatch_tokens_per_rank": 1,
            "num_experts": odd,
        },
        "low_latency_combine": {
            "x": None,
            "topk_idx": idx,
            "topk_weights": None,
            "handle": None,
            "num_sms": odd,
        },
        "get_next_low_latency_combine_buffer": {"handle": RaisingHandle(error)},
    }

    def part(rank: int) -> Any:
        buffer = buffer_on(ranks, rank, LONG, low_latency_mode=True)
        assert works(buffer, rank, 2)
        told = []
        for name, bad in calls.items():
            method = getattr(buffer, name)
            if rank == 1:
                told.append(raised(partial(method, **bad)))
            else:
                told.append(raised(lambda: works(buffer, rank, 2)))
            ranks.meet()
            assert works(buffer, rank, 2)
        buffer.destroy()
        return told

    first, second = ranks.run(part)
    assert [type(one) for one in second] == [type(error)] * len(calls), second
    for name, one in zip(calls, first, strict=True):
        assert isinstance(one, PeerTimeoutError), (name, one)
        assert f"rank 1 raised {type(error).__name__}" in str(one), name


class InlineQueue:
    """A queue as CUDA's: jobs run when they are submitted, and raise there."""

    def submit(self, job: Any, tensors: Any = ()) -> Any:
        job()
        return self

    def host_wait(self) -> None:
        pass

    current_stream_wait = host_wait

    def wait_for(self, after: Any, owns_outputs: bool) -> None:
        pass

    def allocating(self, on_queue: bool) -> Any:
        return contextlib.nullcontext()

    def close(self, seconds: float) -> bool:
        return True


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("leaves", ["masked", "late"])
def test_a_rank_that_was_left_out_may_leave(inline: bool, leaves: str) -> None:
    """destroy() raises nothing there, be it that it was masked by hand or that it does not know yet."""
    ranks = Ranks(3)

    def part(rank: int) -> Any:
        buffer = buffer_on(ranks, rank, LONG, enable_shrink=True)
        if inline:
            buffer.runtime._control.queue.close(LONG)
            buffer.runtime._control.queue = InlineQueue()
        assert works(buffer, rank, 3)
        ranks.meet()
        if rank != 1:
            if leaves == "late":
                be_patient(buffer, SHORT)
                assert isinstance(raised(lambda: works(buffer, rank, 3)), PeerTimeoutError)
                be_patient(buffer, LONG)
            buffer.low_latency_update_mask_buffer(1, True)
            works(buffer, rank, 3)
        ranks.meet()
        return raised(buffer.destroy)

    assert ranks.run(part) == [None] * 3


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


def test_an_error_before_a_call_is_told_when_it_leaves_the_buffers_block() -> None:
    """A needed argument is missing: Python raises, and the library is not asked."""
    ranks = Ranks(3)

    def part(rank: int) -> Any:
        def work() -> None:
            with buffer_on(ranks, rank, LONG) as buffer:
                assert works(buffer, rank, 3)
                if rank == 1:
                    buffer.combine()
                works(buffer, rank, 3)

        return raised(work)

    first, wrong, last = ranks.run(part)
    assert isinstance(wrong, TypeError)
    for error in (first, last):
        assert isinstance(error, PeerTimeoutError)
        assert error.record.waited_on == (1,)
        assert error.record.seconds < LONG / 2
