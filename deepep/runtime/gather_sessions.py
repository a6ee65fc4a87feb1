"""All-gathers in sessions: places in the memory that they share, what is refused, and what a backend adds.

A session is a stretch of calls whose gathered tensors lie in memory that the next session uses again. All
ranks make the same calls in it, so a tensor has the same place on each of them, and nothing about places
travels. What a session gathered is good until this rank begins the next one: that waits for all ranks.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepep.errors import (
    ArgumentError,
    ArgumentTypeError,
    CapacityError,
    DeviceError,
    LayoutError,
    ModeError,
    RangeError,
)
from deepep.runtime.checks import MOST, check_int, check_memory, shape_text
from deepep.runtime.completion import Completion
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.requests import Operation, Schedule

ALIGNMENT = 128
"""Bytes: where gathered tensors begin."""
LARGEST = 1 << 40
"""Bytes of a session, at most."""
Shape = tuple[int, ...]


def gathered_bytes(num_ranks: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes that the tensor gathered of one of `shape` from each rank takes of a session."""
    return -(-num_ranks * math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Gathered:
    """A place in a session's memory. begin: in bytes. shape, dtype: of one rank's part.

    whole: [R, *shape], all ranks' parts.
    """

    begin: int
    shape: Shape
    dtype: torch.dtype
    whole: Tensor

    def is_part(self, t: Tensor, rank: int) -> bool:
        """True if `t` is the part of `rank`."""
        part = self.whole[rank]
        return t.data_ptr() == part.data_ptr() and t.shape == part.shape and t.dtype == part.dtype


class GatherSession:
    """Places of one session, handed out in the order of the calls. memory: uint8 [num_bytes]."""

    def __init__(self, rank: int, num_ranks: int, memory: Tensor, num_gathers: int) -> None:
        self.rank, self.num_ranks, self.memory, self.num_gathers = rank, num_ranks, memory, num_gathers
        self.used = self.calls = 0
        self.places: list[str] = []
        """Of each gather, what all ranks have to pass alike."""
        self._reserved: list[Gathered] = []

    def reserve(self, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """This rank's parts of tensors that will be gathered, to be filled where they lie."""
        made = self._take([(shape, dtype) for shape in shapes])
        self._reserved += made
        return [place.whole[self.rank] for place in made]

    def place(self, tensors: Sequence[Tensor]) -> list[Gathered]:
        """Places for a gather of these; reserved ones are used, and gathered once."""
        if self.calls == self.num_gathers:
            got, allowed = f"call {self.calls + 1} of a session", f"at most {self.num_gathers}, as configured"
            raise CapacityError("all_gather", got, allowed)
        reserved = [self._find(t) for t in tensors]
        known = [place.begin for place in reserved if place is not None]
        if len(set(known)) < len(known):
            raise ArgumentError("t", "an in-place tensor twice", "each once")
        others = [(tuple(t.shape), t.dtype) for t, at in zip(tensors, reserved, strict=True) if at is None]
        fresh = iter(self._take(others))
        placed = [next(fresh) if place is None else place for place in reserved]
        self._reserved = [place for place in self._reserved if place.begin not in known]
        self.calls += 1
        self.places.append(str([(place.begin, place.shape, str(place.dtype)) for place in placed]))
        return placed

    def _find(self, t: Tensor) -> Gathered | None:
        if t.numel() == 0:
            return None
        return next((place for place in self._reserved if place.is_part(t, self.rank)), None)

    def _take(self, parts: Sequence[tuple[Shape, torch.dtype]]) -> list[Gathered]:
        sizes = [gathered_bytes(self.num_ranks, *part) for part in parts]
        if self.used + sum(sizes) > self.memory.numel():
            got = f"{self.used + sum(sizes)} bytes of a session"
            raise CapacityError("t", got, f"at most {self.memory.numel()}, as configured")
        made = []
        for (shape, dtype), size in zip(parts, sizes, strict=True):
            num_bytes = self.num_ranks * math.prod(shape) * dtype.itemsize
            stretch = self.memory[self.used : self.used + num_bytes]
            made.append(Gathered(self.used, shape, dtype, stretch.view(dtype).view(self.num_ranks, *shape)))
            self.used += size
        return made


class GatherSessions(ABC):
    """All-gathers of one engine. All ranks make the same calls; what one refuses, all do.

    num_bytes, num_gathers: of a session; 0 until they are configured. number: of sessions begun.
    """

    def __init__(self, control: ControlPlane) -> None:
        self._control = control
        self.num_bytes = self.num_gathers = self.number = 0
        self.session: GatherSession | None = None

    def set_config(self, num_bytes: object, num_gathers: object) -> None:
        """Sizes of the sessions to come, the same on all ranks; a barrier. Outside of a session."""
        operation = Operation.AGRS_SET_CONFIG
        with self._control.issuing:
            with self._refusing(operation):
                size = check_int("num_max_session_bytes", num_bytes, 1, LARGEST)
                calls = check_int("num_max_all_gathers_per_session", num_gathers, 1, MOST)
                self._check_outside(operation)
            self._configure(size, calls)
            self.num_bytes, self.num_gathers = size, calls

    def begin(self) -> None:
        """Begins a session, once all ranks have come to it: what the last one gathered is good until now."""
        operation = Operation.CREATE_AGRS_SESSION
        with self._control.issuing:
            with self._refusing(operation):
                if not self.num_bytes:
                    raise ModeError(operation.label, "a session", "one after agrs_set_config")
                self._check_outside(operation)
            memory = self._begin(self.number + 1)
            self.number += 1
            control = self._control
            self.session = GatherSession(control.rank, control.num_ranks, memory, self.num_gathers)

    def end(self) -> None:
        """Ends the session, once its gathers have ended on all ranks."""
        operation = Operation.DESTROY_AGRS_SESSION
        with self._control.issuing:
            with self._refusing(operation):
                session = self._present(operation)
            self.session = None
            self._end(session)

    def drop(self) -> None:
        """Ends the session here, without the other ranks: something was raised in it."""
        with self._control.issuing:
            self.session = None

    def reserve(self, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """`GatherSession.reserve`, in the present session. Communicates nothing: what is refused, and what
        other ranks do not reserve, is found in the next gather.
        """
        with self._control.issuing:
            return self._present(Operation.ALL_GATHER).reserve(shapes, dtype)

    def gather(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Completion]:
        """Begins to gather; the tensors [R, ...] that all ranks' will be in, and the end of it."""
        with self._control.issuing:
            try:
                session = self._present(Operation.ALL_GATHER)
                if not tensors:
                    raise ArgumentTypeError("t", "no tensor", "a tensor, or a sequence of them")
                for t in tensors:
                    _check_gathered(t, self._control.session.device.type)
                places = session.place(tensors)
            except ArgumentError as problem:
                self._refuse_gather(problem)
                raise
            return [place.whole for place in places], self._gather(session, tensors, places)

    # a backend's part

    @abstractmethod
    def release(self) -> None:
        """Lets go of the memory, if there is no session; the next one makes it again."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes that sessions hold."""

    @abstractmethod
    def _configure(self, num_bytes: int, num_gathers: int) -> None:
        """Compares the sizes with the other ranks'; a barrier."""

    @abstractmethod
    def _begin(self, number: int) -> Tensor:
        """The memory of session `number`, uint8 [num_bytes], which no rank uses any more."""

    @abstractmethod
    def _end(self, session: GatherSession) -> None:
        """Waits for the gathers of all ranks, and compares what they were."""

    @abstractmethod
    def _gather(
        self, session: GatherSession, tensors: Sequence[Tensor], places: Sequence[Gathered]
    ) -> Completion:
        """Brings every rank's tensors to every rank's places."""

    def _refuse_gather(self, problem: ArgumentError) -> None:
        """Takes part in a gather only to say that this rank cannot."""
        self._control.refuse(Operation.ALL_GATHER, problem, Schedule())

    # refusals

    @contextlib.contextmanager
    def _refusing(self, operation: Operation) -> Iterator[None]:
        try:
            yield
        except ArgumentError as problem:
            self._control.refuse(operation, problem, Schedule())

    def _present(self, operation: Operation) -> GatherSession:
        if self.session is None:
            raise ModeError(operation.label, "a call outside of a session", "one inside: create_agrs_session")
        return self.session

    def _check_outside(self, operation: Operation) -> None:
        if self.session is not None:
            raise ModeError(operation.label, "a call inside of a session", "one after destroy_agrs_session")


def _check_gathered(t: object, device_type: str) -> None:
    check_memory("t", t)
    assert isinstance(t, Tensor)
    if t.device.type != device_type:
        raise DeviceError("t", str(t.device), f"{device_type}, the buffer's device")
    if not t.is_contiguous():
        raise LayoutError("t", f"strides {shape_text(t.stride())}", "a contiguous tensor")


def checked_shapes(shapes: object) -> tuple[list[Shape], bool]:
    """One shape, or several, as tuples; and whether several were given. Raises ArgumentTypeError."""
    if not isinstance(shapes, Sequence) or isinstance(shapes, str):
        raise ArgumentTypeError("shapes", type(shapes).__name__, "a shape, or a sequence of them")
    several = len(shapes) > 0 and not isinstance(shapes[0], int)
    found = []
    for shape in shapes if several else (shapes,):
        if not isinstance(shape, Sequence) or isinstance(shape, str):
            raise ArgumentTypeError("shapes", type(shape).__name__, "a sequence of integers")
        found.append(tuple(check_int("shapes", size, 0, MOST) for size in shape))
    return found, several


def check_dtype(dtype: object) -> torch.dtype:
    """A torch dtype. Raises ArgumentTypeError."""
    if not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError("dtype", type(dtype).__name__, "a torch.dtype")
    return dtype


def check_session_bytes(num_bytes: int) -> int:
    """A session's size. Raises RangeError."""
    if num_bytes > LARGEST:
        raise RangeError("shapes", f"{num_bytes} bytes", f"at most {LARGEST}")
    return num_bytes
