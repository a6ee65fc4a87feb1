"""Virtual ranks in the low-latency operations: streams of one process on one GPU, as harness.virtual_ranks.

Every rank's kernels are resident together: a launch has no more blocks than the rank's share of the SMs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.low_latency_launch import (
    Halves,
    LowLatencyArrays,
    LowLatencyEndpoint,
    LowLatencyFormat,
    LowLatencyPlan,
    LowLatencyRoom,
)


@dataclass(frozen=True)
class VirtualGiven:
    """One rank's arguments on the device: x [T, H] bf16, topk_idx [T, K], topk_weights [T, K] float32."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


@dataclass
class VirtualLowLatency:
    """`num_ranks` low-latency endpoints on one device, with room for calls up to `room`.

    shrinks: kernels mask a rank that is missing.
    """

    num_ranks: int
    room: LowLatencyRoom
    num_blocks: int = 0
    timeout: float = 5.0
    shrinks: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    endpoints: list[LowLatencyEndpoint] = field(init=False)

    def __post_init__(self) -> None:
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.num_blocks = self.num_blocks or sms // self.num_ranks
        if self.num_blocks * self.num_ranks > sms:
            raise ValueError(f"{self.num_ranks} ranks of {self.num_blocks} blocks do not fit on {sms} SMs")
        num_bytes, _ = self.room.num_bytes(self.num_ranks)
        # What is read before it is written shall be seen.
        heaps = [
            torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device=self.device)
            for _ in range(self.num_ranks)
        ]
        addresses = [heap.data_ptr() for heap in heaps]
        self.heaps = heaps
        self.streams = [torch.cuda.Stream(self.device) for _ in range(self.num_ranks)]
        self.endpoints = [
            LowLatencyEndpoint(
                *(r, heaps[r], addresses),
                room=self.room,
                timeout=self.timeout,
                turns=_cuda.Turns(),
                shrinks=self.shrinks,
            )
            for r in range(self.num_ranks)
        ]
        torch.cuda.synchronize(self.device)

    def serve(self) -> None:
        """Nothing: inside a domain nobody puts."""

    def dispatch_rank(
        self, rank: int, form: LowLatencyFormat, given: VirtualGiven, *, hooked: bool = False
    ) -> tuple[LowLatencyPlan, LowLatencyArrays]:
        """Launches one rank's dispatch on its stream, in two halves if `hooked`."""
        with torch.cuda.stream(self.streams[rank]):
            stream = self.streams[rank].cuda_stream
            out, plan = form.outputs(given.x.shape[0], self.device, stream)
            out.x.view(torch.uint8).fill_(0xEE)
            weights = given.topk_weights if form.with_weights else None
            for halves in (Halves.SEND, Halves.RECEIVE) if hooked else (Halves.BOTH,):
                self.endpoints[rank].dispatch(
                    plan, given.x, given.topk_idx, weights, out, halves, self.num_blocks, stream
                )
        return plan, out

    def combine_rank(
        self,
        rank: int,
        plan: LowLatencyPlan,
        rows: Tensor,
        given: VirtualGiven,
        *,
        hooked: bool = False,
        **how: bool,
    ) -> Tensor:
        """Launches one rank's combine on its stream, in two halves if `hooked`; how: in_logfmt."""
        with torch.cuda.stream(self.streams[rank]):
            stream = self.streams[rank].cuda_stream
            out = torch.empty((plan.num_tokens, plan.form.hidden), dtype=torch.bfloat16, device=self.device)
            for halves in (Halves.SEND, Halves.RECEIVE) if hooked else (Halves.BOTH,):
                self.endpoints[rank].combine(
                    plan,
                    rows,
                    given.topk_idx,
                    given.topk_weights,
                    out,
                    halves,
                    self.num_blocks,
                    stream,
                    **how,
                )
        return out

    def dispatch(
        self, form: LowLatencyFormat, given: Sequence[VirtualGiven], **how: bool
    ) -> list[tuple[LowLatencyPlan, LowLatencyArrays]]:
        """One dispatch of all ranks."""
        torch.cuda.synchronize(self.device)
        self.serve()
        made = [self.dispatch_rank(r, form, given[r], **how) for r in range(self.num_ranks)]
        torch.cuda.synchronize(self.device)
        return made

    def combine(
        self,
        plans: Sequence[LowLatencyPlan],
        rows: Sequence[Tensor],
        given: Sequence[VirtualGiven],
        **how: bool,
    ) -> list[Tensor]:
        """One combine of all ranks."""
        torch.cuda.synchronize(self.device)
        self.serve()
        made = [self.combine_rank(r, plans[r], rows[r], given[r], **how) for r in range(self.num_ranks)]
        torch.cuda.synchronize(self.device)
        return made

    def faults(self) -> list[tuple[str, tuple[int, ...]] | None]:
        """By rank, phase and ranks of the fault that its kernels have recorded since the last look."""
        found = [e.take_fault(s.cuda_stream) for e, s in zip(self.endpoints, self.streams, strict=True)]
        torch.cuda.synchronize(self.device)
        return [None if fault is None else (fault.phase, fault.waited_on) for fault in found]
