"""The ranks of an NVLink domain on an emulated machine: their memory, and launches of the kernels on it.

What deepep.backends.cuda.launch is to real memory. Calls name the rank; they enqueue, and the machine's `run`
carries out. Inputs are CPU tensors, copied into the machine; results are read back as tensors. Every read and
write of a host is checked by the machine, like any access of a kernel.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens of a rank, H hidden size, N rows received, P scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep import _emulator
from deepep.sim.emulator import expanded
from deepep.sim.emulator.calls import (
    CombineCall,
    DispatchCall,
    ExpandedAt,
    Gpu,
    HostCounts,
    KernelFault,
    LayoutAt,
    PlanAt,
    SlotContents,
)
from deepep.sim.emulator.lines import LAUNCHES, RankLines

_MARK_BYTES = 256


class Blocks(NamedTuple):
    """Blocks of a launch by role (csrc/host/calls.hpp)."""

    total: int
    remote: int
    local: int


class EmulatedDomain:
    """All ranks' heaps, each with control words, staging and two receive slots that take turns.

    staging_rows, row_bytes: how many rows return to a rank at most, and how long they are at most, weights
    included. slot_bytes: of each receive slot. Hosts meet once, when all memory is ready.
    """

    def __init__(
        self,
        machine: _emulator.Machine,
        kernels: _emulator.Kernels,
        gpu: Gpu,
        *,
        num_ranks: int,
        max_local_experts: int,
        staging_rows: int,
        row_bytes: int,
        slot_bytes: int,
    ) -> None:
        self.machine = machine
        self.gpu = gpu
        self.num_ranks = num_ranks
        self._blocks = Blocks(gpu.num_blocks, gpu.push_blocks, gpu.local_blocks)
        summing = gpu.reduce_blocks or gpu.local_blocks
        self._combine_blocks = Blocks(gpu.num_blocks, gpu.push_blocks, summing)
        everyone = range(num_ranks)
        control = _emulator.control_bytes(num_ranks, max_local_experts, gpu.num_blocks)
        # A staged row needs its flags' share of the area.
        staging = -(-(staging_rows + 1) * max(1024, row_bytes) // 128) * 128 + 4096  # receive slots follow
        self._slots_begin = control + staging
        self._slot_bytes = slot_bytes
        self._marks = self._slots_begin + 2 * slot_bytes
        heap_bytes = self._marks + 2 * _MARK_BYTES
        self._heaps = [self._allocate(f"heap@{r}", "symmetric", r, heap_bytes) for r in everyone]
        counts_bytes = _emulator.host_counts_bytes(num_ranks, max_local_experts)
        self._counts = [self._zeros(f"counts@{r}", "host", r, counts_bytes) for r in everyone]
        flags_end = control + _emulator.staging_rows_begin(staging, row_bytes, 0)
        self._domains = []
        for rank in everyone:
            # Only what holds flags: rows that are read before they are written shall be found out.
            machine.write(rank, self._heaps[rank], bytes(flags_end))
            state = self._zeros(f"state@{rank}", "device", rank, _emulator.STATE_BYTES)
            before = gpu.calls_before.to_bytes(4, "little")
            machine.write(rank, state, before * _emulator.EPOCHS)
            for word in _emulator.epoch_words(num_ranks, max_local_experts, gpu.num_blocks):
                machine.write(rank, self._heaps[rank] + word, before)
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
                    state=state,
                    fault=self._zeros(f"fault@{rank}", "host", rank, _emulator.FAULT_BYTES),
                    counting=self._zeros(
                        f"counting@{rank}",
                        "device",
                        rank,
                        _emulator.counting_bytes(num_ranks, max_local_experts),
                    ),
                    timeout_seconds=gpu.timeout,
                )
            )
        machine.meet()
        self._waits: dict[int, int] = {}
        self.expanded: dict[int, ExpandedAt] = {}  # of each rank's last dispatch that was to spread rows
        self._lines: dict[int, tuple[int, int]] = {}
        self._tickets = [0] * num_ranks
        self._slots_used = [0] * num_ranks

    def record_lines(self, rank: int) -> None:
        """The warps of the rank's next launches write time lines."""
        words = LAUNCHES * self.gpu.num_blocks * (self.gpu.num_threads // 32) * _emulator.LINE_WORDS
        self._lines[rank] = self._zeros(f"lines@{rank}", "device", rank, 8 * words), words
        self._domains[rank].open_lines(*self._lines[rank])

    def read_lines(self, rank: int) -> RankLines:
        """The time lines that they have written. Its stream has to be idle."""
        launches = self._domains[rank].close_lines()
        return RankLines(
            launches, self.read(rank, self._lines[rank][0], torch.int64, (self._lines[rank][1],))
        )

    def measure_waits(self, rank: int) -> None:
        """From now on the rank's calls add up how long they wait for the others."""
        self._waits[rank] = self._zeros(
            f"waits@{rank}", "device", rank, 8 * _emulator.NUM_WAITS * self.num_ranks
        )
        self._domains[rank].set_waits(self._waits[rank])

    def read_waits(self, rank: int) -> list[list[int]]:
        """Nanoseconds that it has waited for each rank, by what it waited for."""
        shape = (_emulator.NUM_WAITS, self.num_ranks)
        waits: list[list[int]] = self.read(rank, self._waits[rank], torch.int64, shape).tolist()
        return waits

    # ---- layout --------------------------------------------------------------------------------------------

    def given_layout(self, rank: int, per_rank: Tensor, per_expert: Tensor, in_rank: Tensor) -> LayoutAt:
        """A layout as the host hands it in: int32 [R], int32 [E], bool [T, R]."""
        return LayoutAt(
            self._put(f"tokens_per_rank@{rank}", rank, per_rank),
            0,
            self._put(f"tokens_per_expert@{rank}", rank, per_expert),
            self._put(f"is_token_in_rank@{rank}", rank, in_rank),
        )

    def layout_inside(self, rank: int, num_tokens: int) -> LayoutAt:
        """Memory for what a dispatch by top-k finds out: which ranks tokens go to; nothing else."""
        marks = self._allocate(f"is_token_in_rank@{rank}", "device", rank, num_tokens * self.num_ranks)
        return LayoutAt(0, 0, 0, marks)

    def read_marks_of(self, rank: int, at: LayoutAt, num_tokens: int) -> Tensor:
        """token-in-rank [T, R] bool."""
        return self.read(rank, at.in_rank, torch.bool, (num_tokens, self.num_ranks))

    def layout(self, rank: int, topk_idx: Tensor, num_experts: int, ranks_per_domain: int) -> LayoutAt:
        """Launches the layout kernel; returns where its results will be."""
        tokens, topk = topk_idx.shape
        ranks = self.num_ranks
        domains = -(-ranks // ranks_per_domain)
        at = LayoutAt(
            self._allocate(f"tokens_per_rank@{rank}", "device", rank, 4 * ranks),
            self._allocate(f"tokens_per_domain@{rank}", "device", rank, 4 * domains) if domains > 1 else 0,
            self._allocate(f"tokens_per_expert@{rank}", "device", rank, 4 * num_experts),
            self._allocate(f"is_token_in_rank@{rank}", "device", rank, tokens * ranks),
        )
        workspace = 4 * (num_experts + ranks + domains + 1)
        self._domains[rank].layout(
            num_ranks=ranks,
            num_experts=num_experts,
            ranks_per_domain=ranks_per_domain,
            num_topk=topk,
            index_bytes=topk_idx.element_size(),
            num_tokens=tokens,
            topk_idx=self._put(f"topk_idx@{rank}", rank, topk_idx),
            tokens_per_rank=at.per_rank,
            tokens_per_domain=at.per_domain,
            tokens_per_expert=at.per_expert,
            is_token_in_rank=at.in_rank,
            workspace=self._zeros(f"workspace@{rank}", "device", rank, workspace),
            num_blocks=self.gpu.num_blocks,
        )
        return at

    def read_layout(
        self, rank: int, at: LayoutAt, num_tokens: int, num_experts: int, ranks_per_domain: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(tokens per rank [R], per domain [D] or None, per expert [E], token-in-rank [T, R] bool)."""
        ranks = self.num_ranks
        domains = -(-ranks // ranks_per_domain)
        return (
            self.read(rank, at.per_rank, torch.int32, (ranks,)),
            self.read(rank, at.per_domain, torch.int32, (domains,)) if at.per_domain else None,
            self.read(rank, at.per_expert, torch.int32, (num_experts,)),
            self.read(rank, at.in_rank, torch.bool, (num_tokens, ranks)),
        )

    # ---- dispatch ------------------------------------------------------------------------------------------

    def new_plan(self, rank: int, num_tokens: int) -> PlanAt:
        """Room for a handle; a dispatch that is not cached fills it."""
        ranks = self.num_ranks
        return PlanAt(
            self._allocate(f"handle counts@{rank}", "device", rank, 4 * ranks * ranks),
            self._allocate(f"send_row@{rank}", "device", rank, 4 * num_tokens * ranks),
        )

    def given_plan(self, rank: int, counts: Tensor, send_row: Tensor) -> PlanAt:
        """A handle as an earlier dispatch left it: int32 [R, R] and [T, R]."""
        return PlanAt(
            self._put(f"handle counts@{rank}", rank, counts), self._put(f"send_row@{rank}", rank, send_row)
        )

    def read_plan(self, rank: int, at: PlanAt, num_tokens: int) -> tuple[Tensor, Tensor]:
        """counts [R, R] and send_row [T, R], int32."""
        ranks = self.num_ranks
        return (
            self.read(rank, at.counts, torch.int32, (ranks, ranks)),
            self.read(rank, at.send_row, torch.int32, (num_tokens, ranks)),
        )

    def dispatch(self, rank: int, call: DispatchCall, layout: LayoutAt, plan: PlanAt) -> int:
        """Launches a dispatch; returns the address of the slot that it receives in.

        Where it posts its counts to the host, the machine's watch of them is set up: run() returns with it.
        """
        size = call.slot.num_bytes + expanded.places_bytes(call)
        if size > self._slot_bytes:
            raise ValueError(f"a slot of {size} bytes; there are {self._slot_bytes}")
        slot = self._heaps[rank] + self._slots_begin + self._slots_used[rank] % 2 * self._slot_bytes
        self._slots_used[rank] += 1
        # Whoever used the slot before must be done with it, and no row of it may be read that did not arrive.
        self.machine.forget(rank, slot, size)
        scales, scales_at = call.scales, 0
        if scales is not None:
            # All of the storage, so that the strides the kernel is given are the caller's.
            storage = torch.empty(0, dtype=scales.dtype, device="cpu").set_(scales.untyped_storage())
            scales_at = self._put(f"scales@{rank}", rank, storage) + 4 * int(scales.storage_offset())
        self._set_live(rank, call.live)
        if call.refused:
            self._domains[rank].refuse_dispatch(plan.counts)
        elif call.cached:
            self._dispatch_cached(rank, call, plan, slot, scales_at)
        else:
            self._dispatch_anew(rank, call, layout, plan, slot, scales_at)
        return slot

    def _dispatch_anew(
        self, rank: int, call: DispatchCall, layout: LayoutAt, plan: PlanAt, slot: int, scales_at: int
    ) -> None:
        scales, at = call.scales, call.slot
        if call.posts_counts:
            self._tickets[rank] += 1
        launch: Any = self._domains[rank].dispatch
        known: dict[str, int] = {
            "tokens_per_rank": layout.per_rank,
            "tokens_per_expert": layout.per_expert,
        }
        if call.by_topk:
            launch, known = self._domains[rank].dispatch_topk, {"alone_tokens": self.gpu.alone_tokens}
        spread = {} if call.expansion is None else {"expanded": self._expand(rank, call, slot)}
        launch(
            blocks=self._blocks,
            num_tokens=call.x.shape[0],
            num_topk=0 if call.topk_idx is None else call.topk_idx.shape[1],
            num_local_experts=call.num_local_experts,
            num_scales=0 if scales is None else scales.shape[1],
            index_bytes=8 if call.topk_idx is None else call.topk_idx.element_size(),
            row_bytes=call.x.shape[1] * call.x.element_size(),
            x=self._put(f"x@{rank}", rank, call.x),
            scales=scales_at,
            scale_strides=(0, 0) if scales is None else scales.stride(),
            topk_idx=self._put_maybe(f"topk_idx@{rank}", rank, call.topk_idx),
            topk_weights=self._put_maybe(f"topk_weights@{rank}", rank, call.topk_weights),
            is_token_in_rank=layout.in_rank,
            **known,
            counts=plan.counts,
            send_row=plan.send_row,
            recv_x=slot,
            recv_source=slot + at.source,
            recv_scales=slot + at.scales,
            recv_topk_idx=slot + at.topk_idx,
            recv_topk_weights=slot + at.topk_weights,
            capacity=call.capacity,
            num_worst_tokens=call.num_worst_tokens,
            host_counts=self._counts[rank] if call.posts_counts else 0,
            ticket=self._tickets[rank],
            payload=call.payload,
            **spread,
        )
        if call.posts_counts:
            self.machine.watch_tags(
                rank=rank,
                address=self._counts[rank],
                count=_emulator.HOST_COUNTS_WORDS + self.num_ranks**2 + call.num_local_experts,
                tag=self._tickets[rank],
                timeout_ns=int(10e9 * self.gpu.timeout),
            )

    def _expand(self, rank: int, call: DispatchCall, slot: int) -> _emulator.ExpandedRows:
        self.expanded[rank] = expanded.place(self.machine, rank, call)
        return expanded.argument(self.machine, rank, call, self.expanded[rank], slot)

    def _dispatch_cached(
        self, rank: int, call: DispatchCall, plan: PlanAt, slot: int, scales_at: int
    ) -> None:
        scales = call.scales
        prepared = self._domains[rank].prepare_cached(
            blocks=self._blocks,
            num_tokens=call.x.shape[0],
            num_scales=0 if scales is None else scales.shape[1],
            row_bytes=call.x.shape[1] * call.x.element_size(),
            scale_strides=(0, 0) if scales is None else scales.stride(),
            counts=plan.counts,
            send_row=plan.send_row,
            capacity=call.capacity,
            payload=call.payload,
        )
        x = self._put(f"x@{rank}", rank, call.x)
        self._domains[rank].dispatch_cached(prepared, x, scales_at, slot, slot + call.slot.scales)

    def host_counts(self, words: Sequence[int]) -> HostCounts:
        """The counts in the watched words of a dispatch."""
        values = [word & 0xFFFFFFFF for word in words]
        phase, num_rows, max_rows, num_returned = values[:4]
        lists = values[_emulator.HOST_COUNTS_WORDS :]
        ends = self.num_ranks**2
        return HostCounts(phase, num_rows, max_rows, num_returned, lists[:ends], lists[ends:])

    def read_slot(self, rank: int, slot: int, call: DispatchCall, num_rows: int) -> SlotContents:
        """The first `num_rows` rows, as the user's kernels would read them right after the dispatch."""
        at, scales, topk_idx = call.slot, call.scales, call.topk_idx

        def rows(offset: int, like: Tensor | None, count: int = num_rows) -> Tensor | None:
            return (
                None if like is None else self.read(rank, slot + offset, like.dtype, (count, like.shape[1]))
            )

        x = rows(0, call.x)
        assert x is not None
        return SlotContents(
            x,
            None if call.cached else self.read(rank, slot + at.source, torch.int32, (num_rows,)),
            rows(at.scales, scales),
            rows(at.topk_idx, topk_idx, call.num_worst_tokens or num_rows),
            rows(at.topk_weights, call.topk_weights),
        )

    # ---- combine -------------------------------------------------------------------------------------------

    def combine(self, rank: int, call: CombineCall, plan: PlanAt) -> tuple[int, int]:
        """Launches a combine; returns where its rows [T, H] bf16 and weights [T, K] (or 0) will be."""
        tokens, topk = call.num_tokens, call.num_topk
        x = call.x if isinstance(call.x, int) else self._put(f"returned x@{rank}", rank, call.x)
        weights = call.topk_weights
        if not isinstance(weights, int):
            weights = self._put(f"returned weights@{rank}", rank, weights)
        source_token = call.source_token
        if not isinstance(source_token, int):
            source_token = self._put(f"source tokens@{rank}", rank, source_token)
        biases = [self._put(f"bias{i}@{rank}", rank, bias) for i, bias in enumerate(call.biases)] + [0, 0]
        out = self._allocate(f"out@{rank}", "device", rank, 2 * tokens * call.hidden)
        out_weights = self._allocate(f"out weights@{rank}", "device", rank, 4 * tokens * topk) if topk else 0
        self._set_live(rank, call.live)
        if call.refused:
            self._domains[rank].refuse_combine(plan.counts)
            return out, out_weights
        self._domains[rank].combine(
            blocks=self._combine_blocks,
            num_tokens=tokens,
            num_topk=topk,
            row_bytes=2 * call.hidden,
            x=x,
            topk_weights=weights,
            bias_0=biases[0],
            bias_1=biases[1],
            counts=plan.counts,
            send_row=plan.send_row,
            out=out,
            out_weights=out_weights,
            ce_chunks=0 if call.slots is not None else self.gpu.ce_chunks,
            ce_shrink=self.gpu.engine_shrink,
            source_token=source_token,
            num_entries=0 if call.slots is None else call.slots.shape[1],
            slots=self._put_maybe(f"slots@{rank}", rank, call.slots),
            factors=self._put_maybe(f"factors@{rank}", rank, call.factors),
        )
        return out, out_weights

    def read_sums(self, rank: int, call: CombineCall, at: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Rows [T, H] bf16 and weights [T, K] float32 or None."""
        x = self.read(rank, at[0], torch.bfloat16, (call.num_tokens, call.hidden))
        if at[1] == 0:
            return x, None
        return x, self.read(rank, at[1], torch.float32, (call.num_tokens, call.num_topk))

    # ---- barrier and faults --------------------------------------------------------------------------------

    def barrier(self, rank: int, number: int) -> None:
        """Leaves a mark in the rank's own heap (one of two, in turn) and launches a barrier."""
        self._put_at(rank, self._mark(rank, number), torch.tensor([number], dtype=torch.int32, device="cpu"))
        self._domains[rank].barrier()

    def read_marks(self, rank: int, number: int) -> list[int]:
        """All ranks' marks, which the barrier of that number has put behind this rank."""
        return [int(self.read(rank, self._mark(r, number), torch.int32, (1,))) for r in range(self.num_ranks)]

    def _mark(self, rank: int, number: int) -> int:
        return int(self._heaps[rank] + self._marks + number % 2 * _MARK_BYTES)

    def watch_fault(self, rank: int) -> None:
        """The host looks out for a fault record until its stream is idle."""
        patience = int(100e9 * self.gpu.timeout)
        self.machine.watch(rank, self._domains[rank].fault_word, 1, patience, True)

    def take_fault(self, rank: int, *, watched: bool = False) -> KernelFault | None:
        """The rank's fault record, if there is one. watched: while the kernel runs; the record then stays."""
        domain = self._domains[rank]
        found = domain.watched_fault() if watched else domain.take_fault()
        if found is None:
            return None
        return KernelFault(
            operation=found.operation,
            phase=found.phase,
            waited_on=tuple(r for r in range(self.num_ranks) if found.missing >> r & 1),
            expected=found.expected,
            seen=found.seen,
        )

    def ce_doorbell_rung(self, rank: int) -> bool:
        """True if the copy engine's doorbell was rung for all that it was ordered; the stream is idle."""
        return self._domains[rank].ce_doorbell_rung()

    # ---- memory --------------------------------------------------------------------------------------------

    def read(self, rank: int, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor as the rank's host reads it."""
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        raw = bytearray(self.machine.read(rank, address, size))
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape)

    def _set_live(self, rank: int, live: tuple[int, ...]) -> None:
        self._domains[rank].set_live(sum(1 << r for r in live))

    def _allocate(self, name: str, space: str, rank: int, size: int) -> int:
        return int(self.machine.allocate(name, space, rank, size))

    def _zeros(self, name: str, space: str, rank: int, size: int) -> int:
        return int(self.machine.allocate_zeros(name, space, rank, size))

    def _put(self, name: str, rank: int, tensor: Tensor) -> int:
        address = self._allocate(name, "device", rank, tensor.numel() * tensor.element_size())
        self._put_at(rank, address, tensor)
        return address

    def _put_maybe(self, name: str, rank: int, tensor: Tensor | None) -> int:
        return 0 if tensor is None else self._put(name, rank, tensor)

    def _put_at(self, rank: int, address: int, tensor: Tensor) -> None:
        if tensor.numel():
            plain = tensor.detach().contiguous().flatten().view(torch.uint8)
            self.machine.write(rank, address, plain.numpy())
