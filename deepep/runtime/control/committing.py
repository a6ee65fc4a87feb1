"""Committing: how the survivors of a fault in a training step go on, as all of them work it out alike.

In a step ranks sum their gradients and then commit: they exchange a word, and whoever has all of them knows
that every rank has its sums, and may change its weights. So when a fault is settled (settling.py), the rank
that is furthest behind decides. If it was committing, every rank has its sums, and some may have gone on. If
it was not, nobody has changed anything. Places are what ranks posted in the meeting that the fault ended; no
report is taken after its verdict, so nobody decides by others than anybody else.
"""

from __future__ import annotations

from deepep.runtime.control.meeting import Meeting, Verdict
from deepep.runtime.control.shrinking import Course, place_of_rank
from deepep.runtime.requests import Operation

_COMMIT = Operation.COMMIT.label
_SUMS = {Operation.ALL_REDUCE.label, _COMMIT}


def course_of_step(meeting: Meeting, verdict: Verdict, members: tuple[int, ...]) -> Course:
    """The course of `meeting.rank` after a meeting's end, with those who were `members` then.

    GO_ON: its sums count. REPEAT: it makes its sums again. RESTART: it makes its step again, from the
    beginning. LEFT_OUT: the others go on without it.
    """
    everybody = verdict.seen == len(members)  # in the end: nobody is missing any more
    missing = () if everybody else verdict.missing
    if not (everybody or missing):
        return Course.RAISE
    if meeting.rank in missing:
        return Course.LEFT_OUT
    if meeting.verdict() != verdict:
        return Course.RESTART  # that of a meeting which ended before this rank came: nobody was at work there
    places = {rank: place_of_rank(meeting, rank) for rank in members if rank not in missing}
    known = {rank: place for rank, place in places.items() if place is not None}
    if len(known) < len(places):
        return Course.RESTART  # the same, of a rank that had come
    behind = min(place.number for place in known.values())
    if {place.operation for place in known.values() if place.number == behind} == {_COMMIT}:
        return Course.GO_ON if known[meeting.rank].number == behind else Course.RESTART
    return Course.REPEAT if {place.operation for place in known.values()} <= _SUMS else Course.RESTART
