"""Members of a CUDA engine: ranks that are masked, taken in again, admitted and dismissed.

Whenever they change, the next operation makes memory anew, for both modes (memory/generations.py): heaps that
the members map then, with epochs that begin again, so nothing of before is taken for a word of a newcomer,
and no newcomer knows the heaps of before. Graphs that were captured before go on in the old heaps, among
those who were members then.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from deepep.backends.cuda.beside import CudaBeside
from deepep.backends.cuda.low_latency import CudaLowLatency
from deepep.backends.cuda.memory.generations import Generations
from deepep.errors import ArgumentError, FaultRecord
from deepep.runtime.control import admission
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.requests import Operation


class CudaMembers(CudaBeside):
    """The part of the CUDA engine that changes who takes part. See `Engine`.

    live: the ranks that take part, as bits.
    """

    live: int
    unsettled: bool
    _must_build: bool
    _fault: FaultRecord | None
    _control: ControlPlane
    _generations: Generations
    _low_latency: CudaLowLatency

    @abstractmethod
    def _retire(self, *, wait: bool) -> bool:
        """Launches nothing more; `Generations.retire`."""

    def mask(self, rank: int, masked: bool) -> None:
        for other in self._low_latency.state.masked - {rank}:  # by its kernels: now for all operations
            self._control.mask(other, True)
        self._control.mask(rank, masked)
        self._change_members()

    def _all_generations(self) -> tuple[Generations, ...]:
        """Of every kind of memory that peers have mapped."""
        beside = (area.generations for area in self._areas())
        return (self._generations, self._low_latency.state.generations, *beside)

    def _change_members(self) -> None:
        """Other ranks take part from the next operation on, in new memory. Earlier faults are settled."""
        self.live = self._control.membership.live
        self._fault = None
        self._must_build = self.unsettled = True
        self._low_latency.state.change_members()
        for area in self._areas():
            area.change_members()

    def _take_over_masks(self) -> None:
        """Masks for all operations the ranks that low-latency kernels have masked."""
        for rank in self._low_latency.state.masked - self._control.masked:
            self.mask(rank, True)

    def invite(self, ranks: Sequence[int]) -> str:
        with self._control.issuing:
            self._check_not_captured(Operation.INVITE)
            self._take_over_masks()
            return admission.invite(self._control, ranks)

    def admit(self, invitation: str) -> None:
        with self._control.issuing:
            self._check_not_captured(Operation.ADMIT)
            self._take_over_masks()
            stayed = admission.admit(self._control, invitation)
            for generations in self._all_generations():
                generations.go_on_with(self._control.membership, stayed)
            self._change_members()

    def dismiss(self, ranks: Sequence[int]) -> None:
        with self._control.issuing:
            self._check_not_captured(Operation.DISMISS)
            self._take_over_masks()
            admission.dismiss(self._control, ranks)
            if self.info.rank in ranks:
                self._retire(wait=True)  # so that those who stay need not keep what it may write to
            else:
                self._change_members()

    def _check_not_captured(self, operation: Operation) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise ArgumentError(operation.label, "captured", "outside of a graph", self.info.rank)

    @property
    def masked(self) -> frozenset[int]:
        return self._control.masked | self._low_latency.state.masked

    def write_masked(self, status: Tensor) -> None:
        with self._control.issuing:
            super().write_masked(status)
            self._low_latency.state.write_masked(status)
