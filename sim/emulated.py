"""The kernels on the CPU: cases run on an emulated machine, under one schedule, against the oracle.

`run` executes dispatch and combine of one or more cases, one after the other, on all ranks. Every rank is a program of
its own: nothing but the kernels' own protocol keeps the ranks in step, so one rank may be an operation ahead of another
as it may on hardware. docs/emulator.md says what the machine models.

Shapes: R ranks, E experts, L = E / R, K top-k, T tokens of a rank, H hidden size, N rows received, P scales per row.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deepep import _emulator
from deepep.sim import oracle
from deepep.sim.cases import Case
from deepep.sim.observed import RankView, bits, first_difference
from deepep.sim.values import RankInputs, inputs

STRATEGIES = ("random", "pct", "starve")


@dataclass(frozen=True)
class Schedule:
    """Every choice of a run: which thread goes next, how late each write arrives.

    strategy: one of STRATEGIES. expected_steps: over how many steps PCT spreads its changes of priority.
    """

    strategy: str = "random"
    seed: int = 0
    expected_steps: int = 20000

    def __str__(self) -> str:
        return f"{self.strategy}:{self.seed}:{self.expected_steps}"

    @staticmethod
    def parse(text: str) -> Schedule:
        """Reads what `str` wrote. Raises ValueError for anything else."""
        strategy, seed, steps = text.split(":")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {strategy}; allowed: {', '.join(STRATEGIES)}")
        return Schedule(strategy, int(seed), int(steps))


@dataclass(frozen=True)
class Stop:
    """A rank stops at a step of the schedule: for good, or for `pause_seconds` of simulated time.

    loses_writes: what it wrote and nobody has seen by then never arrives.
    """

    rank: int
    at_step: int
    pause_seconds: float = 0.0
    loses_writes: bool = False


@dataclass(frozen=True)
class Gpu:
    """The shape of each rank's GPU, and how a launch uses it.

    num_blocks: blocks of a launch, of which `push_blocks` write to other ranks and `local_blocks` work on rows that
    stay. num_sms: how many of them can be resident together; 0 is all. timeout: seconds a kernel waits for a peer.
    """

    num_blocks: int = 2
    num_threads: int = 128
    push_blocks: int = 1
    local_blocks: int = 1
    num_sms: int = 0
    timeout: float = 1.0


@dataclass
class Report:
    """What a run came to.

    kind: "ok", "fault" (ranks gave up waiting, as they should after a stop), or what failed: "wrong result" or a kind
    of the machine's. faults: by rank, the fault record of the ranks that gave up. now: simulated seconds.
    """

    kind: str
    text: str = ""
    steps: int = 0
    switches: int = 0
    now: float = 0.0
    faults: dict[int, Fault] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.kind not in ("ok", "fault")


@dataclass(frozen=True)
class Fault:
    """A kernel's fault record (csrc/kernels/args.hpp)."""

    operation: int
    phase: int
    waited_on: tuple[int, ...]
    expected: int
    seen: int


class WrongResult(Exception):
    """An operation finished with other bits than the oracle's."""


class _GaveUp(Exception):
    """A rank found a fault record after an operation."""


def run(
    cases: Sequence[Case],
    schedule: Schedule,
    *,
    gpu: Gpu | None = None,
    stops: Sequence[Stop] = (),
    kernels: Any = None,
    max_steps: int = 5_000_000,
) -> Report:
    """Runs the cases, which must have as many ranks each, and judges every rank's results.

    kernels: what `_emulator.load_kernels` gave; default the product's own.
    """
    domain = _Domain(cases, schedule, gpu or Gpu(), stops, kernels or _emulator.own_kernels(), max_steps)
    return domain.run()


class _Domain:
    """R emulated ranks with their heaps, and a program for each."""

    def __init__(
        self,
        cases: Sequence[Case],
        schedule: Schedule,
        gpu: Gpu,
        stops: Sequence[Stop],
        kernels: Any,
        max_steps: int,
    ) -> None:
        self.cases = [case.legal() for case in cases]
        self.gpu = gpu
        self.num_ranks = cases[0].num_ranks
        self.stopped = {stop.rank for stop in stops if stop.pause_seconds == 0}
        self.has_stops = bool(stops)
        self.machine = _emulator.Machine(
            num_ranks=self.num_ranks,
            max_blocks=gpu.num_blocks,
            max_threads=gpu.num_threads,
            num_sms=gpu.num_sms,
            strategy=schedule.strategy,
            seed=schedule.seed,
            expected_steps=schedule.expected_steps,
            max_steps=max_steps,
            faults=[(s.rank, s.at_step, int(s.pause_seconds * 1e9), s.loses_writes) for s in stops],
        )
        self.max_local_experts = max(case.num_local_experts for case in self.cases)
        control = _emulator.control_bytes(self.num_ranks, self.max_local_experts, gpu.num_blocks)
        # A flag takes as much staging as 1024 bytes of rows; every rank's tokens may come back from every other.
        rows = max(sum(case.num_tokens) * self.num_ranks for case in self.cases)
        row_bytes = max(2 * case.hidden + 16 * case.num_topk for case in self.cases)
        self.staging_bytes = (rows + 1) * max(1024, row_bytes) + 4096
        self.slot_begin = control + self.staging_bytes
        self.slot_bytes = max(self._slot(case)[-1] for case in self.cases)
        heap_bytes = self.slot_begin + 2 * self.slot_bytes
        self.heaps = [self._allocate(f"heap@{r}", "symmetric", r, heap_bytes) for r in range(self.num_ranks)]
        self.states = [self._zeros(f"state@{r}", "device", r, _emulator.STATE_BYTES) for r in range(self.num_ranks)]
        self.faults = [self._zeros(f"fault@{r}", "host", r, _emulator.FAULT_BYTES) for r in range(self.num_ranks)]
        host_bytes = _emulator.host_counts_bytes(self.max_local_experts)
        self.hosts = [self._zeros(f"counts@{r}", "host", r, host_bytes) for r in range(self.num_ranks)]
        flags_end = control + _emulator.staging_rows_begin(self.staging_bytes, row_bytes, 0)
        self.domains = []
        for rank in range(self.num_ranks):
            self.machine.write(rank, self.heaps[rank], bytes(flags_end))
            self.domains.append(
                _emulator.Domain(
                    machine=self.machine,
                    kernels=kernels,
                    num_threads=gpu.num_threads,
                    rank=rank,
                    heaps=self.heaps,
                    max_local_experts=self.max_local_experts,
                    max_blocks=gpu.num_blocks,
                    staging_bytes=self.staging_bytes,
                    state=self.states[rank],
                    fault=self.faults[rank],
                    timeout_seconds=gpu.timeout,
                )
            )
        self.machine.meet()
        self.expected = [oracle.observe(case) for case in self.cases]
        self.serials = [0] * self.num_ranks
        self.tickets = [0] * self.num_ranks
        self.slots_lent = [0] * self.num_ranks
        self.report = Report("ok")

    # ---- the run -----------------------------------------------------------------------------------------------

    def run(self) -> Report:
        programs = {rank: self._program(rank) for rank in range(self.num_ranks)}
        report = self.report
        try:
            for rank in list(programs):
                self._advance(programs, rank)
            while True:
                outcome = self.machine.run()
                report.steps, report.switches = outcome.steps, outcome.switches
                report.now = outcome.now_ns * 1e-9
                if outcome.status == "failed":
                    report.kind, report.text = outcome.kind, outcome.text
                    return report
                if outcome.status == "done":
                    break
                self._advance(programs, outcome.rank)
        except WrongResult as error:
            report.kind, report.text = "wrong result", str(error)
        except _emulator.HostFailure as error:
            report.kind, _, report.text = str(error).partition("\n")
        else:
            self._judge_faults(programs)
        return report

    def _advance(self, programs: dict[int, Generator[None, None, None]], rank: int) -> None:
        """Runs a rank's program to its next wait for the stream, or to its end."""
        try:
            next(programs[rank])
        except StopIteration:
            del programs[rank]
        except _GaveUp:
            del programs[rank]
        else:
            self.machine.host_step(rank)

    def _judge_faults(self, programs: dict[int, Generator[None, None, None]]) -> None:
        """With stops: whoever gave up must have had a stopped rank to wait for; whoever did not has finished."""
        report = self.report
        unfinished = set(programs) - self.stopped
        if unfinished:
            report.kind, report.text = "unfinished", f"ranks {sorted(unfinished)} neither finished nor gave up"
        elif report.faults and not self.has_stops:
            report.kind, report.text = "needless fault", str(report.faults)
        elif report.faults:
            report.kind = "fault"

    # ---- one rank ----------------------------------------------------------------------------------------------

    def _program(self, rank: int) -> Generator[None, None, None]:
        """What one rank's host does; `yield` waits for its stream."""
        for index, case in enumerate(self.cases):
            if rank in case.masked_at_dispatch:
                continue
            yield from self._round(rank, index, case)

    def _round(self, rank: int, index: int, case: Case) -> Generator[None, None, None]:
        given = inputs(case, rank)
        view = RankView()
        plan = self._plan(rank, case)
        slot = self._dispatch(rank, case, given, plan, cached=False)
        yield
        self._check_fault(rank)
        rows = self._take_counts(rank, case, view)
        self._take_rows(rank, case, slot, rows, view)
        self._judge(rank, index, view)
        if case.options.cached:
            again = inputs(case, rank, again=True)
            slot_again = self._dispatch(rank, case, again, plan, cached=True)
            yield
            self._check_fault(rank)
            again_view = RankView()
            self._take_rows(rank, case, slot_again, rows, again_view)
            view.again_x, view.again_scales = again_view.recv_x, again_view.recv_scales
            self._judge(rank, index, view)
        if case.masked and rank in case.masked:
            return
        out, out_weights = self._combine(rank, case, given, plan, slot, rows)
        yield
        self._check_fault(rank)
        tokens = case.num_tokens[rank]
        view.combined_x = self._read(rank, out, np.uint16, (tokens, case.hidden))
        if out_weights:
            view.combined_weights = self._read(rank, out_weights, np.uint32, (tokens, case.num_topk))
        self._judge(rank, index, view)

    def _judge(self, rank: int, index: int, view: RankView) -> None:
        views = [view if r == rank else RankView() for r in range(self.num_ranks)]
        difference = first_difference(self.expected[index], views)
        if difference is not None:
            raise WrongResult(f"case {index}: {difference}")

    def _check_fault(self, rank: int) -> None:
        record = self.machine.read(rank, self.faults[rank], _emulator.FAULT_BYTES)
        operation, phase, missing, expected, seen, serial = struct.unpack("6I", record)
        if serial == self.serials[rank]:
            return
        self.serials[rank] = serial
        waited_on = tuple(r for r in range(self.num_ranks) if missing >> r & 1)
        self.report.faults[rank] = Fault(operation, phase, waited_on, expected, seen)
        raise _GaveUp

    # ---- operations --------------------------------------------------------------------------------------------

    def _plan(self, rank: int, case: Case) -> dict[str, int]:
        """Addresses of the handle: counts [R, R] and send_row [T, R], both int32."""
        ranks, tokens = self.num_ranks, case.num_tokens[rank]
        return {
            "counts": self._allocate(f"handle counts@{rank}", "device", rank, 4 * ranks * ranks),
            "send_row": self._allocate(f"send_row@{rank}", "device", rank, 4 * tokens * ranks),
        }

    def _slot(self, case: Case) -> tuple[int, int, int, int, int]:
        """Offsets in a receive slot: source, scales, topk_idx, topk_weights, end."""
        element = 2 if case.options.payload == "bf16" else 1
        scales = 0 if case.options.payload == "bf16" else case.options.scale_columns
        topk = case.num_topk if case.options.topk else 0
        offsets = _emulator.slot_offsets(
            self._capacity(case), element * case.hidden, scales, topk, self._index_bytes(case)
        )
        return tuple(offsets)

    def _capacity(self, case: Case) -> int:
        return max(1, sum(case.num_tokens), oracle.worst_tokens(case))

    @staticmethod
    def _index_bytes(case: Case) -> int:
        return 4 if case.options.idx_dtype == "int32" else 8

    def _dispatch(self, rank: int, case: Case, given: RankInputs, plan: dict[str, int], *, cached: bool) -> int:
        """Launches a dispatch; returns the address of the slot lent."""
        gpu = self.gpu
        options = case.options
        slot = self.slot_begin + self.slots_lent[rank] % 2 * self.slot_bytes
        self.slots_lent[rank] += 1
        topk = options.topk and not cached
        wait = not cached and options.worst == "off"
        if wait:
            self.tickets[rank] += 1
        scales = given.scales
        if scales is not None:
            # The rows of the storage, so that the strides the kernel is given are the case's.
            storage = torch.empty(0, dtype=scales.dtype).set_(scales.untyped_storage())
            scales_at = self._put(f"scales@{rank}", rank, bits(storage))
            scales_at += scales.storage_offset() * 4
        layout = oracle.REFERENCE.layout.dispatch_layout(given.topk_idx, case.num_experts, case.num_ranks)
        self._set_live(rank, case.dispatch_members)
        self.domains[rank].dispatch(
            num_blocks=gpu.num_blocks,
            push_blocks=gpu.push_blocks,
            local_blocks=gpu.local_blocks,
            cached=cached,
            num_tokens=case.num_tokens[rank],
            num_topk=case.num_topk if topk else 0,
            num_local_experts=case.num_local_experts,
            num_scales=0 if scales is None else scales.shape[1],
            index_bytes=self._index_bytes(case),
            row_bytes=given.x.shape[1] * given.x.element_size(),
            x=self._put(f"x@{rank}", rank, bits(given.x)),
            scales=0 if scales is None else scales_at,
            scale_token_stride=0 if scales is None else scales.stride(0),
            scale_stride=0 if scales is None else scales.stride(1),
            topk_idx=self._put(f"topk_idx@{rank}", rank, given.topk_idx.numpy()) if topk else 0,
            topk_weights=self._put(f"topk_weights@{rank}", rank, bits(given.topk_weights)) if topk else 0,
            is_token_in_rank=self._put(
                f"is_token_in_rank@{rank}", rank, layout.is_token_in_rank.numpy().view(np.uint8)
            ),
            tokens_per_rank=self._put(f"tokens_per_rank@{rank}", rank, layout.num_tokens_per_rank.numpy()),
            tokens_per_expert=self._put(
                f"tokens_per_expert@{rank}", rank, layout.num_tokens_per_expert.numpy()
            ),
            counts=plan["counts"],
            send_row=plan["send_row"],
            slot_offset=slot,
            slot_capacity=self._capacity(case),
            num_worst_tokens=0 if cached else oracle.worst_tokens(case),
            host=self.hosts[rank] if wait else 0,
            ticket=self.tickets[rank],
        )
        return self.heaps[rank] + slot

    def _take_counts(self, rank: int, case: Case, view: RankView) -> int:
        """Reads what the host was told; returns N."""
        expected = self.expected[self.cases.index(case)][rank]
        assert expected.recv_x is not None
        if case.options.worst != "off":
            view.num_rows = oracle.worst_tokens(case)
            view.expert_counts = np.zeros(0, dtype=np.int64)
            return len(expected.recv_x)
        num_words = 4 + case.num_local_experts
        words = self._read(rank, self.hosts[rank], np.uint32, (num_words,))
        if words[0] != self.tickets[rank] or words[1] != 0:
            raise WrongResult(f"rank {rank}: the host was told ticket {words[0]}, phase {words[1]}")
        view.num_rows = int(words[2])
        unit = case.options.expert_alignment
        view.expert_counts = -(-words[4:].astype(np.int64) // unit) * unit
        return len(expected.recv_x)

    def _take_rows(self, rank: int, case: Case, slot: int, rows: int, view: RankView) -> None:
        """Reads the received rows as the user's kernels would, right after the dispatch."""
        options = case.options
        source_at, scales_at, idx_at, weights_at, _ = self._slot(case)
        element = np.uint16 if options.payload == "bf16" else np.uint8
        view.recv_x = self._read(rank, slot, element, (rows, case.hidden))
        if options.payload != "bf16":
            view.recv_scales = self._read(rank, slot + scales_at, np.uint32, (rows, options.scale_columns))
        view.src_token = self._read(rank, slot + source_at, np.int32, (rows,))
        if options.topk and view.num_rows is not None:
            index_type = np.int32 if options.idx_dtype == "int32" else np.int64
            view.recv_topk_idx = self._read(rank, slot + idx_at, index_type, (view.num_rows, case.num_topk))
            view.recv_topk_weights = self._read(rank, slot + weights_at, np.uint32, (rows, case.num_topk))

    def _combine(
        self, rank: int, case: Case, given: RankInputs, plan: dict[str, int], slot: int, rows: int
    ) -> tuple[int, int]:
        """Launches a combine; returns the addresses of its outputs."""
        gpu, options = self.gpu, case.options
        tokens = case.num_tokens[rank]
        if options.combine_rows == "same":
            x = slot
        else:
            # Values depend on how many rows the tensor has, the rows past the last included.
            returned = oracle.returned_rows(case, rank, torch.empty(oracle.worst_tokens(case) or rows, 0))
            x = self._put(f"combine x@{rank}", rank, bits(returned))
        biases = [self._put(f"bias{i}@{rank}", rank, bits(b)) for i, b in enumerate(given.biases)] + [0, 0]
        out = self._allocate(f"out@{rank}", "device", rank, 2 * tokens * case.hidden)
        out_weights = 0
        if options.combine_weights:
            out_weights = self._allocate(f"out_weights@{rank}", "device", rank, 4 * tokens * case.num_topk)
        self._set_live(rank, case.members)
        self.domains[rank].combine(
            num_blocks=gpu.num_blocks,
            push_blocks=gpu.push_blocks,
            reduce_blocks=gpu.local_blocks,
            parts=case.seed % 4 + 1,
            num_tokens=tokens,
            num_topk=case.num_topk if options.combine_weights else 0,
            row_bytes=2 * case.hidden,
            x=x,
            topk_weights=slot + self._slot(case)[3] if options.combine_weights else 0,
            bias_0=biases[0],
            bias_1=biases[1],
            counts=plan["counts"],
            send_row=plan["send_row"],
            out=out,
            out_weights=out_weights,
        )
        return out, out_weights

    def _set_live(self, rank: int, members: tuple[int, ...]) -> None:
        self.domains[rank].set_live(sum(1 << r for r in members))

    # ---- memory ------------------------------------------------------------------------------------------------

    def _allocate(self, name: str, space: str, rank: int, size: int) -> int:
        return int(self.machine.allocate(name, space, rank, size))

    def _zeros(self, name: str, space: str, rank: int, size: int) -> int:
        address = self._allocate(name, space, rank, size)
        self.machine.write(rank, address, bytes(size))
        return address

    def _put(self, name: str, rank: int, array: npt.NDArray[Any]) -> int:
        address = self._allocate(name, "device", rank, array.nbytes)
        self.machine.write(rank, address, np.ascontiguousarray(array).reshape(-1))
        return address

    def _read(self, rank: int, address: int, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(self.machine.read(rank, address, count), dtype=dtype).reshape(shape)
