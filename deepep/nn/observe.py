"""Observation of every exchange that deepep.nn makes: for metrics, traces and profiles.

    with observe(records.append):
        loss = model(batch)
        loss.backward()

Those of a layer in fixed shapes are not: nobody on the host knows their rows.

Observers run on the rank's own thread, after the exchange. Without one, nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from deepep.errors import ArgumentTypeError

ExchangeName = Literal["dispatch", "combine", "dispatch_backward", "combine_backward"]


@dataclass(frozen=True)
class Exchange:
    """One dispatch or combine, forward or backward, as this rank saw it.

    rows_sent, rows_received: [R] payload rows to and from each rank, this rank's own included. row_bytes:
    what travels with one row: values, and top-k indices and weights where they go along. seconds: from the
    call until the outputs could be used, waiting for slower ranks included. On CUDA the host's time.
    """

    name: ExchangeName
    rows_sent: tuple[int, ...]
    rows_received: tuple[int, ...]
    row_bytes: int
    seconds: float


_observers: list[Callable[[Exchange], None]] = []


@contextmanager
def observe(observer: Callable[[Exchange], None]) -> Iterator[None]:
    """Calls `observer` after every exchange of this process until the block ends.

    Raises ArgumentTypeError for what cannot be called.
    """
    if not callable(observer):
        raise ArgumentTypeError("observer", type(observer).__name__, "a function of an Exchange")
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def observed() -> bool:
    """True if there is an observer."""
    return bool(_observers)


def report(exchange: Exchange) -> None:
    """Calls all observers."""
    for observer in tuple(_observers):
        observer(exchange)
