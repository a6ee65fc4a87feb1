"""Symmetric memory between the processes of one node: CUDA IPC, through torch.

Every rank allocates a heap of the same size and exports it; every rank maps every other's. Handles travel as
bytes that are parsed field by field: nothing that came from a peer is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist

from deepep.runtime.control.transport import gather_bytes

Gather = Callable[[bytes], list[bytes | None]]
"""Brings every rank's bytes to every rank, by rank; None for a rank that takes no part. Collective."""

_MOST_BYTES = 1 << 12  # of a handle in bytes; CUDA's own take 64 each
_NO_EVENT = bytes(64)  # in an event's place, for torch to pass over
_NO_COUNTER = b"/deepep-counts-nothing"  # no shared memory has this name: torch passes over what is gone


@dataclass(frozen=True)
class HeapHandle:
    """An exported heap: what another process needs to map it, as torch exports a storage.

    num_bytes: of the heap. storage_bytes, offset: of its memory inside the allocation that `memory` names.

    No event travels: whoever opens one that another process has exported must destroy it, torch never does,
    and a driver has room for some 20,000. So the exporter waits for its stream.
    """

    num_bytes: int
    storage_bytes: int
    offset: int
    memory: bytes

    @classmethod
    def export(cls, heap: torch.Tensor) -> HeapHandle:
        """Exports a tensor that begins its storage. Waits for the current stream: nothing that it holds now
        writes there once others have the handle.
        """
        assert heap.storage_offset() == 0
        storage = heap.untyped_storage()
        _, memory, storage_bytes, offset, counter, counter_offset, *_ = storage._share_cuda_()
        # torch keeps what it has exported until one process that has mapped it says that it has let go: one
        # that was killed never does, and a second one is one too many. generations.py decides when a heap is
        # freed; so that is said here, and those who map it count nowhere.
        torch.UntypedStorage._release_ipc_counter_cuda(counter, counter_offset)
        torch.cuda.current_stream(heap.device).synchronize()
        return cls(num_bytes=heap.numel(), storage_bytes=storage_bytes, offset=offset, memory=memory)

    def encode(self) -> bytes:
        """The handle as text: names and numbers, bytes in hexadecimal."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({k: v.hex() if isinstance(v, bytes) else v for k, v in values.items()}).encode()

    @classmethod
    def decode(cls, raw: bytes) -> HeapHandle:
        """Parses what `encode` made. Raises ValueError for anything else."""
        try:
            values = json.loads(raw)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"heap handle: not one ({error})") from None
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(f"heap handle: got {str(values)[:200]}; allowed: {', '.join(names)}")
        parsed: dict[str, Any] = {f.name: _parse(f.name, str(f.type), values[f.name]) for f in fields(cls)}
        return cls(**parsed)

    def map_here(self, device: torch.device) -> torch.Tensor:
        """The heap, mapped for kernels of `device`: uint8 [num_bytes].

        torch would open the memory on the exporter's device, where kernels of another device cannot reach it;
        opened on the device that will use it, CUDA enables the peer access along with it.
        """
        torch.cuda.init()
        storage = torch.UntypedStorage._new_shared_cuda(
            device.index,
            self.memory,
            self.storage_bytes,
            self.offset,
            _NO_COUNTER,
            0,
            _NO_EVENT,
            False,
        )
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[: self.num_bytes]


def _parse(name: str, kind: str, value: object) -> int | bytes:
    if kind == "int" and type(value) is int and 0 <= value < 1 << 63:
        return value
    if kind == "bytes" and isinstance(value, str) and len(value) <= 2 * _MOST_BYTES:
        return bytes.fromhex(value)  # ValueError for what is not hexadecimal
    raise ValueError(f"heap handle: {name}: got {str(value)[:200]!r}; allowed: {kind}")


@dataclass(frozen=True)
class SymmetricHeap:
    """One rank's heap and where everybody's is mapped here.

    own: uint8 [B] on this rank's device. mapped: every rank's heap by rank, kept alive with this object.
    """

    own: torch.Tensor
    mapped: list[torch.Tensor]

    @property
    def addresses(self) -> list[int]:
        """Every rank's heap as this process addresses it."""
        return [tensor.data_ptr() for tensor in self.mapped]


def share_heap(own: torch.Tensor, rank: int, gather: Gather) -> SymmetricHeap:
    """Maps the heaps of all ranks of one node. Collective.

    For a rank that takes no part this rank's own heap stands in, for nobody to use. Raises RuntimeError where
    a peer's memory cannot be mapped, ValueError where heaps differ in size.
    """
    return map_heaps(own, rank, gather(export_heap(own)))


def export_heap(own: torch.Tensor) -> bytes:
    """This rank's heap, for `map_heaps` of the others."""
    return HeapHandle.export(own).encode()


def map_heaps(own: torch.Tensor, rank: int, exported: list[bytes | None]) -> SymmetricHeap:
    """Maps the heaps that all ranks have exported; as `share_heap`. Waits for all work on the device."""
    handles = [None if raw is None else HeapHandle.decode(raw) for raw in exported]
    sizes = [None if handle is None else handle.num_bytes for handle in handles]
    if len(set(sizes) - {None}) > 1:
        raise ValueError(
            f"symmetric memory must be of one size on all ranks (DEEPEP_SYMMETRIC_BYTES): {sizes}"
        )
    # A process maps the memory of others only: its own it has.
    mapped = [
        own if r == rank or handle is None else handle.map_here(own.device)
        for r, handle in enumerate(handles)
    ]
    torch.cuda.synchronize(own.device)
    return SymmetricHeap(own, mapped)


def gather_over(group: dist.ProcessGroup) -> Callable[[bytes], list[Any]]:
    """A `Gather` over a process group, of which every rank takes part."""
    return lambda mine: gather_bytes(group, mine)
