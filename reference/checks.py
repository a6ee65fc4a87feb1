"""The one way in which the reference refuses an input."""

from __future__ import annotations


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` ("argument: got ...; allowed: ...") unless `holds`."""
    if not holds:
        raise ValueError(message)
