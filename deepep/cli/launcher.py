"""Launchers: whether torchrun has started this process."""

from __future__ import annotations

import os

from deepep.cli.terminal import misused

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
