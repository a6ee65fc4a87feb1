"""One rank of an NVLink domain: tensors in, kernel launches out.

An `Endpoint` knows no process group and no stream policy: it is given the heaps of all ranks, as mapped here,
and a stream for every call. Ranks may be processes of one node (memory/ipc.py) or virtual ranks of one
process that share a GPU; nothing here can tell. csrc/kernels explains the protocol of each kernel.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens here, H hidden, N rows received, P scales per row.
"""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple

import torch

from deepep import _cuda
from deepep.backends.cuda.memory.arrays import ReceiveArrays
from deepep.backends.cuda.sm_split import NO_ENGINE, BlockSplit
from deepep.errors import FaultRecord

MAX_LOCAL_EXPERTS = 1024
MAX_BLOCKS = 256
MAX_TOPK = 32
MAX_RANKS: int = _cuda.MAX_RANKS


class Phase(IntFlag):
    """Why a kernel gave up; the numbers are csrc/kernels/common/args.hpp's."""

    COUNTS = 1
    ROWS = 2
    STAGING = 4
    RETURN = 8
    ARRIVAL = 16
    ENGINE = 32
    TOO_MANY_ROWS = 64
    DISAGREEMENT = 128
    OVERWRITTEN = 256


OPERATIONS = {1: "dispatch", 2: "combine", 3: "barrier"}


class Plan:
    """What combine and cached dispatches need of a dispatch.

    table [T + R, R] int32: send_row, then counts; one block, of the stream that the dispatch ran on.
    num_tokens: T. num_rows: rows handed out. live: ranks that took part, bits. known: the counts, if the host
    knows them. repeated: the last cached dispatch along it: for what, and what such calls pass alike.
    """

    __slots__ = ("known", "live", "num_rows", "num_tokens", "repeated", "table")

    def __init__(self, table: torch.Tensor, num_tokens: int, num_rows: int, live: int) -> None:
        self.table = table
        self.num_tokens = num_tokens
        self.num_rows = num_rows
        self.live = live
        self.known: _cuda.RowCounts | None = None
        self.repeated: tuple[tuple[object, ...], _cuda.CachedDispatch] | None = None

    @property
    def send_row(self) -> torch.Tensor:
        """[T, R] int32: the final row of each token at each rank, or -1."""
        return self.table[: self.num_tokens]

    @property
    def counts(self) -> torch.Tensor:
        """[R, R] int32: rows from rank s to rank d."""
        return self.table[self.num_tokens :]

    def addresses(self) -> tuple[int, int]:
        """Of counts and of send_row."""
        begin, ranks = self.table.data_ptr(), self.table.shape[1]
        return begin + 4 * ranks * self.num_tokens, begin


class Counts(NamedTuple):
    """What the host learns while a dispatch runs."""

    phase: int
    num_rows: int
    most_rows: int
    returning: int
    table: _cuda.RowCounts
    per_expert: list[int]


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Endpoint:
    """The operations of one rank on its NVLink domain.

    heap: this rank's symmetric memory, uint8 [B] on the device. addresses: where each rank's heap is mapped
    here; all heaps are alike in size. staging_bytes: the part of the heap that rows return to. timeout:
    seconds a kernel waits for a peer before it leaves with a fault record.
    """

    def __init__(
        self, rank: int, heap: torch.Tensor, addresses: list[int], *, staging_bytes: int, timeout: float
    ) -> None:
        self.rank = rank
        self.num_ranks = len(addresses)
        self.heap = heap
        self.device = heap.device
        self.live = (1 << self.num_ranks) - 1
        self.timeout = timeout
        self.staging_bytes = staging_bytes
        #: where the part of the heap begins that dispatches receive in
        self.pool_begin = _cuda.control_bytes(self.num_ranks, MAX_LOCAL_EXPERTS, MAX_BLOCKS) + staging_bytes
        heap[: self.pool_begin].zero_()
        self._state = torch.zeros(_cuda.STATE_BYTES, dtype=torch.uint8, device=self.device)
        self._fault = torch.zeros(_cuda.FAULT_BYTES, dtype=torch.uint8, pin_memory=True)
        self._host = torch.zeros(
            _cuda.host_counts_bytes(self.num_ranks, MAX_LOCAL_EXPERTS), dtype=torch.uint8, pin_memory=True
        )
        self._host_address = self._host.data_ptr()
        self._ticket = 0
        # Experts, ranks, domains, a counter: made here, for its zeros must not be part of a captured graph.
        self._workspace = torch.zeros(
            (MAX_LOCAL_EXPERTS + 2) * self.num_ranks + 1, dtype=torch.int32, device=self.device
        )
        self._no_counts = torch.zeros(self.num_ranks**2, dtype=torch.int32, device=self.device)
        self._domain = _cuda.Domain(
            rank,
            addresses,
            MAX_LOCAL_EXPERTS,
            MAX_BLOCKS,
            staging_bytes,
            self._state.data_ptr(),
            self._fault.data_ptr(),
            timeout,
        )
        torch.cuda.current_stream(self.device).synchronize()

    def set_live(self, live: int) -> None:
        """Ranks that take part in the calls to come, as bits. All live ranks must set the same."""
        self.live = live
        self._domain.set_live(live)

    # Operations run in the order of their launches, also on different streams: Turns, in
    # csrc/bindings/cuda.cpp.

    def layout(
        self, topk_idx: torch.Tensor, num_experts: int, ranks_per_domain: int, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Launches a layout of topk_idx [T, K].

        Returns tokens per rank [R] int32, per domain [D] int32 or None, per expert [E] int32, and
        token-in-rank [T, R] bool.
        """
        tokens, topk = topk_idx.shape
        ranks = self.num_ranks
        domains = -(-ranks // ranks_per_domain)
        ints = torch.empty(ranks + domains + num_experts, dtype=torch.int32, device=self.device)
        per_rank, per_domain, per_expert = ints.split([ranks, domains, num_experts])
        in_rank = torch.empty((tokens, ranks), dtype=torch.bool, device=self.device)
        wide = domains > 1
        self._domain.layout(
            ranks,
            num_experts,
            ranks_per_domain,
            topk,
            topk_idx.element_size(),
            tokens,
            topk_idx.data_ptr(),
            per_rank.data_ptr(),
            per_domain.data_ptr() if wide else 0,
            per_expert.data_ptr(),
            in_rank.data_ptr(),
            self._workspace.data_ptr(),
            max(1, min(8, tokens // 1024)),
            stream,
        )
        return per_rank, per_domain if wide else None, per_expert, in_rank

    def new_plan(self, num_tokens: int, num_rows: int) -> Plan:
        """An empty plan for a fresh dispatch, in memory of the current stream."""
        ranks = self.num_ranks
        table = torch.empty((num_tokens + ranks, ranks), dtype=torch.int32, device=self.device)
        return Plan(table, num_tokens, num_rows, self.live)

    def dispatch(
        self,
        x: torch.Tensor,
        received: ReceiveArrays,
        split: BlockSplit,
        stream: int,
        plan: Plan,
        *,
        scales: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor,
        tokens_per_rank: torch.Tensor,
        tokens_per_expert: torch.Tensor | None = None,
        num_worst_tokens: int = 0,
        tell_host: bool = False,
    ) -> None:
        """Launches a dispatch whose rows arrive in `received`, arrays of this rank's heap, and which fills
        the plan. tell_host: `wait_counts` will be called.
        """
        num_scales = stride_token = stride_scale = 0
        if scales is not None:
            num_scales = scales.shape[1]
            stride_token, stride_scale = scales.stride()
        if tell_host:
            self._ticket = self._ticket % 0xFFFFFFFF + 1
        self._domain.dispatch(
            split.total,
            split.remote,
            split.local,
            False,
            x.shape[0],
            0 if topk_idx is None else topk_idx.shape[1],
            0 if tokens_per_expert is None else tokens_per_expert.shape[0] // self.num_ranks,
            num_scales,
            8 if topk_idx is None else topk_idx.element_size(),
            x.shape[1] * x.element_size(),
            x.data_ptr(),
            _address(scales),
            stride_token,
            stride_scale,
            _address(topk_idx),
            _address(topk_weights),
            is_token_in_rank.data_ptr(),
            tokens_per_rank.data_ptr(),
            _address(tokens_per_expert),
            *plan.addresses(),
            received.x.data_ptr(),
            _address(received.source),
            _address(received.scales),
            _address(received.topk_idx),
            _address(received.topk_weights),
            received.x.shape[0],
            num_worst_tokens,
            self._host_address if tell_host else 0,
            self._ticket,
            stream,
        )

    def dispatch_cached(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        received: ReceiveArrays,
        split: BlockSplit,
        stream: int,
        plan: Plan,
    ) -> None:
        """Launches a dispatch along the plan's routing."""
        num_scales, strides = (0, (0, 0)) if scales is None else (scales.shape[1], scales.stride())
        # Splits are made once: the same is the same object.
        kind = (x.shape[1], x.dtype, num_scales, strides, split, received.x.shape[0])
        if plan.repeated is None or plan.repeated[0] != kind:
            call = _cuda.CachedDispatch(
                *(split.total, split.remote, split.local, plan.num_tokens),
                *(num_scales, x.shape[1] * x.element_size(), *strides),
                *plan.addresses(),
                received.x.shape[0],
            )
            plan.repeated = kind, call
        made = [received.x] if received.scales is None else [received.x, received.scales]
        self.repeat(plan.repeated[1], (x.data_ptr(), _address(scales)), made, stream)

    def repeat(
        self, call: _cuda.CachedDispatch, given: tuple[int, int], made: list[torch.Tensor], stream: int
    ) -> None:
        """Launches a cached dispatch that tells the kernel the same as an earlier one, but for addresses.

        given: of x and of scales, 0 for none. made: what is received into, rows and then scales.
        """
        recv_scales = made[1].data_ptr() if len(made) > 1 else 0
        self._domain.dispatch_cached(call, *given, made[0].data_ptr(), recv_scales, stream)

    def wait_counts(self, num_local_experts: int) -> Counts | None:
        """The counts of the dispatch launched last with `tell_host`; None if the deadline passed.

        Releases the GIL while it waits.
        """
        # The kernel reports a missing peer at its own deadline; the host allows for its start on top.
        seen = _cuda.wait_counts(
            self._host_address, self._ticket, self.num_ranks, num_local_experts, self.timeout + 30.0
        )
        return None if seen is None else Counts(*seen)

    def refuse_dispatch(self, stream: int) -> None:
        """Launches a dispatch that only tells the others that this rank takes no part."""
        nothing = self.heap[:0]
        self._domain.dispatch(
            *(1, 1, 1, True, 0, 0, 0, 0, 8, 16),
            *(nothing.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0),
            *(self._no_counts.data_ptr(), self._no_counts.data_ptr()),
            *(nothing.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, stream),
        )

    def refuse_combine(self, stream: int) -> None:
        """The same for a combine."""
        self._domain.combine(
            *(1, 1, 1, True, 0, 0, 16, 0, 0, 0, 0),
            *(self._no_counts.data_ptr(), self._no_counts.data_ptr(), 0, 0, None, 0, 100, stream),
        )

    def staging_capacity(self, row_bytes: int, num_topk: int) -> int:
        """How many rows may come back to this rank in one combine."""
        return int(_cuda.staging_capacity(self.staging_bytes, row_bytes, num_topk))

    def combine(
        self,
        x: torch.Tensor,
        plan: Plan,
        split: BlockSplit,
        stream: int,
        *,
        topk_weights: torch.Tensor | None = None,
        biases: tuple[torch.Tensor, ...] = (),
        out: torch.Tensor,
        out_weights: torch.Tensor | None = None,
        engine_cut: tuple[int, int] = NO_ENGINE,
    ) -> None:
        """Launches a combine of x [N, H] bf16 into out [T, H] bf16, and of weights [N, K] into [T, K].

        engine_cut: if its first is not 0 and the host knows the counts, the copy engine returns the rows, in
        so many parts, each so many percent of the one before, and SMs only sum. Not so in a captured call.
        """
        self._domain.combine(
            split.total,
            split.remote,
            split.local,
            False,
            plan.num_tokens,
            0 if topk_weights is None else topk_weights.shape[1],
            out.shape[1] * out.element_size(),
            x.data_ptr(),
            _address(topk_weights),
            _address(biases[0] if biases else None),
            _address(biases[1] if len(biases) > 1 else None),
            *plan.addresses(),
            out.data_ptr(),
            _address(out_weights),
            plan.known,
            *engine_cut,
            stream,
        )

    def barrier(self, stream: int) -> None:
        """Launches a barrier of all live ranks."""
        self._domain.barrier(stream)

    def follow(self, before: int, stream: int) -> None:
        """What `stream` gets from now on runs after what the stream `before` holds now."""
        self._domain.follow(before, stream)

    def wait(self) -> None:
        """Blocks the host, without the GIL, until the operation launched last has ended."""
        self._domain.wait()

    @property
    def has_fault(self) -> bool:
        """Whether a kernel has recorded a fault that was not taken."""
        return self._domain.has_fault()

    def take_fault(self, stream: int) -> FaultRecord | None:
        """The fault that a kernel has recorded since the last call, if one has; its notes on the device are
        cleared on `stream`, behind the operations launched so far.
        """
        found = self._domain.take_fault(stream)
        if found is None:
            return None
        operation, phase, missing, expected, seen = found
        return FaultRecord(
            operation=OPERATIONS.get(operation, str(operation)),
            phase=(Phase(phase).name or str(phase)).lower(),
            rank=self.rank,
            waited_on=tuple(r for r in range(self.num_ranks) if missing >> r & 1),
            expected=expected,
            seen=seen,
            seconds=self.timeout,
        )
