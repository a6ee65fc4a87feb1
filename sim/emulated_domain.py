"""R emulated ranks of one NVLink domain: their memory, and the launches of the kernels on it.

What deepep.engine.nvlink is to real memory, for runs that `deepep.sim.emulated` judges: addresses instead of
tensors, and every read and write of a host is checked by the machine as well.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens of a rank, H hidden size, N rows received, P scales.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from deepep import _emulator
from deepep.sim import oracle
from deepep.sim.cases import Case
from deepep.sim.observed import Array, RankView, bits
from deepep.sim.values import RankInputs

_MARK_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The shape of each rank's GPU, and how a launch uses it.

    num_blocks: blocks of a launch, of which the first push_blocks write to other ranks and the last
    local_blocks work on rows that stay. num_sms: how many blocks are resident together; 0 is all.
    timeout: seconds a kernel waits for a peer.
    """

    num_blocks: int = 2
    num_threads: int = 128
    push_blocks: int = 1
    local_blocks: int = 1
    num_sms: int = 0
    timeout: float = 1.0


@dataclass(frozen=True)
class Fault:
    """A kernel's fault record (csrc/kernels/args.hpp)."""

    operation: int
    phase: int
    waited_on: tuple[int, ...]
    expected: int
    seen: int


class HostCounts(NamedTuple):
    """What a dispatch tells the host (csrc/kernels/args.hpp): `per_expert` int64 [L], not aligned."""

    phase: int
    num_rows: int
    most_rows: int
    per_expert: Array


class Layout(NamedTuple):
    """Addresses of one rank's dispatch layout: int32 [R], [D] (or 0), [E], and bytes [T, R]."""

    per_rank: int
    per_node: int
    per_expert: int
    in_rank: int


class Plan(NamedTuple):
    """Addresses of a handle: counts [R, R] and send_row [T, R], int32."""

    counts: int
    send_row: int


class EmulatedDomain:
    """All ranks' heaps, and the product's kernels on them. Of the cases it needs the shapes alone."""

    def __init__(self, machine: Any, cases: Sequence[Case], gpu: Gpu, kernels: Any) -> None:
        self.machine = machine
        self.gpu = gpu
        self.num_ranks = ranks = cases[0].num_ranks
        max_local_experts = max(case.num_local_experts for case in cases)
        control = _emulator.control_bytes(ranks, max_local_experts, gpu.num_blocks)
        # Every token may come back from every rank, and a staged row needs a flag's share of the area.
        rows = 1 + ranks * max(max(case.num_tokens) for case in cases)
        row_bytes = max(2 * case.hidden + 16 * case.num_topk for case in cases)
        staging = rows * max(1024, row_bytes) + 4096
        self._slots_begin = control + staging
        self._slot_bytes = max(self._slot(case)[-1] for case in cases)
        self._marks = self._slots_begin + 2 * self._slot_bytes
        heap_bytes = self._marks + 2 * _MARK_BYTES
        self._heaps = [self._allocate(f"heap@{r}", "symmetric", r, heap_bytes) for r in range(ranks)]
        self._faults = [self._zeros(f"fault@{r}", "host", r, _emulator.FAULT_BYTES) for r in range(ranks)]
        self._states = [self._zeros(f"state@{r}", "device", r, _emulator.STATE_BYTES) for r in range(ranks)]
        counts_bytes = _emulator.host_counts_bytes(max_local_experts)
        self._counts = [self._zeros(f"counts@{r}", "host", r, counts_bytes) for r in range(ranks)]
        zeroed = control + _emulator.staging_rows_begin(staging, row_bytes, 0)
        self._domains = []
        for rank in range(ranks):
            # Only what holds flags: rows that are read before they are written shall be found out.
            machine.write(rank, self._heaps[rank], bytes(zeroed))
            self._domains.append(
                _emulator.Domain(
                    machine=machine,
                    kernels=kernels,
                    num_threads=gpu.num_threads,
                    rank=rank,
                    heaps=self._heaps,
                    max_local_experts=max_local_experts,
                    max_blocks=gpu.num_blocks,
                    staging_bytes=staging,
                    state=self._states[rank],
                    fault=self._faults[rank],
                    timeout_seconds=gpu.timeout,
                )
            )
        machine.meet()
        self._tickets = [0] * ranks
        self._slots_lent = [0] * ranks

    # ---- layout --------------------------------------------------------------------------------------------

    def given_layout(self, rank: int, expected: RankView) -> Layout:
        """The layout as the host hands it in."""
        in_rank = _given(expected.is_token_in_rank).view(np.uint8)
        return Layout(
            self._put(f"tokens_per_rank@{rank}", rank, _given(expected.num_tokens_per_rank)),
            0,
            self._put(f"tokens_per_expert@{rank}", rank, _given(expected.num_tokens_per_expert)),
            self._put(f"is_token_in_rank@{rank}", rank, in_rank),
        )

    def layout(self, rank: int, case: Case, given: RankInputs) -> Layout:
        """Launches the layout kernel; returns where its results will be."""
        ranks, experts = self.num_ranks, case.num_experts
        nodes = -(-ranks // case.options.ranks_per_node)
        out = Layout(
            self._allocate(f"tokens_per_rank@{rank}", "device", rank, 4 * ranks),
            self._allocate(f"tokens_per_node@{rank}", "device", rank, 4 * nodes) if nodes > 1 else 0,
            self._allocate(f"tokens_per_expert@{rank}", "device", rank, 4 * experts),
            self._allocate(f"is_token_in_rank@{rank}", "device", rank, case.num_tokens[rank] * ranks),
        )
        self._domains[rank].layout(
            num_experts=experts,
            ranks_per_node=case.options.ranks_per_node,
            num_topk=case.num_topk,
            index_bytes=given.topk_idx.element_size(),
            num_tokens=case.num_tokens[rank],
            topk_idx=self._put(f"topk_idx@{rank}", rank, given.topk_idx.numpy()),
            tokens_per_rank=out.per_rank,
            tokens_per_node=out.per_node,
            tokens_per_expert=out.per_expert,
            is_token_in_rank=out.in_rank,
            workspace=self._zeros(f"workspace@{rank}", "device", rank, 4 * (experts + ranks + nodes + 1)),
            num_blocks=self.gpu.num_blocks,
            num_threads=32,  # fewer tokens reach a second block, and a thread's second turn
        )
        return out

    def take_layout(self, rank: int, case: Case, layout: Layout, view: RankView) -> None:
        ranks, tokens = self.num_ranks, case.num_tokens[rank]
        view.num_tokens_per_rank = self._read(rank, layout.per_rank, np.int32, (ranks,))
        if layout.per_node:
            nodes = -(-ranks // case.options.ranks_per_node)
            view.num_tokens_per_node = self._read(rank, layout.per_node, np.int32, (nodes,))
        view.num_tokens_per_expert = self._read(rank, layout.per_expert, np.int32, (case.num_experts,))
        view.is_token_in_rank = self._read(rank, layout.in_rank, np.bool_, (tokens, ranks))

    # ---- dispatch ------------------------------------------------------------------------------------------

    def new_plan(self, rank: int, case: Case) -> Plan:
        """Room for a handle; the dispatch fills it."""
        ranks, tokens = self.num_ranks, case.num_tokens[rank]
        return Plan(
            self._allocate(f"handle counts@{rank}", "device", rank, 4 * ranks * ranks),
            self._allocate(f"send_row@{rank}", "device", rank, 4 * tokens * ranks),
        )

    def dispatch(
        self,
        rank: int,
        case: Case,
        given: RankInputs,
        layout: Layout,
        plan: Plan,
        *,
        cached: bool,
        capacity: int | None = None,
    ) -> int:
        """Launches a dispatch; returns the address of the slot it lends, one of two in turn.

        Where the host waits for the counts, the machine's watch of them is set up. capacity: rows of the
        slot; default the most that can come.
        """
        options = case.options
        slot = self._slots_begin + self._slots_lent[rank] % 2 * self._slot_bytes
        self._slots_lent[rank] += 1
        has_topk = options.topk and not cached
        waits = not cached and options.worst == "off"
        scales_at, token_stride, group_stride = 0, 0, 0
        if given.scales is not None:
            # All of the storage, so that the strides the kernel is given are the case's.
            storage = torch.empty(0, dtype=given.scales.dtype).set_(given.scales.untyped_storage())
            scales_at = self._put(f"scales@{rank}", rank, bits(storage)) + 4 * int(
                given.scales.storage_offset()
            )
            token_stride, group_stride = map(int, given.scales.stride())
        if waits:
            self._tickets[rank] += 1
        self._set_live(rank, case.dispatch_members)
        self._domains[rank].dispatch(
            num_blocks=self.gpu.num_blocks,
            push_blocks=self.gpu.push_blocks,
            local_blocks=self.gpu.local_blocks,
            refused=False,
            cached=cached,
            num_tokens=case.num_tokens[rank],
            num_topk=case.num_topk if has_topk else 0,
            num_local_experts=case.num_local_experts,
            num_scales=0 if given.scales is None else given.scales.shape[1],
            index_bytes=given.topk_idx.element_size(),
            row_bytes=given.x.shape[1] * given.x.element_size(),
            x=self._put(f"x@{rank}", rank, bits(given.x)),
            scales=scales_at,
            scale_token_stride=token_stride,
            scale_stride=group_stride,
            topk_idx=self._put(f"topk_idx@{rank}", rank, given.topk_idx.numpy()) if has_topk else 0,
            topk_weights=self._put(f"topk_weights@{rank}", rank, bits(given.topk_weights)) if has_topk else 0,
            is_token_in_rank=layout.in_rank,
            tokens_per_rank=layout.per_rank,
            tokens_per_expert=layout.per_expert,
            counts=plan.counts,
            send_row=plan.send_row,
            slot_offset=slot,
            slot_capacity=self._capacity(case) if capacity is None else capacity,
            num_worst_tokens=0 if cached else oracle.worst_tokens(case),
            host=self._counts[rank] if waits else 0,
            ticket=self._tickets[rank],
        )
        if waits:
            self.machine.watch_tags(
                rank=rank,
                address=self._counts[rank],
                count=_emulator.HOST_COUNTS_WORDS + case.num_local_experts,
                tag=self._tickets[rank],
                timeout_ns=int(10e9 * self.gpu.timeout),
            )
        return self._heaps[rank] + slot

    @staticmethod
    def host_counts(words: Sequence[int]) -> HostCounts:
        """What the watched words of a dispatch say."""
        values = [word & 0xFFFFFFFF for word in words]
        phase, num_rows, most_rows = values[:3]
        per_expert = np.array(values[_emulator.HOST_COUNTS_WORDS :], dtype=np.int64)
        return HostCounts(phase, num_rows, most_rows, per_expert)

    def take_rows(self, rank: int, case: Case, slot: int, rows: int, view: RankView) -> None:
        """Reads `rows` received rows as the user's kernels would, right after the dispatch."""
        options = case.options
        source_at, scales_at, idx_at, weights_at, _ = self._slot(case)
        element = np.uint16 if options.payload == "bf16" else np.uint8
        view.recv_x = self._read(rank, slot, element, (rows, case.hidden))
        if options.payload != "bf16":
            view.recv_scales = self._read(rank, slot + scales_at, np.uint32, (rows, options.scale_columns))
        view.src_token = self._read(rank, slot + source_at, np.int32, (rows,))
        if options.topk and view.num_rows is not None:
            index = np.int32 if options.idx_dtype == "int32" else np.int64
            view.recv_topk_idx = self._read(rank, slot + idx_at, index, (view.num_rows, case.num_topk))
            view.recv_topk_weights = self._read(rank, slot + weights_at, np.uint32, (rows, case.num_topk))

    # ---- combine -------------------------------------------------------------------------------------------

    def combine(
        self, rank: int, case: Case, given: RankInputs, plan: Plan, slot: int, rows: int
    ) -> tuple[int, int]:
        """Launches a combine of the slot's rows or of others; returns where rows and weights will be."""
        options, tokens = case.options, case.num_tokens[rank]
        x = slot
        if options.combine_rows != "same":
            # Their values depend on how many there are, the rows past the last received included.
            others = oracle.returned_rows(case, rank, torch.empty(oracle.worst_tokens(case) or rows, 0))
            x = self._put(f"returned x@{rank}", rank, bits(others))
        biases = [self._put(f"bias{i}@{rank}", rank, bits(b)) for i, b in enumerate(given.biases)] + [0, 0]
        out = self._allocate(f"out@{rank}", "device", rank, 2 * tokens * case.hidden)
        out_weights = 0
        if options.combine_weights:
            out_weights = self._allocate(f"out weights@{rank}", "device", rank, 4 * tokens * case.num_topk)
        self._set_live(rank, case.members)
        self._domains[rank].combine(
            num_blocks=self.gpu.num_blocks,
            push_blocks=self.gpu.push_blocks,
            reduce_blocks=self.gpu.local_blocks,
            refused=False,
            num_tokens=tokens,
            num_topk=case.num_topk if options.combine_weights else 0,
            row_bytes=2 * case.hidden,
            x=x,
            topk_weights=slot + self._slot(case)[3] if options.combine_weights else 0,
            bias_0=biases[0],
            bias_1=biases[1],
            counts=plan.counts,
            send_row=plan.send_row,
            out=out,
            out_weights=out_weights,
        )
        return out, out_weights

    def take_sums(self, rank: int, case: Case, outputs: tuple[int, int], view: RankView) -> None:
        out, out_weights = outputs
        tokens = case.num_tokens[rank]
        view.combined_x = self._read(rank, out, np.uint16, (tokens, case.hidden))
        if out_weights:
            view.combined_weights = self._read(rank, out_weights, np.uint32, (tokens, case.num_topk))

    # ---- barrier and faults --------------------------------------------------------------------------------

    def barrier(self, rank: int, index: int) -> None:
        """Leaves a mark in the rank's own heap (one of two, in turn) and launches a barrier."""
        mark = self._heaps[rank] + self._marks + index % 2 * _MARK_BYTES
        self.machine.write(rank, mark, struct.pack("I", index))
        self._domains[rank].barrier()

    def read_marks(self, rank: int, index: int) -> None:
        """Reads all ranks' marks, which the barrier has put behind this rank."""
        for heap in self._heaps:
            mark = self.machine.read(rank, heap + self._marks + index % 2 * _MARK_BYTES, 4)
            assert struct.unpack("I", mark) == (index,)

    def watch_fault(self, rank: int) -> None:
        """The host looks out for a fault record until its stream is idle."""
        patience = int(100e9 * self.gpu.timeout)
        self.machine.watch(rank, self._domains[rank].fault_word, 1, patience, True)

    def take_fault(self, rank: int, *, watched: bool) -> Fault | None:
        """The rank's fault record, if there is one. watched: while the kernel runs; the record then stays."""
        found = self._domains[rank].take_fault(watched)
        if found is None:
            return None
        operation, phase, missing, expected, seen = found
        waited_on = tuple(r for r in range(self.num_ranks) if missing >> r & 1)
        return Fault(operation, phase, waited_on, expected, seen)

    # ---- memory --------------------------------------------------------------------------------------------

    def _slot(self, case: Case) -> tuple[int, int, int, int, int]:
        """Offsets in a receive slot: source, scales, topk_idx, topk_weights, end."""
        options = case.options
        is_bf16 = options.payload == "bf16"
        source, scales, idx, weights, end = _emulator.slot_offsets(
            self._capacity(case),
            case.hidden * (2 if is_bf16 else 1),
            0 if is_bf16 else options.scale_columns,
            case.num_topk if options.topk else 0,
            4 if options.idx_dtype == "int32" else 8,
        )
        return source, scales, idx, weights, end

    @staticmethod
    def _capacity(case: Case) -> int:
        return max(1, sum(case.num_tokens), oracle.worst_tokens(case))

    def _set_live(self, rank: int, members: tuple[int, ...]) -> None:
        self._domains[rank].set_live(sum(1 << r for r in members))

    def _allocate(self, name: str, space: str, rank: int, size: int) -> int:
        return int(self.machine.allocate(name, space, rank, size))

    def _zeros(self, name: str, space: str, rank: int, size: int) -> int:
        address = self._allocate(name, space, rank, size)
        self.machine.write(rank, address, bytes(size))
        return address

    def _put(self, name: str, rank: int, array: Array) -> int:
        address = self._allocate(name, "device", rank, array.nbytes)
        self.machine.write(rank, address, np.ascontiguousarray(array).reshape(-1))
        return address

    def _read(self, rank: int, address: int, dtype: Any, shape: tuple[int, ...]) -> Array:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.machine.read(rank, address, count), dtype=dtype).reshape(shape)


def _given(array: Array | None) -> Array:
    assert array is not None
    return array
