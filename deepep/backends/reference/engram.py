"""Engram storage as the reference has it: every rank keeps all entries, so that a fetch asks nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep.errors import ArgumentError, ModeError, RangeError
from deepep.runtime.control.agreement import dtype_code
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.control.transport import Link
from deepep.runtime.elastic import columns
from deepep.runtime.engine import Engine
from deepep.runtime.engram import EngramStore, Entries, checked_indices, checked_storage
from deepep.runtime.requests import Operation, Schedule


class ReferenceEngram(EngramStore):
    """See `EngramStore`. Entries of ranks that are left out cannot be fetched."""

    def __init__(self, engine: Engine, control: ControlPlane) -> None:
        self._engine, self._control = engine, control
        self._table: Tensor | None = None
        self._sf: Tensor | None = None
        self._entries, self._owners = 0, frozenset[int]()

    def write(self, storage: object, sf: object, num_bytes: int) -> None:
        control, info = self._control, self._engine.info
        with control.issuing:
            try:
                given, scales = checked_storage(storage, sf, info.num_ranks, info.device_type, num_bytes)
            except ArgumentError as problem:
                self._engine.refuse(Operation.ENGRAM_WRITE, problem, Schedule())
            given = given.detach()
            agreed = {
                "storage.dtype": dtype_code(given.dtype),
                "storage.shape[0]": given.shape[0],
                "storage.shape[1]": given.shape[1],
                "sf.dtype": dtype_code(None if scales is None else scales.dtype),
                "sf.shape[1]": 0 if scales is None else scales.shape[1],
            }
            table = given.new_empty(info.num_ranks, *given.shape)
            kept = None if scales is None else scales.detach().clone()

            def body(link: Link, limits: dict[int, int]) -> None:
                control.enter("rows")
                for rank, raw in link.all_gather(given.view(torch.uint8)).items():
                    table[rank].view(torch.uint8).copy_(raw)
                self._table, self._sf = table.view(-1, given.shape[1]), kept
                self._entries, self._owners = given.shape[0], frozenset(link.members)

            tensors = (given, table, kept)
            control.perform(
                Operation.ENGRAM_WRITE, Schedule(), body, agreed=agreed, tensors=tensors
            ).current_stream_wait()

    def fetch(self, indices: object, column_major: bool) -> Entries:
        with self._control.issuing:
            if self._table is None:
                raise ModeError("engram_fetch", "a fetch", "one after engram_write")
            given = checked_indices(indices, self._engine.info.device_type).detach()
            if column_major and self._sf is None:
                got = "True, and storage without scales"
                raise ArgumentError("use_tma_aligned_col_major_sf", got, "False: there are none to turn")
            table, scales = self._table, self._sf
            tokens, width = given.shape
            data = table.new_empty(given.numel(), table.shape[1])
            size, made = 0, None
            if scales is not None:
                size = width * scales.shape[1]
                made = columns(tokens, size, scales) if column_major else scales.new_empty(tokens, size)

            def job() -> None:
                self._check_range(given)
                places = given.flatten().long()
                data.view(torch.uint8).copy_(table.view(torch.uint8)[places])
                if made is not None and scales is not None:
                    made.copy_(scales[places].view(tokens, size))

            completion = self._control.locally(job, Schedule(asynchronous=True), (given, table, data, made))
            return Entries(data, made, completion)

    def _check_range(self, indices: Tensor) -> None:
        """All entries exist, and their ranks took part in the write."""
        for index in indices.flatten().tolist():
            total = self._entries * self._engine.info.num_ranks
            if not 0 <= index < total:
                raise RangeError("indices", str(index), f"0 to {total - 1}", self._engine.info.rank)
            owner = index // self._entries
            if owner not in self._owners:
                got = f"{index}, an entry of rank {owner}, which is left out"
                raise RangeError("indices", got, "entries of the others", self._engine.info.rank)

    def memory(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._table, self._sf) if t is not None)
