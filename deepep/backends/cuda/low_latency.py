"""Low-latency operations of the CUDA backend: there are no kernels for them yet, NCCL carries them."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from deepep.backends.reference.low_latency import LowLatencyOperations
from deepep.runtime.control.issue import ControlPlane
from deepep.runtime.engine import Engine
from deepep.runtime.requests import (
    LowLatencyCombined,
    LowLatencyCombineRequest,
    LowLatencyDispatched,
    LowLatencyDispatchRequest,
    LowLatencyRoute,
    Schedule,
)


class NcclLowLatency:
    """The fallback: the reference's low-latency operations on the control plane's NCCL links."""

    runs_on: ClassVar[str] = "all_to_all over NCCL, no kernels yet"

    def __init__(self, control: ControlPlane, engine: Engine) -> None:
        self._reference = LowLatencyOperations(control, engine)

    def dispatch(self, request: LowLatencyDispatchRequest, schedule: Schedule) -> LowLatencyDispatched:
        """Into fixed slots."""
        return self._reference.dispatch(request, schedule)

    def combine(self, request: LowLatencyCombineRequest, schedule: Schedule) -> LowLatencyCombined:
        """A weighted sum over k, ascending."""
        return self._reference.combine(request, schedule)

    def combine_buffer(self, route: LowLatencyRoute) -> Tensor:
        """[L, R*M, H] bf16: where the next zero-copy combine reads from."""
        return self._reference.combine_buffer(route)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the rows that the next zero-copy combine reads from."""
        return self._reference.staged_bytes
