"""One rank of an NVLink domain in the low-latency operations: tensors in, kernel launches out.

What launch.py is to the throughput operations. Memory, epochs and faults are low latency's own: neither pays
for the other. docs/low_latency.md has the protocol.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens here, M the most tokens of any rank, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.launch import fault_record, pinned_zeros
from deepep.errors import FaultRecord
from deepep.runtime.checks import FP8_GROUP, UE8M0_PACK

LEAST_BLOCKS = 16
_HANDLE_ALIGNMENT = 4  # words
_TOKENS_OF_WORD = 32  # each a bit


def num_blocks(num_max_tokens: int, num_sms: int) -> int:
    """Blocks of a launch, one an SM: one for each token, one for words; at least some, for rows that come."""
    return max(1, min(num_sms, max(LEAST_BLOCKS, num_max_tokens + 1)))


class Halves(IntEnum):
    """The halves that a launch has; the numbers are csrc/kernels/low_latency/args.hpp's."""

    BOTH = 0
    SEND = 1
    RECEIVE = 2


@dataclass(frozen=True, slots=True)
class LowLatencyRoom:
    """The largest call that memory has room for: L, M, K and H."""

    num_local_experts: int
    num_max_tokens: int
    num_topk: int
    hidden: int

    def joined(self, other: LowLatencyRoom) -> LowLatencyRoom:
        """Room for either."""
        return LowLatencyRoom(
            max(self.num_local_experts, other.num_local_experts),
            max(self.num_max_tokens, other.num_max_tokens),
            max(self.num_topk, other.num_topk),
            max(self.hidden, other.hidden),
        )

    def num_bytes(self, num_ranks: int) -> tuple[int, int]:
        """Bytes of symmetric memory, and how many of them are to be zero before any rank sends."""
        return _cuda.low_latency_bytes(
            num_ranks, self.num_local_experts, self.num_max_tokens, self.num_topk, 2 * self.hidden
        )


@dataclass(frozen=True, slots=True)
class LowLatencyFormat:
    """All that ranks must pass alike to a dispatch, and what follows from it alone.

    with_weights: they travel with the dispatch. num_blocks: of a launch.
    """

    num_ranks: int
    num_local_experts: int
    num_max_tokens: int
    num_topk: int
    hidden: int
    index_dtype: torch.dtype
    use_fp8: bool = False
    round_scale: bool = False
    use_ue8m0: bool = False
    with_weights: bool = False
    num_blocks: int = 1

    @property
    def room(self) -> LowLatencyRoom:
        """The memory that it takes."""
        return LowLatencyRoom(self.num_local_experts, self.num_max_tokens, self.num_topk, self.hidden)

    def outputs(self, device: torch.device) -> LowLatencyArrays:
        """Uninitialised outputs of a dispatch, for the current stream."""
        local, rows = self.num_local_experts, self.num_ranks * self.num_max_tokens
        scales = None
        if self.use_fp8:
            x = torch.empty((local, rows, self.hidden), dtype=torch.float8_e4m3fn, device=device)
            columns = self.hidden // (UE8M0_PACK if self.use_ue8m0 else FP8_GROUP)
            dtype = torch.int32 if self.use_ue8m0 else torch.float32
            scales = torch.empty((local, columns, rows), dtype=dtype, device=device).transpose(1, 2)
        else:
            x = torch.empty((local, rows, self.hidden), dtype=torch.bfloat16, device=device)
        return LowLatencyArrays(
            x,
            scales,
            torch.empty(local, dtype=torch.int32, device=device),
            torch.empty((local, rows), dtype=torch.int32, device=device),
            torch.empty((local, self.num_ranks), dtype=torch.int64, device=device),
        )


@dataclass(slots=True)
class LowLatencyArrays:
    """A dispatch's outputs: x [L, R*M, H], scales or None, count [L], source [L, R*M], ranges [L, R]."""

    x: Tensor
    scales: Tensor | None
    count: Tensor
    source: Tensor
    ranges: Tensor

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them."""
        return self.x, self.scales, self.count, self.source, self.ranges


class LowLatencyPlan:
    """A dispatch's handle: what its combine needs, in device memory (csrc/kernels/low_latency/args.hpp).

    form: of the dispatch. num_tokens: T. stream: that the memory belongs to. identity, sent, came, routes:
    addresses in it.
    """

    ADDRESSES: ClassVar[tuple[str, ...]] = ("identity", "sent", "came", "routes")
    __slots__ = (*ADDRESSES, "form", "num_tokens", "stream", "table")

    def __init__(self, form: LowLatencyFormat, num_tokens: int, device: torch.device, stream: int) -> None:
        came = _HANDLE_ALIGNMENT + num_tokens
        routes = came + form.num_ranks * -(-form.num_max_tokens // _TOKENS_OF_WORD)
        routes = -(-routes // _HANDLE_ALIGNMENT) * _HANDLE_ALIGNMENT
        words = routes + form.num_ranks * form.num_max_tokens * 2 * form.num_topk
        self.form, self.num_tokens, self.stream = form, num_tokens, stream
        self.table = torch.empty(words, dtype=torch.int32, device=device)
        self.identity = self.table.data_ptr()
        self.sent = self.identity + 4 * _HANDLE_ALIGNMENT
        self.came = self.identity + 4 * came
        self.routes = self.identity + 4 * routes


class LowLatencyEndpoint:
    """The low-latency operations of one rank on its NVLink domain.

    heap: this rank's symmetric memory, uint8, of the bytes that `room` asks for; this clears its control
    part. addresses: where each rank's heap is mapped here. timeout: seconds a kernel waits for a peer before
    it leaves with a fault record. turns: of this rank, shared with its throughput operations.
    """

    def __init__(
        self,
        rank: int,
        heap: Tensor,
        addresses: list[int],
        *,
        room: LowLatencyRoom,
        timeout: float,
        turns: _cuda.Turns,
    ) -> None:
        self.rank, self.num_ranks, self.timeout = rank, len(addresses), timeout
        self.room, self.turns = room, turns
        self.device = heap.device
        num_bytes, control_bytes = room.num_bytes(self.num_ranks)
        assert heap.numel() >= num_bytes
        heap[:control_bytes].zero_()
        self._state = torch.zeros(_cuda.STATE_BYTES, dtype=torch.uint8, device=self.device)
        self._fault = pinned_zeros(_cuda.FAULT_BYTES)
        self.domain = _cuda.LowLatencyDomain(
            rank=rank,
            heaps=addresses,
            max_local_experts=room.num_local_experts,
            max_tokens=room.num_max_tokens,
            max_topk=room.num_topk,
            max_row_bytes=2 * room.hidden,
            state=self._state.data_ptr(),
            fault=self._fault.data_ptr(),
            timeout_seconds=timeout,
            turns=turns,
        )
        torch.cuda.current_stream(self.device).synchronize()

    # Operations run in the order of their launches, also on different streams: csrc/host/turns.hpp.

    def dispatch(
        self,
        plan: LowLatencyPlan,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        out: LowLatencyArrays,
        halves: Halves,
        num_blocks: int,
        stream: int,
    ) -> None:
        """Launches a dispatch of x [T, H] bf16, or half of one. It fills the plan."""
        form = plan.form
        self.domain.dispatch(
            num_blocks=num_blocks,
            halves=halves,
            num_tokens=plan.num_tokens,
            max_tokens=form.num_max_tokens,
            num_topk=form.num_topk,
            num_local_experts=form.num_local_experts,
            hidden=form.hidden,
            index_bytes=topk_idx.element_size(),
            x=x.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            topk_weights=0 if topk_weights is None else topk_weights.data_ptr(),
            identity=plan.identity,
            sent=plan.sent,
            came=plan.came,
            routes=plan.routes,
            weights_travel=form.with_weights,
            casts=form.use_fp8,
            rounds_scales=form.round_scale,
            packs_scales=form.use_ue8m0,
            recv_x=out.x.data_ptr(),
            recv_scales=0 if out.scales is None else out.scales.data_ptr(),
            recv_count=out.count.data_ptr(),
            recv_source=out.source.data_ptr(),
            recv_range=out.ranges.data_ptr(),
            stream=stream,
        )

    def combine(
        self,
        plan: LowLatencyPlan,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        out: Tensor,
        halves: Halves,
        num_blocks: int,
        stream: int,
    ) -> None:
        """Launches a combine of x [L, R*M, H] bf16 into out [T, H] bf16, or half of one, along the plan.

        topk_idx [T, K] must be the dispatch's, and so must topk_weights, where those travelled with it.
        """
        form = plan.form
        self.domain.combine(
            num_blocks=num_blocks,
            halves=halves,
            num_tokens=plan.num_tokens,
            max_tokens=form.num_max_tokens,
            num_topk=form.num_topk,
            num_local_experts=form.num_local_experts,
            hidden=form.hidden,
            index_bytes=topk_idx.element_size(),
            x=x.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            topk_weights=topk_weights.data_ptr(),
            identity=plan.identity,
            sent=plan.sent,
            came=plan.came,
            routes=plan.routes,
            weights_travelled=form.with_weights,
            out=out.data_ptr(),
            stream=stream,
        )

    def stay_out(self, *, combine: bool, elsewhere: bool, stream: int) -> None:
        """Launches an operation that only posts to the others that this rank takes no part: because it
        refuses, or because the call is made by other means (`elsewhere`), which is no fault if it is on all
        ranks.
        """
        nothing = dict.fromkeys(("num_tokens", "x", "topk_idx", "topk_weights", "halves"), 0)
        handle = dict.fromkeys(LowLatencyPlan.ADDRESSES, 0)
        shape = {"num_blocks": 1, "max_tokens": 1, "num_topk": 1, "num_local_experts": 1, "hidden": 8}
        call: dict[str, Any] = nothing | handle | shape | {"index_bytes": 8, "stream": stream}
        if combine:
            self.domain.combine(**call, weights_travelled=True, out=0, refused=True, elsewhere=elsewhere)
            return
        received = dict.fromkeys(("recv_x", "recv_scales", "recv_count", "recv_source", "recv_range"), 0)
        call |= received | dict.fromkeys(("weights_travel", "casts", "rounds_scales", "packs_scales"), 0)
        self.domain.dispatch(**call, refused=True, elsewhere=elsewhere)

    def wait(self) -> None:
        """Blocks the host, without the GIL, until the operation launched last has ended."""
        self.domain.wait()

    def take_fault(self, stream: int) -> FaultRecord | None:
        """The fault that a kernel has recorded since the last call, if one has; its notes on the device are
        cleared on `stream`, behind the operations launched so far.
        """
        found = self.domain.take_fault(stream)
        return None if found is None else fault_record(found, self.rank, self.num_ranks, self.timeout)
