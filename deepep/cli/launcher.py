"""Launchers: whether torchrun has started this process; what ranks refused that a command has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from deepep.cli.terminal import misused
from deepep.errors import ArgumentError
from deepep.trace import TraceError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_ranks() -> int | None:
    """The ranks that torchrun has started, this process among them; None: it did not.

    Only all of its variables together say that it did: single ones are left over from something else.
    """
    if not all(os.environ.get(name) for name in _NEEDED):
        return None
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 1)):
        text = os.environ[name]
        if not text.isdecimal() or int(text) < least:
            misused(f"{name}: got {text!r} in the environment of a launcher; allowed: a number from {least}")
    return int(os.environ["WORLD_SIZE"])


@contextmanager
def refusals_raised() -> Iterator[None]:
    """Raises, in a world error's place, the argument or trace that its ranks refused: no traceback helps."""
    from deepep.sim import WorldError

    try:
        yield
    except WorldError as error:
        if isinstance(error.__cause__, (ArgumentError, TraceError)):
            raise error.__cause__ from None
        raise
