"""Runs a test's code on the CUDA backend's stubs, in a process of its own: they replace parts of torch there.

The process is forked by the server that worlds of ranks have, which has torch and deepep loaded: importing
them takes longer than such a test.
"""

from __future__ import annotations

import multiprocessing
import os
import textwrap
import traceback
from multiprocessing.connection import Connection

from deepep.sim.worlds.rank_handle import start_process

HANG = 120.0
"""Seconds after which a test is taken to hang."""


def on_stubs(start: str, test: str, symmetric_bytes: int = 64 << 20) -> None:
    """Runs `start`, and the indented lines of `test` after it. Raises AssertionError, with the traceback of
    what was raised there: its assertions are the test's.
    """
    mine, theirs = multiprocessing.Pipe(duplex=False)
    code = f"{start}\n{textwrap.dedent(test)}"
    process = start_process(_play, (theirs, code, {"DEEPEP_SYMMETRIC_BYTES": str(symmetric_bytes)}), "stubs")
    theirs.close()
    try:
        problem = mine.recv() if mine.poll(HANG) else "it hangs"
    except EOFError:
        process.join()
        problem = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        process.close()
        mine.close()
    assert not problem, problem


def _play(connection: Connection, code: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    problem = ""
    try:
        exec(compile(code, "a test on stubs", "exec"), {"__name__": "a test on stubs"})
    except BaseException:  # the parent says it
        numbered = "".join(f"{i:3} {line}\n" for i, line in enumerate(code.splitlines(), 1))
        problem = f"{numbered}\n{traceback.format_exc()}"
    connection.send(problem)
