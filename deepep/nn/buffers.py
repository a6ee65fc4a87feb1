"""Buffers by number: an operator's arguments are tensors and plain values, so it names its buffer by an int.

Numbers are never used twice, and the table holds its buffers weakly: nothing lives longer because a layer
used it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

from deepep.errors import DestroyedError
from deepep.runtime.engine import Engine


class BufferLike(Protocol):
    """What layers want to know of a deepep.Buffer before they exchange anything."""

    rank: int
    group_size: int
    group: Any


_buffers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count(1)


def buffer_number(buffer: BufferLike) -> int:
    """The number by which operators of this process know `buffer`."""
    number = _numbers.get(buffer)
    if number is None:
        number = next(_next_number)
        _numbers[buffer] = number
        _buffers[number] = buffer
    return number


def buffer_of(number: int) -> Any:
    """The buffer of this number. Raises DestroyedError if it is gone."""
    buffer = _buffers.get(number)
    if buffer is None:
        raise DestroyedError(f"buffer {number}, which this layer was built on, does not exist any more")
    return buffer


def engine_of(number: int) -> Engine:
    """The engine of the buffer of this number. Raises DestroyedError if the buffer is gone."""
    engine: Engine = buffer_of(number).runtime
    return engine
