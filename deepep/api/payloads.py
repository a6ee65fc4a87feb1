"""Opaque payloads: a dispatch of several tensors a row, of any dtypes, as the bytes that they are.

A dispatch moves a row of bytes, and 4-byte scales beside it. So the longest tensor goes as the row, where it
lies, if its rows are whole 16 bytes; all others go as scales: one alone where it lies, if its rows are whole
4 bytes, several in one copy. NVFP4 and MXFP8 with their scales are not copied at all. Where no tensor will
do as a row, all are copied into one. What is received is views of that: no pass over it.

All ranks pass the same dtypes and row shapes, or all raise MismatchError: a number for them stands among what
ranks compare, hosts in their headers (reference, emulator), CUDA's kernels in their digest.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepep.api.packed_rows import PackedRows
from deepep.errors import ArgumentError, ArgumentTypeError, DeviceError, ShapeError
from deepep.events import EventHandle, EventOverlap
from deepep.runtime import checks
from deepep.runtime.checks import MOST, ROW_ALIGNMENT
from deepep.runtime.completion import Completion
from deepep.runtime.engine import Engine
from deepep.runtime.requests import Operation, Schedule

ITEM_BYTES = (1, 2, 4)
WORD = 4

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Field:
    """A tensor's part of a packed row: where it begins, in bytes, and what it is made into again."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, rows: Tensor) -> Tensor:
        """[N, *shape] of rows [N, bytes] uint8: a view."""
        part = rows[:, self.begin : self.begin + self.num_bytes].view(self.dtype)
        return part.view(len(rows), *self.shape)


@dataclass(frozen=True)
class PayloadForm:
    """Arrangement of a list of tensors in a row, by dtypes and row shapes alone: all ranks find the same.

    main: the number of the tensor that goes as the row; None: all in one. fields: of each tensor.
    num_bytes: of what is packed, the row or what goes as scales.
    """

    main: int | None
    fields: tuple[_Field, ...]
    num_bytes: int

    @classmethod
    def of(cls, kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> PayloadForm:
        """The form of tensors of these dtypes and row shapes."""
        fields = [_Field(dtype, shape) for dtype, shape in kinds]
        longest = max(range(len(fields)), key=lambda i: (fields[i].num_bytes, -i))
        main = longest if fields[longest].num_bytes % ROW_ALIGNMENT == 0 else None
        end = 0
        for number, field in enumerate(fields):
            if number != main:
                fields[number] = _Field(field.dtype, field.shape, end)
                end += -(-field.num_bytes // WORD) * WORD
        if main is None:
            end = -(-end // ROW_ALIGNMENT) * ROW_ALIGNMENT
        return cls(main, tuple(fields), end)

    def number(self) -> int:
        """A number for dtypes and row shapes, of 32 bits, not 0."""
        text = repr([(str(field.dtype), field.shape) for field in self.fields])
        return zlib.crc32(text.encode()) or 1

    def rest(self) -> list[int]:
        """Numbers of the tensors that are packed."""
        return [number for number in range(len(self.fields)) if number != self.main]

    def unpack(self, received: Any) -> list[Tensor]:
        """The tensors of received rows, or of (rows, scales)."""
        rows, scales = received if isinstance(received, tuple) else (received, None)
        whole = rows.view(torch.uint8)
        packed = whole if self.main is None else None if scales is None else scales.view(torch.uint8)
        found = []
        for number, field in enumerate(self.fields):
            source = whole if number == self.main else packed
            assert source is not None
            found.append(field.of(source))
        return found


def form_of(tensors: list[Any], device_type: str) -> PayloadForm:
    """The form of a list. Raises ArgumentTypeError, ShapeError or DeviceError for what cannot travel."""
    if not tensors:
        raise ShapeError("x", "an empty list", "a list of tensors [T, ..]")
    kinds = []
    for number, tensor in enumerate(tensors):
        name = f"x[{number}]"
        checks.check_memory(name, tensor)
        if tensor.is_quantized or tensor.dtype.itemsize not in ITEM_BYTES:
            got = str(tensor.dtype).removeprefix("torch.")
            raise ArgumentTypeError(name, got, "a dtype of 1, 2 or 4 bytes an element")
        if tensor.device.type != device_type:
            raise DeviceError(name, str(tensor.device), f"{device_type}, the buffer's device")
        if tensor.ndim == 0 or not math.prod(tensor.shape[1:]) or tensor.shape[0] != tensors[0].shape[0]:
            allowed = f"[{tensors[0].shape[0] if tensors[0].ndim else 'T'}, ..], rows of a byte at least"
            raise ShapeError(name, str(list(tensor.shape)), allowed)
        kinds.append((tensor.dtype, tuple(tensor.shape[1:])))
    if sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds) > MOST:
        raise ShapeError("x", "rows of more than 2 GiB", "shorter ones")
    return PayloadForm.of(kinds)


def pack(
    form: PayloadForm, tensors: list[Tensor], engine: Engine, schedule: Schedule
) -> tuple[PackedRows, Completion | None]:
    """The tensors as an engine dispatches them, and the end of the copies, if it is to be waited for."""
    given = [tensor.detach() for tensor in tensors]
    rest, main = form.rest(), None if form.main is None else given[form.main]
    copies = rest
    straight: Tensor | None = None
    is_word = len(rest) == 1 and form.fields[rest[0]].num_bytes % WORD == 0
    if main is not None and is_word and _lies_in_words(given[rest[0]]):
        straight, copies = _as_bytes(given[rest[0]]), []
    must_copy = main is not None and not _lies_in_rows(main)
    if not copies and not must_copy:
        return _handed(form, main, straight), None
    num_rows, device = len(given[0]), given[0].device

    def make() -> tuple[Tensor | None, Tensor | None]:
        def room(num_bytes: int) -> Tensor:
            return torch.empty((num_rows, num_bytes), dtype=torch.uint8, device=device)

        packed = room(form.num_bytes) if copies else None
        if form.main is not None and must_copy:
            return room(form.fields[form.main].num_bytes), packed
        return None, packed

    def fill(made: tuple[Tensor | None, Tensor | None]) -> None:
        row, packed = made
        if row is not None and main is not None:
            row.copy_(_as_bytes(main.contiguous()))
        if packed is not None:
            packed.zero_()  # gaps, too: the same bits for the same inputs
            for number in copies:
                field = form.fields[number]
                part = packed[:, field.begin : field.begin + field.num_bytes]
                part.copy_(_as_bytes(given[number].contiguous()))

    later = schedule.after is not None or schedule.asynchronous
    turn = Schedule(schedule.after, asynchronous=True) if later else Schedule()
    (row, packed), completion = engine.locally(make, fill, given, turn)
    return _handed(form, main if row is None else row, straight if packed is None else packed), completion


def send(
    method: Callable[..., _Result],
    arguments: Mapping[str, Any],
    schedule_of: Callable[..., Schedule],
    asynchronous: object,
) -> _Result:
    """`method`, a buffer's dispatch, of a list. arguments: all of it by name, `self` as well.

    schedule_of: makes previous_event, asynchronous and allocate_on_comm_stream a schedule, or raises.
    """
    given = dict(arguments)
    owner, tensors = given["self"], given["x"]
    owner._check_alive()
    engine: Engine = owner._engine
    try:
        schedule = schedule_of(given["previous_event"], asynchronous, given["allocate_on_comm_stream"])
        if given.get("use_tma_aligned_col_major_sf", False) is not False:
            got = "True, with a list of tensors"
            raise ArgumentError(
                "use_tma_aligned_col_major_sf", got, "False: none of them is known for scales"
            )
        form = form_of(tensors, engine.info.options.device.type)
    except BaseException as error:
        owner._refuse(Operation.DISPATCH, error, Schedule(asynchronous=asynchronous is True))
    given["x"], packed = pack(form, tensors, engine, schedule)
    if packed is not None:
        given["previous_event"] = EventOverlap(EventHandle(packed))
    result: Any = method(**given)
    return result._replace(recv_x=form.unpack(result.recv_x))


def _handed(form: PayloadForm, main: Tensor | None, packed: Tensor | None) -> PackedRows:
    """(rows of bytes, the rest as words), or all as rows of a dtype that an engine takes alone."""
    if main is None:
        assert packed is not None
        return PackedRows.of(packed.view(torch.bfloat16), None, form.number())
    row = _as_bytes(main)
    if packed is None:
        return PackedRows.of(row.view(torch.bfloat16), None, form.number())
    return PackedRows.of(row, packed.view(torch.int32), form.number())


def _as_bytes(tensor: Tensor) -> Tensor:
    """[T, bytes] of a contiguous tensor: a view."""
    size = math.prod(tensor.shape[1:])
    return tensor.view(len(tensor), size).view(torch.uint8)


def _lies_in_rows(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % ROW_ALIGNMENT == 0


def _lies_in_words(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % WORD == 0
