"""An area of mapped memory for one purpose, beside the kernels' operations, until other ranks take part.

It has generations of its own (memory/generations.py), and a barrier whose time-outs are raised by the calls
that follow.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from deepep import _cuda
from deepep.backends.cuda.memory.generations import Generations
from deepep.backends.cuda.memory.mapped import MappedMemory
from deepep.errors import ArgumentError, FaultRecord, PeerTimeoutError
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.requests import Operation

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine


class MappedArea:
    """One engine's, under its lock. memory: None until it is built, and after other ranks take part.

    operation: whose name a time-out has. A time-out is raised by the next call, and by all until the memory
    is built again.
    """

    def __init__(
        self, control: ControlPlane, engine: CudaEngine, turns: _cuda.Turns, what: str, operation: Operation
    ) -> None:
        self._control, self._turns, self._operation = control, turns, operation
        self._owner = weakref.ref(engine)  # weak, or the engine would be freed late: it owns this
        self.generations = Generations(control.membership, engine.device, what)
        self.memory: MappedMemory | None = None
        self._fault: FaultRecord | None = None

    @property
    def engine(self) -> CudaEngine:
        """The owner."""
        engine = self._owner()
        assert engine is not None
        return engine

    @property
    def is_whole(self) -> bool:
        """True if there is memory, and no time-out is known: its barriers still count alike on all ranks."""
        return self.memory is not None and self._fault is None

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's memory."""
        return 0 if self.memory is None else self.memory.own.numel()

    def build(self, num_bytes: int, zeroed: int = 0) -> MappedMemory:
        """Memory over the ranks that take part, of which the first `zeroed` bytes begin as zeros; collective.
        Earlier faults are settled.
        """
        engine, membership = self.engine, self._control.membership
        self.memory = self._fault = None
        timeout = engine.info.options.timeout
        make = functools.partial(MappedMemory, membership.rank, engine.live, timeout, self._turns, zeroed)
        with torch.cuda.device(engine.index):
            size = MappedMemory.heap_bytes(membership.num_ranks, num_bytes)
            self.memory = self.generations.build(size, make)
        return self.memory

    def raise_fault(self) -> None:
        """Raises a time-out that a barrier has recorded."""
        if self._fault is None and self.memory is not None:
            found = self.memory.take_fault()
            if found is not None:
                self._fault = replace(found, operation=self._operation.label)
        if self._fault is not None:
            raise PeerTimeoutError(self._fault)

    def check_not_captured(self, operation: Operation) -> None:
        """Raises ArgumentError while a graph is captured."""
        if torch.cuda.is_current_stream_capturing():
            raise ArgumentError(operation.label, "captured", "outside of a graph", self._control.rank)

    def change_members(self) -> None:
        """Other ranks take part from now on, in memory to be built. An earlier fault is settled."""
        self.memory = self._fault = None

    def release(self) -> None:
        """Frees the memory, if there is any; collective then."""
        if self.memory is not None:
            self.memory = None
            with torch.cuda.device(self.engine.index):
                self.generations.release()

    def retire(self, *, wait: bool) -> bool:
        """Ends what there is; `Generations.retire`."""
        self.memory = None
        return self.generations.retire(wait=wait)
