"""Communication queues: an engine's operations run on one, in order, beside the caller's own work.

On CPU it is a thread, on CUDA a stream. Jobs run in the order in which they were submitted, on every rank.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import torch

from deepep.errors import DestroyedError
from deepep.runtime.completion import Completion, CudaCompletion, HostCompletion

Job = Callable[[], None]


class CommQueue(ABC):
    """Runs jobs in order."""

    @abstractmethod
    def submit(self, job: Job, tensors: Iterable[torch.Tensor | None] = ()) -> Completion:
        """Runs `job` after all jobs before it. `tensors` are what it reads and writes."""

    @abstractmethod
    def wait_for(self, after: Completion | None, owns_outputs: bool) -> None:
        """Inside a job: what follows happens after `after`, or after what the caller's stream held at submit.

        Outputs that the caller's stream owns may lie in memory that work queued there still reads; then that
        work is waited for in any case. owns_outputs: they belong to the queue.
        """

    @abstractmethod
    def allocating(self, on_queue: bool) -> contextlib.AbstractContextManager[object]:
        """Makes tensors that are allocated inside belong to the queue, or to the caller's stream."""

    @abstractmethod
    def close(self, seconds: float) -> bool:
        """Takes no more jobs and waits up to `seconds` for those it has; whether they all ended."""


class ThreadQueue(CommQueue):
    """A worker thread; a daemon, so it never keeps a process alive.

    interrupted: called when a caller stops waiting for a job, with what it raises.
    """

    def __init__(self, name: str, interrupted: Callable[[BaseException], None] | None = None) -> None:
        self._interrupted = interrupted
        self._jobs: queue.SimpleQueue[tuple[Job, Future[None]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        # The thread knows the jobs alone: a queue that nobody holds can be collected.
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job, tensors: Iterable[torch.Tensor | None] = ()) -> Completion:
        future: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise DestroyedError("the buffer was destroyed")
            self._jobs.put((job, future))
        return HostCompletion(future, self._interrupted)

    def wait_for(self, after: Completion | None, owns_outputs: bool) -> None:
        if after is not None:
            after.host_wait()

    def allocating(self, on_queue: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def close(self, seconds: float) -> bool:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(min(seconds, threading.TIMEOUT_MAX))
        return not self._thread.is_alive()


def _work(jobs: queue.SimpleQueue[tuple[Job, Future[None]] | None]) -> None:
    while True:
        item = jobs.get()
        if item is None:
            return
        job, future = item
        try:
            job()
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            future.set_exception(error)
        else:
            future.set_result(None)
        del item, job, future  # or the last job's tensors would live until the next job


class StreamQueue(CommQueue):
    """A CUDA stream. Jobs are issued by the caller's thread at once; their kernels run in order."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._entry = torch.cuda.Event()
        self._closed = False

    def submit(self, job: Job, tensors: Iterable[torch.Tensor | None] = ()) -> Completion:
        if self._closed:
            raise DestroyedError("the buffer was destroyed")
        caller = torch.cuda.current_stream(self.stream.device)
        self._entry.record(caller)
        with torch.cuda.stream(self.stream):
            job()
            done = torch.cuda.Event()
            done.record(self.stream)
        # Whichever of the two owns a tensor, its memory is not given out again before the other is done with
        # it.
        for tensor in tensors:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(self.stream)
                tensor.record_stream(caller)
        return CudaCompletion(done)

    def wait_for(self, after: Completion | None, owns_outputs: bool) -> None:
        if after is not None:
            after.current_stream_wait()
        if after is None or not owns_outputs:
            self.stream.wait_event(self._entry)

    def allocating(self, on_queue: bool) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if on_queue else contextlib.nullcontext()

    def close(self, seconds: float) -> bool:
        if not self._closed:
            self._closed = True
            # Not synchronize(): a kernel may wait for its peers longer than this is to.
            deadline = time.monotonic() + seconds
            while not self.stream.query():
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.0005)
        return True
