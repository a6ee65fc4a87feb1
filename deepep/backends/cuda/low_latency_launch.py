"""One rank of an NVLink domain in the low-latency operations: tensors in, kernel launches out.

What launch.py is to the throughput operations. Memory, epochs and faults are low latency's own: neither pays
for the other. docs/low_latency.md has the protocol.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens here, M the most tokens of any rank, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepep import _cuda
from deepep.backends.cuda.launch import fault_record, pinned_zeros
from deepep.backends.cuda.memory.tensor_set import Array, TensorSet, View
from deepep.errors import FaultRecord
from deepep.runtime.checks import FP8_GROUP, UE8M0_PACK

LEAST_BLOCKS = 16
_ALIGNMENT = 4  # words
_SENT = 4  # words of a handle before `sent`: its identity
_TOKENS_OF_WORD = 32  # each a bit


def num_blocks(num_max_tokens: int, num_sms: int) -> int:
    """Blocks of a launch, one an SM: one for each token, one for words; at least some, for rows that come."""
    return max(1, min(num_sms, max(LEAST_BLOCKS, num_max_tokens + 1)))


RETURNS_SUMS, RETURNS_ENTRIES = 0, 2
"""What goes back of a token, one more if in LogFMT; the numbers are csrc/kernels/low_latency/args.hpp's."""


class Halves(IntEnum):
    """The halves that a launch has; the numbers are csrc/kernels/low_latency/args.hpp's."""

    BOTH = 0
    SEND = 1
    RECEIVE = 2


@dataclass(frozen=True, slots=True)
class LowLatencyRoom:
    """The largest call that memory has room for: L, M, K and H.

    entry_stretches: 0 where one row of a token returns from a rank. Where each top-k entry has a row that
    does: the sources that have room of their own for those, all R, or 1: they share it.
    """

    num_local_experts: int
    num_max_tokens: int
    num_topk: int
    hidden: int
    entry_stretches: int = 0

    def joined(self, other: LowLatencyRoom) -> LowLatencyRoom:
        """Room for either."""
        return LowLatencyRoom(
            max(self.num_local_experts, other.num_local_experts),
            max(self.num_max_tokens, other.num_max_tokens),
            max(self.num_topk, other.num_topk),
            max(self.hidden, other.hidden),
            max(self.entry_stretches, other.entry_stretches),
        )

    def num_bytes(self, num_ranks: int) -> tuple[int, int]:
        """Bytes of symmetric memory, and how many of them are to be zero before any rank sends."""
        return _cuda.low_latency_bytes(
            num_ranks,
            self.num_local_experts,
            self.num_max_tokens,
            self.num_topk,
            2 * self.hidden,
            self.entry_stretches,
        )


@dataclass(frozen=True, slots=True)
class LowLatencyFormat:
    """All that ranks must pass alike to a dispatch, and what follows from it alone.

    with_weights: they travel with the dispatch. num_blocks: of a launch. entry_stretches: LowLatencyRoom's;
    not 0 if its combines return the row of each top-k entry. num_domains: D, if there are gateways. made:
    what makes its outputs, by device.
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
    entry_stretches: int = 0
    num_domains: int = 0
    made: dict[torch.device, LowLatencyOutputs] = field(default_factory=dict, compare=False, repr=False)

    @property
    def room(self) -> LowLatencyRoom:
        """The memory that it takes."""
        return LowLatencyRoom(
            self.num_local_experts, self.num_max_tokens, self.num_topk, self.hidden, self.entry_stretches
        )

    def made_on(self, device: torch.device) -> LowLatencyOutputs:
        """Makers of its outputs on a device."""
        made = self.made.get(device)
        if made is None:
            made = self.made[device] = LowLatencyOutputs.of(self, device)
        return made

    def sums(self, num_tokens: int, device: torch.device) -> Tensor:
        """The uninitialised output of a combine of T tokens [T, H] bf16, for the current stream."""
        sums = self.made_on(device).sums
        made = sums.get(num_tokens)
        if made is None:
            made = sums[num_tokens] = TensorSet(device, [Array((num_tokens, self.hidden), torch.bfloat16)])
        out: Tensor = made.make()[0]
        return out

    def outputs(
        self, num_tokens: int, device: torch.device, stream: int
    ) -> tuple[LowLatencyArrays, LowLatencyPlan]:
        """Uninitialised outputs of a dispatch of T tokens, and its handle, for the current stream."""
        made = self.made_on(device)
        if made.has_scales:
            x, words, ranges, scales, count, source = made.tensors.make()
        else:
            x, words, ranges, count, source = made.tensors.make()
            scales = None
        plan = LowLatencyPlan(self, num_tokens, stream, words, made.came, made.routes)
        return LowLatencyArrays(x, scales, count, source, ranges), plan


@dataclass(frozen=True, slots=True)
class LowLatencyOutputs:
    """The tensors of a format's dispatches on one device, all made in one call.

    tensors: x, an array of int32 that begins with the handle, the ranges, the scales if there are any, and
    of the array count and source. came, routes: of the handle, bytes from its begin. sums: give what a
    combine of T tokens returns, by T.
    """

    tensors: TensorSet
    has_scales: bool
    came: int
    routes: int
    sums: dict[int, TensorSet] = field(default_factory=dict)

    @staticmethod
    def of(form: LowLatencyFormat, device: torch.device) -> LowLatencyOutputs:
        """Those of a format."""
        local, ranks, most = form.num_local_experts, form.num_ranks, form.num_max_tokens
        rows = ranks * most
        came = _aligned(_SENT + most)
        routes = _aligned(came + ranks * -(-most // _TOKENS_OF_WORD))
        count = _aligned(routes + rows * 2 * form.num_topk + form.num_domains * most)  # relayed ones behind
        source = _aligned(count + local)
        arrays = [
            Array((local, rows, form.hidden), torch.float8_e4m3fn if form.use_fp8 else torch.bfloat16),
            Array((_aligned(source + local * rows),), torch.int32),
            Array((local, ranks), torch.int64),
        ]
        if form.use_fp8:
            columns = form.hidden // (UE8M0_PACK if form.use_ue8m0 else FP8_GROUP)
            kind = torch.int32 if form.use_ue8m0 else torch.float32
            arrays.append(Array((local, rows, columns), kind, (columns * rows, 1, rows)))
        views = (View(1, (local,), count), View(1, (local, rows), source))
        return LowLatencyOutputs(TensorSet(device, arrays, views), form.use_fp8, 4 * came, 4 * routes)


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

    form: of the dispatch. num_tokens: T. stream: that the memory belongs to. table: that memory. identity,
    sent, came, routes: addresses in it.
    """

    ADDRESSES: ClassVar[tuple[str, ...]] = ("identity", "sent", "came", "routes")
    __slots__ = (*ADDRESSES, "form", "num_tokens", "stream", "table")

    def __init__(
        self, form: LowLatencyFormat, num_tokens: int, stream: int, table: Tensor, came: int, routes: int
    ) -> None:
        self.form, self.num_tokens, self.stream, self.table = form, num_tokens, stream, table
        self.identity = begin = table.data_ptr()
        self.sent, self.came, self.routes = begin + 4 * _SENT, begin + came, begin + routes


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT


class LowLatencyEndpoint:
    """The low-latency operations of one rank on its NVLink domain.

    heap: this rank's symmetric memory, uint8, of the bytes that `room` asks for; this clears its control
    part. addresses: where each rank's heap is mapped here. timeout: seconds a kernel waits for a peer before
    it leaves with a fault record or, if it `shrinks`, masks the peer and goes on. turns: of this rank,
    shared with its throughput operations.
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
        shrinks: bool = False,
    ) -> None:
        self.rank, self.num_ranks, self.timeout = rank, len(addresses), timeout
        self.room, self.turns = room, turns
        self.device = heap.device
        num_bytes, control_bytes = room.num_bytes(self.num_ranks)
        assert heap.numel() >= num_bytes
        self.num_bytes = heap.numel()
        heap[:control_bytes].zero_()
        self._state = torch.zeros(_cuda.STATE_BYTES, dtype=torch.uint8, device=self.device)
        self._fault = pinned_zeros(_cuda.FAULT_BYTES)
        self.domain = self._make_domain(addresses, shrinks)
        torch.cuda.current_stream(self.device).synchronize()

    def _make_domain(self, addresses: list[int], shrinks: bool) -> _cuda.LowLatencyDomain:
        return _cuda.LowLatencyDomain(
            rank=self.rank,
            heaps=addresses,
            max_local_experts=self.room.num_local_experts,
            max_tokens=self.room.num_max_tokens,
            max_topk=self.room.num_topk,
            max_row_bytes=2 * self.room.hidden,
            entry_stretches=self.room.entry_stretches,
            state=self._state.data_ptr(),
            fault=self._fault.data_ptr(),
            timeout_seconds=self.timeout,
            shrinks=shrinks,
            turns=self.turns,
        )

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
        waits: Tensor | None = None,
    ) -> None:
        """Launches a dispatch of x [T, H] bf16, or half of one. It fills the plan.

        waits: [R] int64, to which nanoseconds waited for each rank are added.
        """
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
            waits=0 if waits is None else waits.data_ptr(),
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
        in_logfmt: bool = False,
        waits: Tensor | None = None,
    ) -> None:
        """Launches a combine of x [L, R*M, H] bf16 into out [T, H] bf16, or half of one, along the plan.

        topk_idx [T, K] must be the dispatch's, and so must topk_weights, where those travelled with it.
        in_logfmt: rows travel so; H is a multiple of 128 then. waits: as of a dispatch.
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
            returned=(RETURNS_ENTRIES if form.entry_stretches else RETURNS_SUMS) | in_logfmt,
            out=out.data_ptr(),
            waits=0 if waits is None else waits.data_ptr(),
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
            self.domain.combine(
                **call, weights_travelled=True, returned=0, out=0, refused=True, elsewhere=elsewhere
            )
            return
        received = dict.fromkeys(("recv_x", "recv_scales", "recv_count", "recv_source", "recv_range"), 0)
        call |= received | dict.fromkeys(("weights_travel", "casts", "rounds_scales", "packs_scales"), 0)
        self.domain.dispatch(**call, refused=True, elsewhere=elsewhere)

    def masked(self) -> int:
        """The ranks that kernels have masked, as bits, as far as the host has seen."""
        return self.domain.masked()

    def masked_word(self) -> Tensor:
        """[] int32 on the device: the same, as the next kernel finds it."""
        return self._state.view(torch.int32)[_cuda.MASKED_OFFSET // 4]

    def wait(self) -> None:
        """Blocks the host, without the GIL, until the operation launched last has ended."""
        self.domain.wait()

    def take_fault(self, stream: int) -> FaultRecord | None:
        """The fault that a kernel has recorded since the last call, if one has; its notes on the device are
        cleared on `stream`, behind the operations launched so far.
        """
        found = self.domain.take_fault(stream)
        return None if found is None else fault_record(found, self.rank, self.num_ranks, self.timeout)
