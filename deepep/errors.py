"""Everything deepep raises on purpose.

Bad input is refused before any payload moves, and on every rank: the rank that was given it raises, and so do
the others, the same type with the same message, because all ranks compare their arguments before each
operation (runtime/control/agreement.py). `rank` always names the rank where the cause lies, not the one that
raises.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


class DeepEPError(RuntimeError):
    """Base of all errors of this library."""


class ArgumentError(DeepEPError, ValueError):
    """An argument was refused: `argument` names it, `got` and `allowed` say what was wrong, `rank` where."""

    def __init__(self, argument: str, got: str, allowed: str, rank: int | None = None) -> None:
        self.argument, self.got, self.allowed, self.rank = argument, got, allowed, rank
        where = "" if rank is None else f"rank {rank}: "
        super().__init__(f"{where}{argument}: got {got}; allowed: {allowed}")

    def at(self, rank: int) -> ArgumentError:
        """The same error with `rank` as the place of the cause, unless it has one."""
        return self if self.rank is not None else type(self)(self.argument, self.got, self.allowed, rank)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.got, self.allowed, self.rank)


class ArgumentTypeError(ArgumentError, TypeError):
    """Wrong dtype or wrong Python type."""


class DeviceError(ArgumentError):
    """A tensor lies on the wrong device."""


class ShapeError(ArgumentError):
    """Wrong number of dimensions or wrong sizes."""


class LayoutError(ArgumentError):
    """A tensor is not laid out in memory as required (contiguity)."""


class RangeError(ArgumentError):
    """A value outside its range: an expert index, a count, an option."""


class CapacityError(ArgumentError):
    """More tokens than there is room for: T > M, or more received tokens than `num_worst_tokens`."""


class MismatchError(ArgumentError):
    """The ranks disagree: different operations, or different values where all must pass the same."""


class HandleError(ArgumentError):
    """A handle of another buffer, of the other mode, or of a dispatch that failed."""


class HookPendingError(ArgumentError):
    """An operation was started while the receive hook of the one before had not been called."""


class ModeError(ArgumentError):
    """A call that the buffer was not constructed for."""


class DestroyedError(DeepEPError):
    """The buffer was destroyed."""


class EventError(DeepEPError, AssertionError):
    """An EventOverlap was used as it cannot be: no event to wait for, or a second hook.

    An AssertionError as well, because that is what V1 raises here.
    """


@dataclass(frozen=True)
class FaultRecord:
    """Record of a wait that was not answered.

    operation, phase: where this rank was, e.g. "dispatch" and "payload".
    rank: the rank that reports. waited_on: the ranks held responsible; empty when they cannot be named.
    expected, seen: numbers of ranks that should have reported within the deadline, and that did.
    seconds: how long this rank waited, from the start of the operation.
    """

    operation: str
    phase: str
    rank: int
    waited_on: tuple[int, ...]
    expected: int
    seen: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The record as plain values, for logs."""
        return asdict(self)


class PeerTimeoutError(DeepEPError, TimeoutError):
    """A peer died or did not arrive within the deadline. `record` says who, where and when.

    Nothing of the interrupted operation's outputs may be used. The buffer works on once the ranks in
    `record.waited_on` are masked (`low_latency_update_mask_buffer`), or all of them have come back: each has
    learnt by a call of its own that it was late. With `enable_shrink` a rank that the others have masked in
    low latency raises it, until it is taken in again. Also raised, at once, when a rank raises something of
    its own; `reason` says what.
    """

    def __init__(self, record: FaultRecord, reason: str = "") -> None:
        self.record, self.reason = record, reason
        if record.waited_on:
            named = "rank " if len(record.waited_on) == 1 else "ranks "
            who = named + ", ".join(map(str, record.waited_on))
        else:
            who = "peers that cannot be named"
        place = f"rank {record.rank}: {record.operation}: {record.phase}"
        seen = f"{record.seen} of {record.expected} ranks reported"
        why = f": {reason}" if reason else ""
        super().__init__(f"{place}: waited {record.seconds:.1f} s for {who} ({seen}){why}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.record, self.reason)


class EvictedError(PeerTimeoutError):
    """The other ranks have gone on without this one: it did not report within the deadline, because it was
    frozen, say. What it has is out of date; a new process may join in its place.
    """
