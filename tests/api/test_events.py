"""EventHandle and EventOverlap on the host."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from deepep import Buffer, DeepEPError, EventError, EventHandle, EventOverlap
from deepep.runtime.completion import HostCompletion


def pending() -> tuple[Future[None], EventOverlap]:
    future: Future[None] = Future()
    return future, EventOverlap(EventHandle(HostCompletion(future)))


def test_a_fresh_handle_has_passed() -> None:
    EventHandle().current_stream_wait()
    Buffer.capture().current_stream_wait()


def test_waiting_without_an_event_is_an_error() -> None:
    with pytest.raises(EventError, match="synchronous"):
        EventOverlap().current_stream_wait()
    for kind in (AssertionError, DeepEPError):  # what V1 raises, and what is ours
        with pytest.raises(kind, match="synchronous"):
            EventOverlap().current_stream_wait()


def test_a_hook_runs_once_after_the_wait() -> None:
    future, event = pending()
    calls = []
    event.register_hook_after_wait(lambda: calls.append(future.done()))
    with pytest.raises(EventError, match="registered already"):
        event.register_hook_after_wait(lambda: None)
    future.set_result(None)
    event.current_stream_wait()
    event.current_stream_wait()
    assert calls == [True]


def test_released_handles_drop_what_they_keep() -> None:
    kept = (torch.zeros(1),)
    event = EventOverlap(EventHandle(), kept)
    event.current_stream_wait()
    assert event.event is not None
    assert event.extra_tensors is kept
    event.current_stream_wait(release_handle=True)
    assert event.event is None
    assert event.extra_tensors is None


def test_the_context_manager_waits_on_leaving() -> None:
    future, event = pending()
    steps = []
    event.register_hook_after_wait(lambda: steps.append("waited"))
    with event:
        steps.append("body")
        future.set_result(None)
    assert steps == ["body", "waited"]
    assert event.event is not None
    with event(release_handle=True):
        pass
    assert event.event is None
    with event:  # nothing left to wait for
        pass
    with EventOverlap():
        pass


def test_waits_raise_the_failure_of_the_work() -> None:
    future, event = pending()
    future.set_exception(RuntimeError("lost"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lost"):
            event.current_stream_wait()
