"""Completions of work: a future of a host thread, or an event on a CUDA stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from deepep.runtime import streams


class Completion(ABC):
    """The end of a piece of work that was started and may still be running."""

    @abstractmethod
    def current_stream_wait(self) -> None:
        """Orders the caller's further work behind this. Raises what the work raised, where that is known."""

    @abstractmethod
    def host_wait(self) -> None:
        """Blocks the host until the work is done; raises what it raised."""


class HostCompletion(Completion):
    """Work of a host thread. The host is its own stream: both waits block, and both raise its failure.

    interrupted: called with what ends a wait that is not the work's own failure, such as KeyboardInterrupt.
    """

    def __init__(
        self, future: Future[None], interrupted: Callable[[BaseException], None] | None = None
    ) -> None:
        self.future, self._interrupted = future, interrupted

    def current_stream_wait(self) -> None:
        self.host_wait()

    def host_wait(self) -> None:
        try:
            self.future.result()
        except BaseException as error:
            is_own = self.future.done() and self.future.exception() is error
            if not is_own and self._interrupted is not None:
                self._interrupted(error)
            raise


class CudaCompletion(Completion):
    """Work queued on a CUDA stream before `event` was recorded there."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        streams.current(torch.cuda.current_device()).wait_event(self.event)

    def host_wait(self) -> None:
        self.event.synchronize()


class HoldingCompletion(CudaCompletion):
    """Work of the stream `by` on memory of other streams, which is held until the caller's stream waits.

    What is freed then is reused behind the wait, as torch's own process groups have it: no `record_stream`,
    for each of which torch makes an event when the tensor is freed. Dropped without a wait, it records.

    caller: the address of the stream that was current when the work was ordered. held: tensors that the work
    reads or writes; they belong to that stream, or are in use on it.
    """

    def __init__(
        self, event: torch.cuda.Event, by: torch.cuda.Stream, caller: int, held: tuple[Tensor | None, ...]
    ) -> None:
        self.event = event
        self._by, self._caller, self._held = by, caller, held

    def current_stream_wait(self) -> None:
        device = torch.cuda.current_device()
        stream = streams.current(device)
        stream.wait_event(self.event)
        # Default streams have one address on all devices.
        if stream.cuda_stream == self._caller and device == self._by.device_index:
            self._held = ()

    def host_wait(self) -> None:
        super().host_wait()
        self._held = ()

    def __del__(self) -> None:
        for tensor in self._held:
            if tensor is not None:
                tensor.record_stream(self._by)


class AllOf(Completion):
    """Several pieces of work; it is over once all are."""

    def __init__(self, *parts: Completion) -> None:
        self.parts = parts

    def current_stream_wait(self) -> None:
        for part in self.parts:
            part.current_stream_wait()

    def host_wait(self) -> None:
        for part in self.parts:
            part.host_wait()


def bare(end: Completion | None) -> Completion | None:
    """The same end, for those who keep it long: it holds no memory of the work."""
    return CudaCompletion(end.event) if isinstance(end, HoldingCompletion) else end


def after_all(*parts: Completion | None) -> Completion | None:
    """The end of all of these that there are; None if there are none."""
    there = [part for part in parts if part is not None]
    return AllOf(*there) if len(there) > 1 else there[0] if there else None


def now() -> Completion:
    """The end of everything the current stream holds so far; on the host that is already done."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        event = torch.cuda.Event()
        event.record()
        return CudaCompletion(event)
    future: Future[None] = Future()
    future.set_result(None)
    return HostCompletion(future)
