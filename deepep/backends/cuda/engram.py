"""Engram storage on CUDA: each rank's entries lie in memory that all ranks of the domain have mapped.

A write is a copy between two barriers of the communication streams, on which fetches run, too: so it waits
for those that were begun before, on all ranks. A fetch reads its peers' entries where they lie; its host
waits for the indices, to see which are whose. The entries lie in the GPUs' memory, whatever the name of
num_cpu_bytes says.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.mapped_area import MappedArea
from deepep.backends.cuda.streams import CommStream, hand_out
from deepep.errors import ArgumentError, ModeError, RangeError
from deepep.runtime.checks import flat_bytes
from deepep.runtime.completion import HostCompletion
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.engram import (
    EngramStore,
    Entries,
    check_entries,
    checked_indices,
    checked_storage,
    empty_scales,
    statement,
)
from deepep.runtime.requests import Operation, Schedule

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine


@dataclass(frozen=True)
class _Written:
    """The last write: entries of a rank, their length and dtype, the scales of all."""

    entries: int
    hidden: int
    dtype: torch.dtype
    sf: Tensor | None


class CudaEngram(EngramStore):
    """See `EngramStore`. When other ranks take part, the entries are to be written again."""

    def __init__(self, control: ControlPlane, engine: CudaEngine, turns: _cuda.Turns) -> None:
        self._control = control
        self.area = MappedArea(control, engine, turns, "Engram memory", Operation.ENGRAM_WRITE)
        self._written: _Written | None = None

    def write(self, storage: object, sf: object, num_bytes: int) -> None:
        control, area = self._control, self.area
        with control.issuing:
            try:
                where = control.session.device.type
                given, scales = checked_storage(storage, sf, control.num_ranks, where, num_bytes)
                area.check_not_captured(Operation.ENGRAM_WRITE)
            except ArgumentError as problem:
                control.refuse(Operation.ENGRAM_WRITE, problem, Schedule())
            control.barrier(Schedule(), statement(given, scales), Operation.ENGRAM_WRITE)
            self._written = None
            memory = area.memory if area.is_whole else None
            if memory is None:
                memory = area.build(num_bytes)
            comm, part = area.engine.comm, flat_bytes(given)
            with CommStream(comm, memory.endpoint, None) as stream:
                memory.barrier(stream)
                memory.own[: part.numel()].copy_(part, non_blocking=True)
                memory.barrier(stream)
                kept = None if scales is None else scales.detach().clone()
            hand_out(comm, None, Schedule(), (given, scales), ())
            self._written = _Written(given.shape[0], given.shape[1], given.dtype, kept)

    def fetch(self, indices: object, column_major: bool) -> Entries:
        area = self.area
        with self._control.issuing:
            area.raise_fault()
            memory, written = area.memory, self._written
            if memory is None or written is None:
                raise ModeError("engram_fetch", "a fetch", "one after engram_write, by the ranks there are")
            given = checked_indices(indices, self._control.session.device.type, column_major, written.sf)
            if torch.cuda.is_current_stream_capturing():
                raise ArgumentError("engram_fetch", "captured", "outside of a graph", self._control.rank)
            comm = area.engine.comm
            row_bytes = written.hidden * written.dtype.itemsize
            with CommStream(comm, memory.endpoint, None):
                data = torch.empty((given.numel(), row_bytes), dtype=torch.uint8, device=given.device)
                made = empty_scales(given, written.sf, column_major)
                wanted = given.detach().flatten().cpu().long()
                try:
                    check_entries(wanted, written.entries, self._control.membership.members, self._control)
                except RangeError as problem:
                    return Entries(data, made, _failed(problem))
                owners = wanted // written.entries
                for rank in owners.unique().tolist():
                    places = (owners == rank).nonzero().flatten()
                    table = memory.of(rank)[: written.entries * row_bytes].view(-1, row_bytes)
                    rows = table.index_select(0, (wanted[places] % written.entries).to(given.device))
                    data.index_copy_(0, places.to(given.device), rows)
                if made is not None and written.sf is not None:
                    made.copy_(written.sf[wanted.to(given.device)].view(made.shape))
            completion = hand_out(comm, None, Schedule(asynchronous=True), (given,), (data, made))
            assert completion is not None
            return Entries(data.view(written.dtype), made, completion)

    def memory(self) -> int:
        return self.area.num_bytes


def _failed(problem: RangeError) -> HostCompletion:
    """A completion that raises `problem`."""
    future: Future[None] = Future()
    future.set_exception(problem)
    return HostCompletion(future)
