"""Outcomes of a run, rank by rank, and the errors that report them."""

from __future__ import annotations

import enum
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Status(str, enum.Enum):
    """The ways in which a rank ends a run."""

    RETURNED = "returned"
    RAISED = "raised"
    DIED = "died"
    HUNG = "hung"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one rank in one run.

    Attributes:
        rank: which rank.
        status: returned, raised, died (its process ended) or hung (still running when time was up).
        value: what the function returned.
        error: the exception it raised, an instance of the original type where that type can travel.
        traceback: the remote traceback of the exception, or the stack a hung rank was found in, or a crashed
            one's threads.
        exitcode: of a process that died; negative: the signal that ended it.
        seconds: from the start of the run to this rank's end of it, as seen by the parent.
    """

    rank: int
    status: Status
    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    exitcode: int | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status is Status.RETURNED

    def describe(self) -> str:
        """One line, with the traceback or stack below it."""
        if self.status is Status.RAISED:
            head = f"raised {type(self.error).__name__}: {self.error}"
        elif self.status is Status.DIED:
            head = f"died ({_ending(self.exitcode)}) after {self.seconds:.2f} s"
        elif self.status is Status.HUNG:
            head = f"still running after {self.seconds:.2f} s"
        else:
            head = "returned"
        body = "\n".join("    " + line for line in self.traceback.rstrip().splitlines())
        return f"rank {self.rank} {head}" + (f"\n{body}" if body else "")


class WorldError(RuntimeError):
    """A run did not return on every rank.

    Attributes:
        outcomes: what each rank did, by rank.
        failures: the exceptions of the ranks that raised, by rank.
    """

    def __init__(self, message: str, outcomes: Sequence[Outcome] = ()) -> None:
        super().__init__(message)
        self.outcomes = list(outcomes)

    @property
    def failures(self) -> dict[int, BaseException]:
        return {o.rank: o.error for o in self.outcomes if o.error is not None}

    def ranks(self, status: Status) -> tuple[int, ...]:
        """The ranks that ended so."""
        return tuple(o.rank for o in self.outcomes if o.status is status)


class RankDied(WorldError):
    """A rank's process ended during the run."""


class WorldTimeout(WorldError, TimeoutError):
    """A rank did not return in time, and none of the others failed."""


def failure_of(outcomes: Sequence[Outcome], what: str) -> WorldError:
    """The error for a run that not all ranks returned from.

    A death is reported before an exception, and an exception before a hang: the later ones usually
    follow from the earlier ones.
    """
    kinds = {Status.DIED: RankDied, Status.RAISED: WorldError, Status.HUNG: WorldTimeout}
    status = next(s for s in kinds if any(o.status is s for o in outcomes))
    first = [o for o in outcomes if o.status is status]
    lines = [f"{what}:", first[0].describe()]
    seen = {_signature(first[0])}
    for outcome in outcomes:
        if outcome is first[0] or outcome.ok:
            continue
        short = _signature(outcome) in seen
        seen.add(_signature(outcome))
        lines.append(f"rank {outcome.rank} likewise" if short else outcome.describe())
    error = kinds[status]("\n".join(lines), outcomes)
    error.__cause__ = first[0].error
    return error


def _signature(outcome: Outcome) -> tuple[str, str, str, int | None]:
    return (outcome.status, type(outcome.error).__name__, str(outcome.error), outcome.exitcode)


def _ending(exitcode: int | None) -> str:
    if exitcode is None:
        return "its connection closed"
    if exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit status {exitcode}"
