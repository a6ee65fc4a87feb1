"""All-gathers in sessions, sends around a ring and Engram storage of a CUDA engine, inside one domain."""

from __future__ import annotations

from deepep.backends.cuda.domains import Domains
from deepep.backends.cuda.engram import CudaEngram
from deepep.backends.cuda.gather_sessions import CudaSessions
from deepep.backends.cuda.mapped_area import MappedArea
from deepep.backends.cuda.ring import CudaRing
from deepep.runtime.engine import Engine


class CudaBeside(Engine):
    """The part of the CUDA engine that copies to and from mapped memory. See `Engine`."""

    domains: Domains | None
    _sessions: CudaSessions
    _ring: CudaRing
    _engram: CudaEngram

    def gather_sessions(self) -> CudaSessions:
        if self.domains is not None:
            raise self._lacks("all-gather sessions between domains")
        return self._sessions

    def ring(self) -> CudaRing:
        if self.domains is not None:
            raise self._lacks("sends around a ring between domains")
        return self._ring

    def engram(self) -> CudaEngram:
        if self.domains is not None:
            raise self._lacks("Engram storage between domains")
        return self._engram

    def _areas(self) -> tuple[MappedArea, ...]:
        """The memory of all three."""
        return self._sessions.area, self._ring.area, self._engram.area
