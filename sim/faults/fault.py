"""Faults: what goes wrong on one rank, at one of its calls, while the others do as they should.

`FaultyBuffer` stands in front of a `deepep.Buffer` and lets a `Fault` happen: the rank is delayed, stalls
(the whole process is frozen), is killed, leaves out a call or makes one twice (so that its clock of calls is
off), or passes other arguments than its peers. A fault strikes before a call or, with `phase`, inside of it,
when the library enters that phase.
"""

from __future__ import annotations

import enum
import inspect
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepep.sim.cases.case import Case
from deepep.sim.cases.choices import Choices

#: Operation -> the phases that it goes through on every rank.
PHASES: dict[str, tuple[str, ...]] = {
    "dispatch": ("control", "payload"),
    "combine": ("control", "payload"),
    "low_latency_dispatch": ("control", "send", "receive"),
    "low_latency_combine": ("control", "send", "receive"),
}


class Effect(str, enum.Enum):
    """The kinds of fault."""

    DELAY = "delay"
    STALL = "stall"
    KILL = "kill"
    SKIP = "skip"
    REPEAT = "repeat"
    CHANGE = "change"


@dataclass(frozen=True)
class Change:
    """Another argument for an operation, and what every rank is to raise because of it."""

    operation: str
    apply: Callable[[dict[str, Any]], dict[str, Any]]
    error: str


def _other_rows(arguments: dict[str, Any]) -> dict[str, Any]:
    rows = arguments["x"]
    narrow = (rows[0] if isinstance(rows, tuple) else rows)[..., :16].contiguous()
    return {**arguments, "x": (narrow, rows[1]) if isinstance(rows, tuple) else narrow}


CHANGES: dict[str, Change] = {
    "narrower rows": Change("dispatch", _other_rows, "MismatchError"),
    "a higher maximum of tokens": Change(
        "low_latency_dispatch",
        lambda a: {
            **a,
            "num_max_dispatch_tokens_per_rank": a["num_max_dispatch_tokens_per_rank"] + 1,
        },
        "MismatchError",
    ),
    "an alignment of zero": Change("dispatch", lambda a: {**a, "expert_alignment": 0}, "RangeError"),
    "indices in floating point": Change(
        "low_latency_dispatch", lambda a: {**a, "topk_idx": a["topk_idx"].float()}, "ArgumentTypeError"
    ),
    "weights in double precision": Change(
        "low_latency_combine",
        lambda a: {**a, "topk_weights": a["topk_weights"].double()},
        "ArgumentTypeError",
    ),
}


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        effect: what.
        rank: on which rank.
        call: at which of its collective calls, counted from 0 over all examples.
        phase: inside the call, as this phase is entered; empty: before the call.
        seconds: of a delay.
        change: of CHANGE: a key of CHANGES.
    """

    effect: Effect
    rank: int
    call: int
    phase: str = ""
    seconds: float = 0.0
    change: str = ""

    def strike(self) -> None:
        """Delays, stalls or ends this process."""
        if self.effect is Effect.DELAY:
            time.sleep(self.seconds)
        elif self.effect is Effect.STALL:
            freeze_process()
        elif self.effect is Effect.KILL:
            os.kill(os.getpid(), signal.SIGKILL)


def freeze_process() -> None:
    """Stops this process until it is continued, before the calling thread does anything else.

    A signal to the process would be the first thread's: until that one has its turn on a processor, the
    calling thread runs on, and with it a call that was to be stopped in its middle.
    """
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


class LeftOut(Exception):
    """The call was left out, as the fault says: the rank goes on with its next example."""


class FaultyBuffer:
    """A buffer whose rank a fault befalls. Everything else passes through."""

    def __init__(self, buffer: Any, fault: Fault | None) -> None:
        self._buffer = buffer
        self._fault = fault
        self._calls = 0
        self._inside = False
        #: When the operation that was called last began, by time.monotonic().
        self.last_call_began = time.monotonic()
        if fault is not None and fault.phase:
            buffer.runtime.observe(self._entered)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._buffer, name)
        if name not in PHASES:
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, attribute, args, kwargs)

        return call

    def _call(self, name: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        fault = self._fault
        here = fault is not None and self._calls == fault.call
        self._calls += 1
        self._inside = here
        self.last_call_began = time.monotonic()
        if not here or fault is None or fault.phase:
            return method(*args, **kwargs)
        if fault.effect is Effect.SKIP:
            raise LeftOut(name)
        if fault.effect is Effect.REPEAT:
            method(*args, **kwargs)
        if fault.effect is Effect.CHANGE:
            bound = inspect.signature(method).bind(*args, **kwargs)
            return method(**CHANGES[fault.change].apply(dict(bound.arguments)))
        fault.strike()
        return method(*args, **kwargs)

    def _entered(self, operation: str, phase: str) -> None:
        if self._inside and self._fault is not None and phase == self._fault.phase:
            self._inside = False
            self._fault.strike()


def calls_of(case: Case) -> list[str]:
    """The collective operations that an example of Buffer makes, in order."""
    if case.options.mode == "ll":
        return ["low_latency_dispatch", "low_latency_combine"]
    return ["dispatch", "dispatch", "combine"] if case.options.cached else ["dispatch", "combine"]


def draw_fault(choices: Choices, cases: list[Case], *, timeout: float) -> Fault:
    """A fault for these examples, whose ranks wait for each other for `timeout` seconds."""
    calls = [name for case in cases for name in calls_of(case)]
    rank = choices.integer(0, cases[0].num_ranks - 1)
    effect = choices.pick(tuple(Effect))
    if effect is Effect.CHANGE:
        fitting = [name for name, change in CHANGES.items() if change.operation in calls]
        name = choices.pick(fitting)
        # The first such call: one by handle takes other arguments.
        return Fault(effect, rank, calls.index(CHANGES[name].operation), change=name)
    call = choices.integer(0, len(calls) - 1)
    phase = ""
    if effect in (Effect.DELAY, Effect.STALL, Effect.KILL) and choices.flag():
        phase = choices.pick(PHASES[calls[call]])
    seconds = timeout * choices.pick((0.1, 0.4)) if effect is Effect.DELAY else 0.0
    return Fault(effect, rank, call, phase, seconds)
