"""Detection of dead processes: only on the same host, only on Linux, never by
guessing.

It saves waiting for a deadline when there is nobody left to wait for.
"""

from __future__ import annotations

import os
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


def is_dead(theirs: str, mine: str) -> bool:
    """True if the process `theirs` is gone. False if it runs on another host, or nothing is known."""
    if not theirs or not mine or theirs.split()[:2] != mine.split()[:2]:
        return False
    pid, started = (int(word) for word in theirs.split()[2:])
    try:
        return _start_time(pid) != started
    except OSError:
        return True


def _start_time(pid: int) -> int:
    """Clock ticks since boot at which a process started,
    so that a reused id is not taken for it; -1: a zombie.
    """
    # Fields after the command's name, which is in parentheses and may contain anything.
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return -1 if fields[0] in "ZX" else int(fields[19])
