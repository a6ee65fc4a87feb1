"""The lock under which a rank issues an operation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from deepep.errors import DeepEPError

_Lock: Any = type(threading.RLock())


class Issuing(_Lock):
    """The lock under which a rank issues an operation; and where every call that fails passes.

    failed: called with an exception that is none of this library's: only this rank knows of it.
    """

    def __new__(cls, failed: Callable[[BaseException], None]) -> Issuing:
        lock: Issuing = super().__new__(cls)
        return lock

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None and not isinstance(error, DeepEPError):
                self._failed(error)
        finally:
            self.release()

    def renew(self) -> None:
        """Frees the lock in a child, whichever of the parent's threads held it."""
        self._at_fork_reinit()
