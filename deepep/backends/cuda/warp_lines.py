"""Time lines of warps on a GPU: memory for them, and the domains whose kernels write there."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from deepep import _cuda
from deepep.runtime.control.lines import LINE_WORDS, CallLines, LineRecorder

if TYPE_CHECKING:
    from deepep.backends.cuda.engine import CudaEngine

    Domain = _cuda.Domain | _cuda.LowLatencyDomain

WARPS = 16  # of a block of any kernel that records


class KernelLines(LineRecorder):
    """See `LineRecorder`. A domain gets memory for a block an SM, of each call."""

    def __init__(self, engine: CudaEngine) -> None:
        super().__init__(engine.info.rank)
        self._engine = weakref.ref(engine)
        self._device = engine.device
        self._words_a_call = engine.sms * WARPS * LINE_WORDS
        self._rooms: list[tuple[Domain, torch.Tensor]] = []

    def begin(self, num_calls: int) -> None:
        """See `LineRecorder`. Memory that is made later is attached to with its first call."""
        super().begin(num_calls)
        memory = getattr(self._engine(), "symmetric", None)
        if memory is not None:
            self.attach(memory.endpoint.domain)

    def attach(self, domain: Domain) -> None:
        """Has the domain's launches record from now on."""
        if any(known is domain for known, _ in self._rooms):
            return
        with torch.inference_mode(False):
            words = torch.zeros(self.num_calls * self._words_a_call, dtype=torch.int64, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()  # the launch may be on another stream
        domain.open_lines(words.data_ptr(), words.numel())
        self._rooms.append((domain, words))

    def end(self) -> list[CallLines]:
        """See `LineRecorder`. Waits until the launches have ended, which takes a time-out at most."""
        rooms, self._rooms = self._rooms, []
        for domain, words in rooms:
            launches = domain.close_lines()
            domain.wait()
            self.add(launches, words.cpu())
        return super().end()
