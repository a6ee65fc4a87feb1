"""Keeper of a session on the wire: ends what is left of it when whoever started it lets go, or dies.

    python keeper.py SESSION < a pipe that only the starter writes to

A program of its own that imports nothing of the library: it has to be there before the first rank, and to
outlive a starter that is killed. A process of the session is known by LOOPVERBS_SESSION in its environment,
which its children inherit, whatever process groups they make.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

PATIENCE = 30.0  # seconds for processes to go once they were killed


def members(session: str) -> list[int]:
    """Processes of a session, those that have ended and not been waited for left out."""
    wanted, found = f"LOOPVERBS_SESSION={session}".encode(), []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if wanted in file.read().split(b"\0"):
                found.append(int(name))
    return found


def sweep(session: str) -> None:
    """Kills all processes of a session, also those that they start meanwhile; removes its shared memory."""
    end, clean = time.monotonic() + PATIENCE, 0
    while clean < 2 and time.monotonic() < end:
        left = members(session)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        clean = 0 if left else clean + 1
        time.sleep(0.01)
    own = f"loopverbs.{session}"  # the wire's, and with a dot behind it that of each host
    for name in os.listdir("/dev/shm"):
        if name == own or name.startswith(f"{own}."):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/{name}")


if __name__ == "__main__":
    sys.stdin.buffer.read(1)  # a byte: the starter lets go; the end: it is gone
    sweep(sys.argv[1])
