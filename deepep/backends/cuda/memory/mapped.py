"""Memory of all ranks that each has mapped, beside the heap of the kernels' operations: for plain copies."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.launch import MAX_BLOCKS, MAX_LOCAL_EXPERTS, Endpoint
from deepep.backends.cuda.memory.ipc import SymmetricHeap
from deepep.errors import FaultRecord
from deepep.runtime import streams

_ALIGNMENT = 512  # bytes: what allocations begin at, anywhere


class MappedMemory:
    """On one rank's heap, mapped by its peers: bytes for copies, and a barrier of the ranks on the device.

    `HeapContents` of generations.py: what copies write is ordered by kernels, which are operations. begin:
    of the bytes for copies, in the heap; the first `zeroed` of them begin as zeros.
    """

    def __init__(
        self,
        rank: int,
        live: int,
        timeout: float,
        turns: _cuda.Turns,
        zeroed: int,
        heap: SymmetricHeap,
    ) -> None:
        self.begin = _words_bytes(len(heap.mapped))
        self.own = heap.own[self.begin :]
        self.own[:zeroed].zero_()  # the endpoint waits for the stream
        self.endpoint = Endpoint(
            rank, heap.own, heap.addresses, staging_bytes=0, timeout=timeout, turns=turns
        )
        self.endpoint.set_live(live)
        self._mapped = heap.mapped  # the generation's list, which is empty once this rank has left it

    @staticmethod
    def heap_bytes(num_ranks: int, num_bytes: int) -> int:
        """Bytes of a heap with `num_bytes` for copies."""
        return _words_bytes(num_ranks) + num_bytes

    def of(self, rank: int) -> Tensor:
        """The bytes of a rank: uint8 [num_bytes]."""
        return self._mapped[rank][self.begin :]

    def barrier(self, stream: int) -> None:
        """Launches a barrier of all live ranks on `stream`, the current one: what their streams held at this
        point has been done when it has passed.
        """
        self.endpoint.barrier(stream)

    def take_fault(self) -> FaultRecord | None:
        """The fault that a kernel has recorded since the last call, if one has."""
        if not self.endpoint.has_fault:
            return None
        return self.endpoint.take_fault(streams.current_address(self.own.get_device()))

    # its end: generations.py, HeapContents

    def wait(self) -> None:
        """Blocks the host until the last operation has ended."""
        self.endpoint.wait()

    def is_idle(self) -> bool:
        """True if it has, and this is no time of capturing a graph."""
        return not torch.cuda.is_current_stream_capturing() and self.endpoint.domain.is_idle()

    def may_write(self) -> bool:
        """True once a graph has captured copies; others end before what they are launched with."""
        return self.endpoint.domain.was_captured()

    def is_held(self) -> bool:
        """False: a tensor that somebody holds keeps the heap's memory by itself."""
        return False

    def is_in_use(self) -> bool:
        """False, as `is_held`."""
        return False

    def mark_read(self) -> None:
        """Nothing to note."""

    def free(self) -> None:
        """Lets go of the heap."""
        self.own = self.own[:0]
        self.endpoint.close()


def _words_bytes(num_ranks: int) -> int:
    """Bytes of the words that barriers are made of."""
    words = _cuda.control_bytes(num_ranks, MAX_LOCAL_EXPERTS, MAX_BLOCKS)
    return -(-words // _ALIGNMENT) * _ALIGNMENT
