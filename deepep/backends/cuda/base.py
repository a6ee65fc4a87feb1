"""What the CUDA backend does around its operations.

It builds symmetric memory, and builds it anew after ranks were masked; it refuses calls; and before an
operation is issued it raises what kernels have reported since.
"""

from __future__ import annotations

import contextlib
from typing import NoReturn

import torch

from deepep.backends.cuda.launch import Counts, Phase
from deepep.backends.cuda.memory.heap import SymmetricMemory, symmetric_bytes
from deepep.backends.reference.engine import ReferenceEngine
from deepep.errors import (
    ArgumentError,
    CapacityError,
    FaultRecord,
    MismatchError,
    PeerTimeoutError,
)
from deepep.runtime import streams
from deepep.runtime.control.comm_queue import StreamLane
from deepep.runtime.engine import EngineOptions
from deepep.runtime.requests import Operation, Schedule


class CudaBase(ReferenceEngine):
    """The CUDA engine but for its operations."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        lane = self._conductor.lane
        assert isinstance(lane, StreamLane)
        self._comm = lane.stream
        self._device = lane.stream.device
        self._index = lane.stream.device_index
        self.info = type(self.info)(
            "cuda", self.info.rank, self.info.num_ranks, self.info.device_type, options
        )
        self._fault: FaultRecord | None = None
        self._stale = False
        self._refused = False
        self._build()

    def _build(self) -> None:
        self._memory = SymmetricMemory(
            self._conductor.membership, self._device, self.info.options.timeout, symmetric_bytes()
        )
        self._endpoint = self._memory.endpoint

    def refuse(self, operation: Operation, problem: ArgumentError, schedule: Schedule) -> NoReturn:
        """The kernels of the others hear of it in their own call: they raise MismatchError, at the latest in
        their next.
        """
        if operation not in (Operation.DISPATCH, Operation.COMBINE):
            super().refuse(operation, problem, schedule)
        self._get_ready(operation)
        self._launch_refusal(operation)
        self._endpoint.wait()
        with contextlib.suppress(MismatchError):  # that is this rank's own doing
            self._raise_fault()
        raise problem.at(self.info.rank)

    def _launch_refusal(self, operation: Operation) -> None:
        stream = streams.current_address(self._index)
        if operation is Operation.DISPATCH:
            self._endpoint.refuse_dispatch(stream)
        else:
            self._endpoint.refuse_combine(stream)

    def mask(self, rank: int, masked: bool) -> None:
        super().mask(rank, masked)
        self._stale = True

    def leave(self) -> None:
        self._endpoint.wait()
        super().leave()  # no rank leaves before all have come to this, so nobody writes here any more
        self._memory.close()

    def close(self) -> None:
        super().close()
        self._memory.close()

    def _learn_counts(self, num_local: int) -> Counts:
        counts = self._endpoint.wait_counts(num_local)
        if counts is not None and counts.phase in (0, Phase.TOO_MANY_ROWS):
            return counts
        self._endpoint.wait()
        self._raise_fault()
        raise RuntimeError("deepep: a dispatch neither finished nor left a fault record")

    def _get_ready(self, operation: Operation) -> bool:
        """Before an operation is issued: raises what stands in its way; builds anew after ranks were masked.
        Whether a graph is being captured: then nothing of this can be done.

        After a time-out the ranks' kernels no longer count alike, and a rank that comes late may still write
        to this one's memory. So nothing runs until the missing ranks are masked; and then on other memory,
        while the old is kept for whoever still writes there.
        """
        if torch.cuda.is_current_stream_capturing():
            return True
        if self._stale:
            self._endpoint.wait()
            self._memory.leak()
            self._build()
            self._stale, self._fault, self._refused = False, None, False
        if self._refused:  # what this rank refused, all ranks disagree about: it knows
            self._endpoint.wait()
            self._refused = False
            with contextlib.suppress(MismatchError):
                self._raise_fault()
        if self._fault is None and not self._endpoint.has_fault:
            return False
        try:
            self._raise_fault()
        except ArgumentError:
            # The call is not made here, so it must not be made anywhere: the ranks stay in step.
            self._launch_refusal(operation)
            self._refused = True
            raise
        return False

    def _is_held_up(self) -> bool:
        """Whether something is to be done or raised before the next operation (`_get_ready`)."""
        return self._stale or self._refused or self._fault is not None or self._endpoint.has_fault

    def _raise_fault(self) -> None:
        """Raises what a kernel has reported since the last look, or a time-out reported before."""
        if self._fault is not None:
            raise PeerTimeoutError(self._fault)
        fault = self._endpoint.take_fault(streams.current_address(self._index))
        if fault is None:
            return
        if fault.phase == "disagreement":
            ranks = ", ".join(map(str, fault.waited_on))
            raise MismatchError(
                fault.operation,
                f"other shapes, options, masks or handles than on rank {ranks}, or a refusal there",
                "the same on all ranks",
                self.info.rank,
            )
        if fault.phase == "too_many_rows":
            got = f"{fault.seen} rows for rank {', '.join(map(str, fault.waited_on))}"
            raise CapacityError("num_worst_tokens", str(fault.expected), f"at least {got}", self.info.rank)
        self._fault = fault
        raise PeerTimeoutError(fault)
