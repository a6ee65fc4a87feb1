"""Shrinking: how the survivors of a fault in low latency go on without the ranks that are missing.

All of them work it out from what they have posted in the meeting that the fault ended, so all do the same:
they mask the missing ranks and make the operation again. One that was still waiting for the last
acknowledgement of an operation, which another has left behind, has all rows of it, and need not.
"""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import NamedTuple

from deepep.runtime.control.meeting import Meeting, Verdict
from deepep.runtime.requests import LOW_LATENCY

ACKNOWLEDGE = "acknowledge"
"""The phase in which a rank has all its rows, and waits until every rank has."""

_LABELS = {operation.label for operation in LOW_LATENCY}


class Course(Enum):
    """The course that a rank takes after a fault."""

    RAISE = auto()
    """It raises, and so do all others."""

    LEFT_OUT = auto()
    """It raises: the others go on without it."""

    REPEAT = auto()
    """It makes its operation again."""

    GO_ON = auto()
    """Its operation is complete."""

    RESTART = auto()
    """It makes its training step again, from the beginning."""


class Place(NamedTuple):
    """A rank's place: the number of its operation on the link, from 1; operation and phase."""

    number: int
    operation: str
    phase: str


def course(meeting: Meeting, verdict: Verdict, members: tuple[int, ...]) -> Course:
    """The course of `meeting.rank` after a meeting's end, with those who were `members` then."""
    everybody = verdict.seen == len(members)  # in the end: nobody is missing any more
    missing = () if everybody else verdict.missing
    if verdict.withdrew or not (everybody or missing):
        return Course.RAISE
    places = {rank: place_of_rank(meeting, rank) for rank in members if rank not in missing}
    known = [place for place in places.values() if place is not None]
    last = max((place.number for place in known), default=0)
    fitting = len(known) == len(places) > 0 and all(
        place.operation in _LABELS
        and (place.number == last or (place.number == last - 1 and place.phase == ACKNOWLEDGE))
        for place in known
    )
    if not fitting:
        return Course.RAISE
    if meeting.rank in missing:
        return Course.LEFT_OUT
    mine = places[meeting.rank]
    assert mine is not None
    return Course.REPEAT if mine.number == last else Course.GO_ON


def place_of_rank(meeting: Meeting, rank: int) -> Place | None:
    """The place that a rank reported; or, where they had not met yet, the operation that it came with."""
    report = meeting.store.get(f"report/{rank}")
    if report is not None:
        at = json.loads(report).get("at")
        return None if at is None else Place(*at)
    came = meeting.store.get(f"arrived/{rank}")
    return None if came is None else Place(1, came.decode(), "connect")
