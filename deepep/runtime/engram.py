"""Engram storage: a table whose entries lie on all ranks, written by all together, read by each alone.

Every rank writes as many entries; entry i lies on rank i // entries of one. A fetch asks nobody to take part.
It reads what the write before it left, in the order of this rank's calls: a write waits for the fetches that
all ranks have begun.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from deepep.errors import ArgumentError, CapacityError, ModeError, RangeError, ShapeError
from deepep.runtime import checks
from deepep.runtime.completion import Completion
from deepep.runtime.control.agreement import dtype_code
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.elastic import columns

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
SCALED = (torch.float8_e4m3fn,)


class Entries(NamedTuple):
    """Fetched entries: data [T * n, H]; sf [T, n * P] or None."""

    data: Tensor
    sf: Tensor | None
    completion: Completion


class EngramStore(ABC):
    """The storage of one engine."""

    @abstractmethod
    def write(self, storage: object, sf: object, num_bytes: int) -> None:
        """Replaces all entries. Collective, and a barrier before and after. num_bytes: that there are."""

    @abstractmethod
    def fetch(self, indices: object, column_major: bool) -> Entries:
        """Begins to read entries. Raises, on this rank alone, ModeError and the ArgumentError that fits; an
        index out of range raises RangeError where the completion is waited for.
        """

    @abstractmethod
    def memory(self) -> int:
        """Bytes that entries hold here."""


def checked_storage(
    storage: object, sf: object, num_ranks: int, device_type: str, num_bytes: int
) -> tuple[Tensor, Tensor | None]:
    """storage [n, H], rows of a multiple of 16 bytes; sf [R * n, P] float32 or int32, if elements are FP8."""
    if not num_bytes:
        raise ModeError("engram_write", "a buffer without storage", "one constructed with num_cpu_bytes")
    table = checks.check_tensor(
        "storage", storage, dtypes=DTYPES, device_type=device_type, shape=("entries", "H")
    )
    if not table.shape[0]:
        raise ShapeError("storage", checks.shape_text(table.shape), "one entry at least")
    checks.check_row_bytes(table, "storage")
    if (table.dtype in SCALED) != (sf is not None):
        got = f"{'None' if sf is None else 'a tensor'}, with {str(table.dtype).removeprefix('torch.')}"
        raise ArgumentError("sf", got, "scales with float8_e4m3fn, None with others")
    size = table.numel() * table.element_size()
    if size > num_bytes:
        raise CapacityError("storage", f"{size} bytes", f"at most num_cpu_bytes = {num_bytes}")
    if sf is None:
        return table, None
    total = num_ranks * table.shape[0]
    scales = checks.check_tensor(
        "sf", sf, dtypes=checks.SCALE_DTYPES, device_type=device_type, shape=(total, "P")
    )
    return table, scales


def statement(storage: Tensor, sf: Tensor | None) -> dict[str, int]:
    """The facts of a write that all ranks share."""
    return {
        "storage.dtype": dtype_code(storage.dtype),
        "storage.shape[0]": storage.shape[0],
        "storage.shape[1]": storage.shape[1],
        "sf.dtype": dtype_code(None if sf is None else sf.dtype),
        "sf.shape[1]": 0 if sf is None else sf.shape[1],
    }


def checked_indices(indices: object, device_type: str, column_major: bool, sf: Tensor | None) -> Tensor:
    """indices [T, n] int32, for scales by columns only if there are scales. Reads no value."""
    found = checks.check_tensor(
        "indices", indices, dtypes=(torch.int32,), device_type=device_type, shape=("T", "n")
    )
    if column_major and sf is None:
        got = "True, and storage without scales"
        raise ArgumentError("use_tma_aligned_col_major_sf", got, "False: there are none to turn")
    return found.detach()


def check_entries(indices: Tensor, entries: int, owners: Collection[int], control: ControlPlane) -> None:
    """All of `indices`, on the host, name entries of `owners`. Raises RangeError, for this rank alone."""
    total = entries * control.num_ranks
    for index in indices[(indices < 0) | (indices >= total)][:1].tolist():
        raise RangeError("indices", str(index), f"0 to {total - 1}", control.rank)
    for rank in set(range(control.num_ranks)) - set(owners):
        for index in indices[indices // entries == rank][:1].tolist():
            got = f"{index}, an entry of rank {rank}, which is left out"
            raise RangeError("indices", got, "entries of the others", control.rank)


def empty_scales(indices: Tensor, sf: Tensor | None, column_major: bool) -> Tensor | None:
    """[T, n * P] for scales of the entries, uninitialised: row-major, or by columns; None without `sf`."""
    if sf is None:
        return None
    tokens, width = indices.shape[0], indices.shape[1] * sf.shape[1]
    return columns(tokens, width, sf) if column_major else sf.new_empty(tokens, width)
