"""Buffers by number: an operator's arguments are tensors and plain values, so it names its buffer by an int.

Numbers are never used twice, and the table holds its buffers weakly: nothing lives longer because a layer
used it.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from types import TracebackType
from typing import Any, NoReturn, Protocol

import torch
from torch.utils import checkpoint

from deepep.errors import ArgumentError, ArgumentTypeError, DeepEPError, DestroyedError, RangeError
from deepep.runtime.checks import check_int
from deepep.runtime.engine import Engine
from deepep.runtime.requests import Operation, Schedule

_MAX_TEXT = 200  # characters of a foreign error that the other ranks see
_ENOUGH: Any = getattr(checkpoint, "_StopRecomputationError", ())
"""Raised by a checkpoint in what it repeats, once all that it wants is there: on all ranks, and no error."""


class BufferLike(Protocol):
    """Facts that layers need of a deepep.Buffer before they exchange anything."""

    rank: int
    group_size: int
    group: Any


_buffers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count(1)
_highest_number = 0


def buffer_number(buffer: BufferLike) -> int:
    """The number by which operators of this process know `buffer`. Raises ArgumentTypeError."""
    global _highest_number
    if not all(hasattr(buffer, name) for name in ("rank", "group_size", "group")):
        raise ArgumentTypeError("buffer", type(buffer).__name__, "a deepep.Buffer")
    number = _numbers.get(buffer)
    if number is None:
        number = _highest_number = next(_next_number)
        _numbers[buffer] = number
        _buffers[number] = buffer
    return number


def checked_number(buffer: BufferLike | int) -> int:
    """The number of a buffer, or one that `buffer_number` gave. Raises ArgumentTypeError or RangeError."""
    if isinstance(buffer, bool):
        raise ArgumentTypeError("buffer", "bool", "a deepep.Buffer")
    if not isinstance(buffer, int):
        return buffer_number(buffer)
    if not 1 <= buffer <= _highest_number:
        check_int("buffer", buffer, -(2**63), 2**63 - 1)
        raise RangeError("buffer", str(buffer), "a number that buffer_number gave")
    return buffer


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


def refuse(number: int, operation: Operation, problem: ArgumentError) -> NoReturn:
    """Raises `problem`, here and on the other ranks, whose next call is `operation`."""
    engine: Engine | None = getattr(_buffers.get(number), "runtime", None)
    if engine is None:  # the buffer is gone, or a stand-in which no other rank shares
        raise problem
    engine.refuse(operation, problem, Schedule())


class posting:
    """A block whose errors the other ranks get, too, in the `operation` that they call next.

    An ArgumentError is theirs as it is. Anything else is raised here as it is, and reaches them as an
    ArgumentError about `argument`: they would wait for this rank until their deadline, or pair their call
    with its next one.
    """

    def __init__(self, number: int, operation: Operation, argument: str) -> None:
        self.number, self.operation, self.argument = number, operation, argument

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ArgumentError):
            refuse(self.number, self.operation, error)
        if kind is None or isinstance(error, (DeepEPError, _ENOUGH)):
            return
        problem = ArgumentError(
            self.argument, f"{kind.__name__}: {error}"[:_MAX_TEXT], "code that does not raise"
        )
        with contextlib.suppress(DeepEPError):
            engine_of(self.number).refuse(self.operation, problem, Schedule(asynchronous=True))


def posting_errors(
    number: int, operation: Operation, argument: str
) -> contextlib.AbstractContextManager[None]:
    """`posting`; nothing while torch.compile traces, where no rank exchanges anything."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else posting(number, operation, argument)
