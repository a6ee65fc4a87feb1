"""One rank of an NVLink domain: tensors in, kernel launches out.

An `Endpoint` knows no process group and no stream policy: it is given the heaps of all ranks, as mapped here,
and a stream for every call. Ranks may be processes of one node (memory/ipc.py) or virtual ranks of one
process that share a GPU; nothing here can tell. csrc/kernels explains the protocol of each kernel.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens here, H hidden, N rows received, P scales per row.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Any

import torch

from deepep import _cuda
from deepep._cuda import Counts
from deepep.backends.cuda.memory.arrays import ExpandedArrays, ReceiveArrays
from deepep.backends.cuda.sm_split import NO_COPY_ENGINE, BlockSplit
from deepep.errors import FaultRecord

__all__ = ["MAX_BLOCKS", "MAX_LOCAL_EXPERTS", "Counts", "Endpoint", "Phase", "Plan"]

MAX_LOCAL_EXPERTS = 1024
MAX_BLOCKS = 256
#: With more tokens a layout runs before a dispatch by top-k.
MAX_COUNTED_TOKENS: int = _cuda.MAX_COUNTED_TOKENS
#: Up to so many, every block of such a dispatch counts where they go for itself (docs/kernels.md).
ALONE_TOKENS = 512


class Phase(IntFlag):
    """Reasons why a kernel gave up; the numbers are csrc/kernels/common/args.hpp's."""

    COUNTS = 1
    ROWS = 2
    STAGING = 4
    RETURN = 8
    ARRIVAL = 16
    COPY_ENGINE = 32
    TOO_MANY_ROWS = 64
    DISAGREEMENT = 128
    OVERWRITTEN = 256
    WEIGHTS = 512
    CREDIT = 1024
    TENSOR = 2048


_NAMES = (
    *("dispatch", "combine", "barrier", "low_latency_dispatch", "low_latency_combine"),
    *("pp_send", "pp_recv"),
)
OPERATIONS = dict(enumerate(_NAMES, start=1))


def fault_record(found: _cuda.FaultRecord, rank: int, num_ranks: int, timeout: float) -> FaultRecord:
    """A kernel's record as users see it."""
    return FaultRecord(
        operation=OPERATIONS.get(found.operation, str(found.operation)),
        phase=(Phase(found.phase).name or str(found.phase)).lower(),
        rank=rank,
        waited_on=tuple(r for r in range(num_ranks) if found.missing >> r & 1),
        expected=found.expected,
        seen=found.seen,
        seconds=timeout,
    )


class Plan:
    """A dispatch's plan: all that combine and cached dispatches need of it.

    table [T + R, R] int32: send_row, then counts; one block, of the stream that the dispatch ran on.
    num_tokens: T. num_rows: rows handed out. live: ranks that took part, bits. counts_address,
    send_row_address: of the table's two parts.

    known: the counts, if the host knows them; with it most_rows, the most that any rank receives, and
    returning, the rows that combine brings back from other ranks. source [N] int32: source token of each
    received row; None where it was not kept. in_rank [T, R] bool: of a fresh dispatch, which ranks each token
    goes to. stream: that the table belongs to.
    """

    __slots__ = (
        *("counts_address", "in_rank", "known", "live", "most_rows", "num_rows", "num_tokens", "returning"),
        *("send_row_address", "source", "stream", "table"),
    )

    def __init__(
        self, table: torch.Tensor, num_tokens: int, num_rows: int, live: int, stream: int = 0
    ) -> None:
        self.table = table
        self.num_tokens = num_tokens
        self.num_rows = num_rows
        self.live = live
        self.stream = stream
        self.send_row_address = table.data_ptr()
        self.counts_address = self.send_row_address + 4 * table.shape[1] * num_tokens
        self.known: _cuda.RowCounts | None = None
        self.most_rows: int | None = None
        self.returning: int | None = None
        self.source: torch.Tensor | None = None
        self.in_rank: torch.Tensor | None = None

    @property
    def send_row(self) -> torch.Tensor:
        """[T, R] int32: the final row of each token at each rank, or -1."""
        return self.table[: self.num_tokens]

    @property
    def counts(self) -> torch.Tensor:
        """[R, R] int32: rows from rank s to rank d."""
        return self.table[self.num_tokens :]


def pinned_zeros(num_bytes: int) -> torch.Tensor:
    """Memory of the host that kernels write to; on the CPU whatever torch's default device is."""
    return torch.zeros(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Endpoint:
    """The operations of one rank on its NVLink domain.

    heap: this rank's symmetric memory, uint8 [B] on the device. addresses: where each rank's heap is mapped
    here; all heaps are alike in size. staging_bytes: the part of the heap that rows return to. timeout:
    seconds a kernel waits for a peer before it leaves with a fault record. turns: of this rank, if other
    operations have them already.
    """

    def __init__(
        self,
        rank: int,
        heap: torch.Tensor,
        addresses: list[int],
        *,
        staging_bytes: int,
        timeout: float,
        turns: _cuda.Turns | None = None,
    ) -> None:
        self.rank = rank
        self.num_ranks = len(addresses)
        self.heap = heap
        self.device = heap.device
        self.live = (1 << self.num_ranks) - 1
        self.timeout = timeout
        self.staging_bytes = staging_bytes
        #: where the part of the heap begins that dispatches receive in
        self.pool_begin = self._reserved_bytes()
        heap[: self.pool_begin].zero_()
        self._state = torch.zeros(_cuda.STATE_BYTES, dtype=torch.uint8, device=self.device)
        self._fault = pinned_zeros(_cuda.FAULT_BYTES)
        self._host = pinned_zeros(_cuda.host_counts_bytes(self.num_ranks, MAX_LOCAL_EXPERTS))
        self._host_address = self._host.data_ptr()
        self._ticket = 0
        counting = _cuda.counting_bytes(self.num_ranks, MAX_LOCAL_EXPERTS)
        self._counting = torch.zeros(counting, dtype=torch.uint8, device=self.device)
        self._no_counts = torch.zeros(self.num_ranks**2, dtype=torch.int32, device=self.device)
        self.domain = self._make_domain(addresses, turns or _cuda.Turns())
        torch.cuda.current_stream(self.device).synchronize()

    def _reserved_bytes(self) -> int:
        """Bytes of the heap before the part that dispatches receive in."""
        return _cuda.control_bytes(self.num_ranks, MAX_LOCAL_EXPERTS, MAX_BLOCKS) + self.staging_bytes

    def _make_domain(self, addresses: list[int], turns: _cuda.Turns) -> _cuda.Domain:
        """The kernels' launcher, over memory that is there by then."""
        return _cuda.Domain(
            rank=self.rank,
            heaps=addresses,
            max_local_experts=MAX_LOCAL_EXPERTS,
            max_blocks=MAX_BLOCKS,
            staging_bytes=self.staging_bytes,
            state=self._state.data_ptr(),
            fault=self._fault.data_ptr(),
            counting=self._counting.data_ptr(),
            timeout_seconds=self.timeout,
            turns=turns,
        )

    def close(self) -> None:
        """Lets go of the heap: nothing is launched any more."""
        self.heap = self.heap[:0].clone()

    def set_live(self, live: int) -> None:
        """Ranks that take part in the calls to come, as bits. All live ranks must set the same."""
        self.live = live
        self.domain.set_live(live)

    def measure_waits(self, sums: torch.Tensor | None) -> None:
        """Has calls to come add to `sums` [4, R] int64 what they wait for each rank, in ns; None: nowhere."""
        self.domain.set_waits(_address(sums))

    # Operations run in the order of their launches, also on different streams: csrc/host/turns.hpp.

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
        tokens_per_rank: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
        num_local_experts: int = 0,
        num_worst_tokens: int = 0,
        post_counts: bool = False,
        payload: int = 0,
        expanded: ExpandedArrays | None = None,
    ) -> None:
        """Launches a dispatch whose rows arrive in `received`, arrays of this rank's heap, and which fills
        the plan. post_counts: `wait_counts` will be called. num_local_experts: if it is not 0, where tokens
        go is found out from topk_idx, and written to is_token_in_rank. payload: as of DispatchRequest.
        expanded: of those; rows are spread there as they come (csrc/kernels/dispatch/expanded.hpp).
        """
        launch: Any = self.domain.dispatch
        known: dict[str, Any]
        if num_local_experts:
            launch, known = self.domain.dispatch_topk, {"alone_tokens": ALONE_TOKENS}
            if expanded is not None:
                known["expanded"] = expanded.argument()
        else:
            known = {
                "tokens_per_rank": _address(tokens_per_rank),
                "tokens_per_expert": _address(tokens_per_expert),
            }
            if tokens_per_expert is not None:
                num_local_experts = tokens_per_expert.shape[0] // self.num_ranks
        num_scales, strides = (0, (0, 0)) if scales is None else (scales.shape[1], scales.stride())
        if post_counts:
            self._ticket = self._ticket % 0xFFFFFFFF + 1
        launch(
            blocks=split,
            num_tokens=x.shape[0],
            num_topk=0 if topk_idx is None else topk_idx.shape[1],
            num_local_experts=num_local_experts,
            num_scales=num_scales,
            index_bytes=8 if topk_idx is None else topk_idx.element_size(),
            row_bytes=x.shape[1] * x.element_size(),
            x=x.data_ptr(),
            scales=0 if scales is None else scales.data_ptr(),
            scale_strides=strides,
            topk_idx=0 if topk_idx is None else topk_idx.data_ptr(),
            topk_weights=0 if topk_weights is None else topk_weights.data_ptr(),
            is_token_in_rank=is_token_in_rank.data_ptr(),
            **known,
            counts=plan.counts_address,
            send_row=plan.send_row_address,
            recv_x=received.x.data_ptr(),
            recv_source=0 if received.source is None else received.source.data_ptr(),
            recv_scales=0 if received.scales is None else received.scales.data_ptr(),
            recv_topk_idx=0 if received.topk_idx is None else received.topk_idx.data_ptr(),
            recv_topk_weights=0 if received.topk_weights is None else received.topk_weights.data_ptr(),
            capacity=received.x.shape[0],
            num_worst_tokens=num_worst_tokens,
            host_counts=self._host_address if post_counts else 0,
            ticket=self._ticket,
            stream=stream,
            payload=payload,
        )

    def prepare_cached(
        self,
        x: torch.Tensor,
        scales: torch.Tensor | None,
        split: BlockSplit,
        capacity: int,
        plan: Plan,
        payload: int = 0,
    ) -> _cuda.CachedDispatch:
        """A dispatch along the plan's routing of rows like x and scales, into arrays for `capacity` rows:
        all but the addresses, which `domain.dispatch_cached` takes with it.
        """
        num_scales, strides = (0, (0, 0)) if scales is None else (scales.shape[1], scales.stride())
        return self.domain.prepare_cached(
            blocks=split,
            num_tokens=plan.num_tokens,
            num_scales=num_scales,
            row_bytes=x.shape[1] * x.element_size(),
            scale_strides=strides,
            counts=plan.counts_address,
            send_row=plan.send_row_address,
            capacity=capacity,
            payload=payload,
        )

    def wait_counts(self, num_local_experts: int) -> Counts | None:
        """The counts of the dispatch launched last with `post_counts`; None if the deadline passed.

        Releases the GIL while it waits.
        """
        # The kernel reports a missing peer at its own deadline; the host allows for its start on top.
        return _cuda.wait_counts(
            self._host_address, self._ticket, self.num_ranks, num_local_experts, self.timeout + 30.0
        )

    def refuse_dispatch(self, stream: int) -> None:
        """Launches a dispatch that only posts to the others that this rank takes no part."""
        self.domain.refuse_dispatch(self._no_counts.data_ptr(), stream)

    def refuse_combine(self, stream: int) -> None:
        """The same for a combine."""
        self.domain.refuse_combine(self._no_counts.data_ptr(), stream)

    def staging_capacity(self, row_bytes: int, num_topk: int) -> int:
        """The number of rows that may come back to this rank in one combine."""
        return _cuda.staging_capacity(self.staging_bytes, row_bytes, num_topk)

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
        ce_chunks: tuple[int, int] = NO_COPY_ENGINE,
        slots: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Launches a combine of x [N, H] bf16 into out [T, H] bf16, and of weights [N, K] into [T, K].

        slots, factors [N, K]: x [X, H] and weights [X] are of expanded rows (CombineRequest); ce_chunks are
        none then.

        ce_chunks: if its first is not 0 and the host knows the counts, the copy engine returns the rows, in
        so many parts, each so many percent of the one before, and SMs only sum. Not so in a captured call.
        """
        self.domain.combine(
            blocks=split,
            num_tokens=plan.num_tokens,
            num_topk=0 if out_weights is None else out_weights.shape[1],
            row_bytes=out.shape[1] * out.element_size(),
            x=x.data_ptr(),
            topk_weights=_address(topk_weights),
            bias_0=_address(biases[0] if biases else None),
            bias_1=_address(biases[1] if len(biases) > 1 else None),
            counts=plan.counts_address,
            send_row=plan.send_row_address,
            out=out.data_ptr(),
            out_weights=_address(out_weights),
            known=plan.known,
            ce_chunks=ce_chunks[0],
            ce_shrink=ce_chunks[1],
            stream=stream,
            source_token=_address(plan.source),
            num_entries=0 if slots is None else slots.shape[1],
            slots=_address(slots),
            factors=_address(factors),
        )

    def barrier(self, stream: int) -> None:
        """Launches a barrier of all live ranks."""
        self.domain.barrier(stream)

    def follow(self, before: int, stream: int) -> None:
        """Has what `stream` gets from now on run after what the stream `before` holds now."""
        self.domain.follow(before, stream)

    def wait(self) -> None:
        """Blocks the host, without the GIL, until the operation launched last has ended."""
        self.domain.wait()

    @property
    def has_fault(self) -> bool:
        """True if a kernel has recorded a fault that was not taken."""
        return self.domain.has_fault()

    def take_fault(self, stream: int) -> FaultRecord | None:
        """The fault that a kernel has recorded since the last call, if one has; its notes on the device are
        cleared on `stream`, behind the operations launched so far.
        """
        found = self.domain.take_fault(stream)
        return None if found is None else fault_record(found, self.rank, self.num_ranks, self.timeout)
