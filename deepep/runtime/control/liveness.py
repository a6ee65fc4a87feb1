"""Detection of dead processes: only on the same host, only on Linux, never by
guessing.

It saves waiting for a deadline when there is nobody left to wait for.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

_PROC = Path("/proc")


def identity() -> str:
    """This process, for its peers: host boot, process id namespace, process id, start time.

    Empty if unknown.
    """
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(_PROC / "self/ns/pid")
        pid = os.getpid()
        return f"{boot} {namespace} {pid} {_start_time(pid)}"
    except OSError:
        return ""


def process_name() -> str:
    """This process, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_dead(theirs: str, mine: str) -> bool:
    """True if the process `theirs` is gone. False if it runs on another host, or nothing is known."""
    place = _place(theirs, mine)
    if place is None:
        return False
    pid, started = place
    try:
        return _start_time(pid) != started
    except OSError:
        return True


def is_gone(theirs: str, mine: str) -> bool:
    """True if the process `theirs` is gone with all its threads, unlike `is_dead`: one whose first thread has
    ended is a zombie before the others have let go of the device.
    """
    place = _place(theirs, mine)
    if place is None:
        return False
    pid, started = place
    try:
        fields = _fields(pid)
    except OSError:
        return True
    return int(fields[19]) != started or (fields[0] in "ZX" and int(fields[17]) <= 1)


def is_at_work_here(theirs: str) -> bool:
    """True if `theirs` is another process of this host, and lives. False elsewhere, or if unknown."""
    mine = identity()
    return theirs != mine and _place(theirs, mine) is not None and not is_dead(theirs, mine)


def _place(theirs: str, mine: str) -> tuple[int, int] | None:
    """Process id and start time, if the process runs where this one does."""
    if not theirs or not mine or theirs.split()[:2] != mine.split()[:2]:
        return None
    pid, started = (int(word) for word in theirs.split()[2:])
    return pid, started


def _fields(pid: int) -> list[str]:
    """/proc's words on a process, from its state on."""
    # Before them is the command's name, in parentheses, which may contain anything.
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _start_time(pid: int) -> int:
    """Clock ticks since boot at which a process started,
    so that a reused id is not taken for it; -1: a zombie.
    """
    fields = _fields(pid)
    return -1 if fields[0] in "ZX" else int(fields[19])
