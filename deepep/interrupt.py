"""Ctrl-C while `python -m deepep` imports this package, for seconds: the process ends by the signal, as
other programs do, and not with a traceback of torch's.

Imported by deepep itself before anything else. Changes nothing in a program that imports deepep.
"""

from __future__ import annotations

import signal
import sys
import threading

_is_program = sys.argv[:1] == ["-m"] and "deepep" in sys.orig_argv  # runpy imports packages of what it runs
_is_ours = (
    _is_program
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _is_ours:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """Has Ctrl-C raise KeyboardInterrupt from now on, as everywhere in Python."""
    if _is_ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
