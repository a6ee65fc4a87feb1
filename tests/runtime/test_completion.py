"""Completions that hold the memory of what they stand for, with streams that note what they are asked."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepep.runtime import completion as module
from deepep.runtime.completion import CudaCompletion, HoldingCompletion, bare

CALLER, OTHER, COMM = 5, 6, 7


class Memory:
    """Stands for a tensor: notes the streams recorded."""

    def __init__(self) -> None:
        self.recorded: list[Any] = []

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


class Rig:
    """A completion of work on COMM, called on CALLER, that alone holds an output; and what is asked of it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.device = CALLER, 0
        self.waits: list[int] = []
        patch.setattr(module.streams, "current", lambda device: self._stream())
        patch.setattr(torch.cuda, "current_device", lambda: self.device)
        self.given: Any = Memory()
        made: Any = Memory()
        self.made, self.recorded = weakref.ref(made), made.recorded
        event: Any = SimpleNamespace(synchronize=lambda: None)
        self.comm: Any = SimpleNamespace(cuda_stream=COMM, device_index=0)
        self.end = HoldingCompletion(event, self.comm, CALLER, (self.given, None, made))

    def _stream(self) -> Any:
        at = self.current
        return SimpleNamespace(cuda_stream=at, wait_event=lambda event: self.waits.append(at))

    def is_held(self) -> bool:
        gc.collect()
        return self.made() is not None


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_memory_is_held_until_the_callers_stream_waits(rig: Rig) -> None:
    assert rig.is_held()
    rig.end.current_stream_wait()
    assert rig.waits == [CALLER]
    assert not rig.is_held()
    del rig.end
    assert rig.given.recorded == rig.recorded == []


def test_a_wait_of_another_stream_lets_nothing_go(rig: Rig) -> None:
    """The memory belongs to the caller's stream, which does not wait by this."""
    rig.current = OTHER
    rig.end.current_stream_wait()
    assert rig.waits == [OTHER]
    assert rig.is_held()
    rig.current = CALLER
    rig.end.current_stream_wait()
    assert not rig.is_held()
    assert rig.recorded == []


def test_a_wait_on_another_device_lets_nothing_go(rig: Rig) -> None:
    """The default streams of all devices have one address."""
    rig.device = 1
    rig.end.current_stream_wait()
    assert rig.waits == [CALLER]
    assert rig.is_held()
    rig.device = 0
    rig.end.current_stream_wait()
    assert not rig.is_held()


def test_without_a_wait_the_stream_that_works_is_recorded(rig: Rig) -> None:
    rig.current = OTHER
    rig.end.current_stream_wait()
    del rig.end
    assert rig.given.recorded == rig.recorded == [rig.comm]
    assert not rig.is_held()


def test_a_host_that_has_waited_needs_no_record(rig: Rig) -> None:
    rig.end.host_wait()
    assert not rig.is_held()
    del rig.end
    assert rig.given.recorded == rig.recorded == []


def test_a_bare_completion_holds_nothing(rig: Rig) -> None:
    """Handles keep those: they live as long as a backward pass."""
    kept = bare(rig.end)
    assert type(kept) is CudaCompletion
    assert kept.event is rig.end.event
    assert bare(kept) is kept
    assert bare(None) is None
    del rig.end
    assert not rig.is_held()
