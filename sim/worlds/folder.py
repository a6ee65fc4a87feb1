"""Temporary folders that end with the process that made them, and with none of its forks."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref


class OwnFolder:
    """A temporary folder; removed by `cleanup`, when nobody holds it, or at the end of the process.

    tempfile's own are removed by whichever fork ends first.
    """

    def __init__(self, prefix: str) -> None:
        self.name = tempfile.mkdtemp(prefix=prefix)
        self._finalizer = weakref.finalize(self, _remove, self.name, os.getpid())

    def cleanup(self) -> None:
        """Removes it. Idempotent."""
        self._finalizer()


def _remove(name: str, creator: int) -> None:
    if os.getpid() == creator:
        shutil.rmtree(name, ignore_errors=True)
