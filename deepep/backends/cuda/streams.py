"""Streams of the CUDA backend: where an operation runs, and what torch has to know of it.

A call that waits (no event wanted, none given) has its kernel on the caller's own stream, where all order
is given: no events, nothing to record. Any other runs on the communication stream, between events. What it
reads is held until the caller's stream waits for it. What it makes belongs to the caller's stream and is held
as well, if nothing but the kernel runs there (`behind_caller`); else to the communication stream, and is
recorded on the caller's. Operations run in the order of the calls on whatever streams they are
(csrc/host/turns.hpp).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deepep.runtime import streams
from deepep.runtime.completion import Completion, HoldingCompletion
from deepep.runtime.requests import Schedule


class Fork(Protocol):
    """As much of a domain as streams need."""

    def follow(self, before: int, stream: int, /) -> None:
        """Has what `stream` gets from now on run after what the stream `before` holds now."""


class CommStream:
    """The operation runs on the communication stream, after `after` or what the caller's stream holds now.

    Inside, that is the current stream. Entering gives its address.
    """

    __slots__ = ("_after", "_fork", "_stream", "_switch")

    def __init__(self, stream: torch.cuda.Stream, fork: Fork, after: Completion | None) -> None:
        self._stream, self._fork, self._after = stream, fork, after
        self._switch = streams.switched(stream)

    def __enter__(self) -> int:
        address = self._stream.cuda_stream
        if self._after is None:
            self._fork.follow(streams.current_address(self._stream.device_index), address)
        self._switch.__enter__()
        if self._after is not None:
            self._after.current_stream_wait()
        return address

    def __exit__(self, *error: object) -> None:
        self._switch.__exit__()


def takes_callers_memory(schedule: Schedule) -> bool:
    """True if outputs can be made on the caller's stream: the operation comes behind all that this holds."""
    return schedule.after is None and not schedule.allocate_on_comm_stream


def behind_caller(comm: torch.cuda.Stream, fork: Fork) -> int:
    """The address of the communication stream, behind what the current stream holds now. That stays the
    current one: for launches by address alone.
    """
    address = comm.cuda_stream
    fork.follow(streams.current_address(comm.device_index), address)
    return address


def hand_out(
    comm: torch.cuda.Stream,
    users: streams.Users | None,
    schedule: Schedule,
    given: tuple[Tensor | None, ...],
    made: tuple[Tensor | None, ...],
) -> Completion | None:
    """After what ran on the communication stream: waits, or gives back the completion, which holds what was
    given. made: what belongs to the communication stream; it is recorded on the caller's. users: of the
    memory of the outputs, if torch does not know who reads it.
    """
    caller = streams.current(comm.device_index)
    if schedule.allocate_on_comm_stream:
        if users is not None:
            users.add_current()
    else:
        for tensor in made:
            if tensor is not None:
                tensor.record_stream(caller)
    done = torch.cuda.Event()
    done.record(comm)
    if schedule.asynchronous:
        return HoldingCompletion(done, comm, caller.cuda_stream, given)
    caller.wait_event(done)
    return None
