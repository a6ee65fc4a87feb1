"""The parent's end of one rank process: starting it, sending to it, noticing its end, finding it hanging."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from deepep.sim.worlds.outcomes import Outcome, Status
from deepep.sim.worlds.rank_process import BareException, RankSpec, main
from deepep.sim.worlds.travel import unpack

#: Worlds may be started from several threads; what surrounds a start concerns the whole process.
_starting = threading.Lock()

PRELOADED = ["deepep.sim.worlds.preloaded"]
"""Modules that the fork server imports, until it starts with the first rank."""


class RankHandle:
    """One rank process of a world, as its parent sees it."""

    def __init__(self, spec: RankSpec) -> None:
        self.rank = spec.rank
        self._stack_file = Path(spec.stack_file)
        self.connection, theirs = multiprocessing.Pipe()
        # Nothing is ever written to it: its end shows a rank, wherever it is, that its parent is gone.
        lifeline, self._lifeline = multiprocessing.Pipe(duplex=False)
        self.process = start_process(main, (theirs, lifeline, spec), f"deepep-rank-{spec.rank}")
        theirs.close()
        lifeline.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def send(self, message: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # a dead rank is reported by `receive`
            self.connection.send_bytes(message)

    def receive(self, seconds: float) -> Outcome:
        """The rank's message; if it sent nothing and its end is closed, how its process ended."""
        with suppress(EOFError, ConnectionResetError):
            if self.connection.poll():
                return unpack_outcome(self.connection.recv_bytes(), self.rank, seconds)
        self.process.join(5.0)
        code = self.process.exitcode
        crashed = code is not None and code < 0
        stack = self._written_stack() if crashed else ""
        return Outcome(self.rank, Status.DIED, traceback=stack, exitcode=code, seconds=seconds)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # a kill of the dead is done, a stop changes nothing
            os.kill(self.pid, number)

    def stack(self) -> str:
        """The Python stack the rank is in, written by its own signal handler; empty if it does not answer."""
        if not self.alive:
            return ""
        self.signal(signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        text = ""
        while time.monotonic() < deadline:
            text = self._written_stack()
            if text.endswith("\n") and "File" in text:
                break
            time.sleep(0.01)
        frames = text.splitlines()
        own = [i for i, line in enumerate(frames) if "rank_process.py" in line]
        return "\n".join(frames[: own[0]] if own else frames)

    def _written_stack(self) -> str:
        return self._stack_file.read_text() if self._stack_file.exists() else ""

    def forked(self) -> None:
        """In a child of the parent, which is to end nobody: multiprocessing would, when it ends."""
        with suppress(AttributeError):
            multiprocessing.process._children.discard(self.process)  # type: ignore[attr-defined]
        self._lifeline.close()

    def end(self) -> None:
        if self.alive:
            self.process.kill()
        self.process.join()
        self.connection.close()
        self._lifeline.close()
        self.process.close()


def unpack_outcome(reply: bytes, rank: int, seconds: float) -> Outcome:
    """The outcome in a rank's reply."""
    kind, value, trace = unpack(reply)
    if isinstance(value, BareException):
        value = value.rebuild()
    if kind == "returned":
        return Outcome(rank, Status.RETURNED, value=value, seconds=seconds)
    return Outcome(rank, Status.RAISED, error=value, traceback=trace, seconds=seconds)


def start_process(target: Callable[..., None], arguments: tuple[Any, ...], name: str) -> BaseProcess:
    """A process that the fork server starts, and which ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments, name=name, daemon=True)
    with _starting, _hidden_main(), _quiet_torch(), _uninterrupted():
        process.start()
    return process


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C is for this process alone: the fork server, whom it would end while it imports, and what it
    forks begin with the signal blocked. Here it arrives afterwards.
    """
    resource_tracker.ensure_running()  # else its start, inside, would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Ranks do not log the transport's warnings: a dead peer is what fault tests are about.

    torch reads the level when it is loaded: in the fork server, which starts with the first rank.
    """
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        if level is None:
            del os.environ["TORCH_CPP_LOG_LEVEL"]


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keeps multiprocessing from importing the caller's main script in every rank.

    Functions travel by value, so no rank needs it; and a script without the `if __name__ == "__main__"`
    guard would run again in every rank.
    """
    real = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = real
