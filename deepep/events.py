"""EventHandle and EventOverlap: ordering between an operation and what the caller does around it.

On CUDA tensors an event is a CUDA event. On CPU tensors it is a future of the buffer's worker thread: waiting
blocks, and raises the error of the operation if it failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

import torch

from deepep.errors import ArgumentTypeError, EventError
from deepep.runtime.checks import check_flag
from deepep.runtime.completion import Completion, now


class EventHandle:
    """A point in a stream of work.

    `EventHandle()` stands for everything queued on the current CUDA stream so far; without CUDA, for the
    present moment. Operations called with `async_finish=True` return handles of their own end.
    """

    def __init__(self, completion: Completion | None = None) -> None:
        if completion is not None and not isinstance(completion, Completion):
            raise ArgumentTypeError("completion", type(completion).__name__, "a Completion or None")
        self._completion = completion if completion is not None else now()

    @property
    def completion(self) -> Completion:
        """The work that is waited for."""
        return self._completion

    def current_stream_wait(self) -> None:
        """Make the current stream (on CPU: the caller) wait. Raises the operation's error, if it failed."""
        self._completion.current_stream_wait()


@dataclass(eq=False)
class EventOverlap:
    """An event, or none, with what must live until it has passed; usable as a context manager.

    event: None when the operation was synchronous.
    extra_tensors: kept alive as long as this object (instead of `record_stream`, which CUDA graphs forbid).

        with buffer_event:          # the body overlaps with the communication
            ...                     # on leaving, the current stream waits for it
    """

    event: EventHandle | None = None
    extra_tensors: tuple[torch.Tensor | None, ...] | list[torch.Tensor | None] | None = None
    _hook: Callable[[], None] | None = field(default=None, init=False, repr=False)
    _release_on_exit: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.event is not None and not isinstance(self.event, EventHandle):
            raise ArgumentTypeError("event", type(self.event).__name__, "an EventHandle or None")
        kept = self.extra_tensors
        if kept is not None and not isinstance(kept, (tuple, list)):
            raise ArgumentTypeError("extra_tensors", type(kept).__name__, "a tuple of tensors or None")

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Wait for the event, then run and forget the registered hook.

        release_handle: drop the event and the tensors kept for it afterwards.

        Raises EventError where there is no event, because the operation was synchronous.
        """
        release_handle = check_flag("release_handle", release_handle)
        if self.event is None:
            raise EventError("this operation was synchronous: there is no event to wait for")
        self.event.current_stream_wait()
        hook, self._hook = self._hook, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None
            self.extra_tensors = None

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        """Have `hook` called once, after the wait. Raises EventError if one is registered already."""
        if not callable(hook):
            raise ArgumentTypeError("hook", type(hook).__name__, "something to call")
        if self._hook is not None:
            raise EventError("a hook is registered already")
        self._hook = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """`with event(release_handle=True): ...` drops the event after the wait."""
        self._release_on_exit = check_flag("release_handle", release_handle)
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        release, self._release_on_exit = self._release_on_exit, False
        if self.event is not None:
            self.current_stream_wait(release_handle=release)
