"""Engram storage as the reference has it: every rank keeps all entries, so that a fetch asks nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.errors import ArgumentError, ModeError
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.transport import Link
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


class ReferenceEngram(EngramStore):
    """See `EngramStore`. Entries of ranks that are left out cannot be fetched."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control
        self._table: Tensor | None = None
        self._sf: Tensor | None = None
        self._entries, self._owners = 0, frozenset[int]()

    def write(self, storage: object, sf: object, num_bytes: int) -> None:
        control = self._control
        with control.issuing:
            try:
                given, scales = checked_storage(
                    storage, sf, control.num_ranks, control.session.device.type, num_bytes
                )
            except ArgumentError as problem:
                control.refuse(Operation.ENGRAM_WRITE, problem, Schedule())
            given = given.detach()
            table = given.new_empty(control.num_ranks, *given.shape)
            kept = None if scales is None else scales.detach().clone()

            def body(link: Link, limits: dict[int, int]) -> None:
                control.enter("rows")
                for rank, raw in link.all_gather(given.view(torch.uint8)).items():
                    table[rank].view(torch.uint8).copy_(raw)
                self._table, self._sf = table.view(-1, given.shape[1]), kept
                self._entries, self._owners = given.shape[0], frozenset(link.members)

            tensors = (given, table, kept)
            control.perform(
                Operation.ENGRAM_WRITE, Schedule(), body, agreed=statement(given, scales), tensors=tensors
            ).current_stream_wait()

    def fetch(self, indices: object, column_major: bool) -> Entries:
        control = self._control
        with control.issuing:
            if self._table is None:
                raise ModeError("engram_fetch", "a fetch", "one after engram_write")
            table, scales, entries, owners = self._table, self._sf, self._entries, self._owners
            given = checked_indices(indices, control.session.device.type, column_major, scales)
            data = table.new_empty(given.numel(), table.shape[1])
            made = empty_scales(given, scales, column_major)

            def job() -> None:
                places = given.flatten().long()
                check_entries(places.cpu(), entries, owners, control)
                data.view(torch.uint8).copy_(table.view(torch.uint8)[places])
                if made is not None and scales is not None:
                    made.copy_(scales[places].view(made.shape))

            completion = control.locally(job, Schedule(asynchronous=True), (given, table, data, made))
            return Entries(data, made, completion)

    def memory(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._table, self._sf) if t is not None)
