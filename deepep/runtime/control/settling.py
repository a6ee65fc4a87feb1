"""Settling a failure: the survivors of a link agree, through the store, on who is missing.

torch's gloo groups do not survive a failure: one dead peer closes the connections of all. So a failure is
settled through the store, which must outlive any rank (torchrun's agent holds it, or the parent process):

1. Whoever sees its transport fail drops its connections, so that all others see it too, and posts a report.
2. It waits for the other members' reports until its operation's deadline. Who has not reported by then is
missing. 3. The first to conclude ends the meeting that the link came from (meeting.py) with a verdict; all
others adopt it. All raise PeerTimeoutError with the same ranks. A rank that raises something of its own in a
call ends the meeting itself, so nobody waits.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from deepep.runtime.control.meeting import Absent, Meeting, MeetingFailed, Verdict


@dataclass
class Progress:
    """This rank's position: operation and phase as users read them, when the operation began."""

    operation: str = "construct"
    phase: str = "meet"
    sequence: int = 0
    started: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the operation began, or its part that runs now."""
        return time.monotonic() - self.started

    def restart(self) -> None:
        """The deadline counts from here."""
        self.started = time.monotonic()


def settle(
    meeting: Meeting, members: tuple[int, ...], progress: Progress, deadline: float, grace: float, reason: str
) -> Verdict:
    """Agrees with the other members of a link on who is missing, after it failed here for `reason`.

    meeting: the one that the link came from. deadline: the operation's, by time.monotonic().
    grace: seconds beyond it for the others' reports.
    """
    connects = progress.phase == "connect"  # then all members are there
    number = progress.sequence + connects
    report = {"at": [number, progress.operation, progress.phase], "seconds": progress.seconds}
    meeting.report(report)
    until = max(0.0 if connects else deadline, time.monotonic()) + grace
    try:
        seen = meeting.collect("report", members, until)
        missing = () if connects else _latest({rank: json.loads(raw) for rank, raw in seen.items()})
    except MeetingFailed as failed:
        return failed.verdict
    except Absent as absent:
        verdict = meeting.blame(absent, reason)
        return meeting.end(verdict) if meeting.is_last() else verdict
    return meeting.end(Verdict(missing, len(seen), reason))


def _latest(reports: dict[int, dict[str, object]]) -> tuple[int, ...]:
    """Everybody reported in the end: the cause is whoever came to the operation after the others had given
    up.

    Those have waited much less than the longest wait. Where all waited alike, nobody can be named.
    """
    waits = {rank: float(str(report["seconds"])) for rank, report in reports.items() if report}
    longest = max(waits.values(), default=0.0)
    return tuple(sorted(rank for rank, seconds in waits.items() if seconds < longest / 2))
