"""The bare exchange on the emulated machine: drawn bytes, launches and stops, each under one schedule.

Every rank is a program of its own: it writes rows, exchanges, and looks at what came. Nothing but the flags
keeps the ranks in step.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepep import _emulator
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.explore.case_runs import CaseTally, explore_stops
from deepep.sim.explore.scenarios import RunReport, Stop, ThreadSchedule

_TIMEOUT_SECONDS = 0.1
_VECTOR = 16


@dataclass(frozen=True)
class ExchangeCase:
    """num_bytes[s][d]: from rank s to rank d, multiples of 16. reads: of each call, whether rows are read.

    calls_before: the epoch that the calls of before have left.
    """

    num_bytes: tuple[tuple[int, ...], ...]
    reads: tuple[bool, ...] = (True, True, True)
    num_blocks: int = 2
    num_warps: int = 2
    calls_before: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.num_bytes)


class _WrongBytes(Exception):
    """A rank received something else than was sent."""


def draw_exchange(seed: int) -> ExchangeCase:
    """Up to a few pieces for each warp. A function of the seed."""
    choices = RandomChoices(seed)
    ranks = choices.pick((2, 2, 3, 4, 1))
    sizes = tuple(
        tuple(_VECTOR * choices.integer(0, choices.pick((0, 1, 33, 200))) for _ in range(ranks))
        for _ in range(ranks)
    )
    return ExchangeCase(
        sizes,
        reads=tuple(choices.flag() for _ in range(choices.integer(1, 4))),
        num_blocks=choices.pick((1, 2, 3)),
        num_warps=choices.pick((1, 2, 2)),
        calls_before=choices.pick((0, 0, 0xFFFFFFFF, 0xFFFFFFFE)),
    )


def run_exchange(
    case: ExchangeCase, schedule: ThreadSchedule, *, stops: Sequence[Stop] = (), kernels: Any = None
) -> RunReport:
    """Runs the case's calls, and compares what each rank received with what was sent."""
    return _ExchangeRun(case, schedule, stops, kernels or _emulator.own_kernels()).run()


class _ExchangeRun:
    def __init__(
        self, case: ExchangeCase, schedule: ThreadSchedule, stops: Sequence[Stop], kernels: Any
    ) -> None:
        self.case, self.stops, self.kernels = case, stops, kernels
        ranks = range(case.num_ranks)
        self.machine = machine = _emulator.Machine(
            num_ranks=case.num_ranks,
            max_blocks=case.num_blocks,
            max_threads=32 * case.num_warps,
            strategy=schedule.strategy,
            seed=schedule.seed,
            expected_steps=schedule.expected_steps,
            max_steps=2_000_000,
            faults=[
                _emulator.MachineFault(
                    rank=stop.rank,
                    at=stop.at,
                    counts_writes=stop.counts_writes,
                    pause_ns=int(stop.pause_seconds * 1e9),
                    loses_writes=stop.loses_writes,
                )
                for stop in stops
            ],
        )
        most = max(map(max, case.num_bytes))
        size = _emulator.exchange_bytes(case.num_ranks, most)
        heaps = [machine.allocate(f"heap@{r}", "symmetric", r, size) for r in ranks]
        state_bytes = 4 * _emulator.EXCHANGE_STATE_WORDS
        self.heaps = heaps
        self.states = [machine.allocate(f"state@{r}", "device", r, state_bytes) for r in ranks]
        self.exchanges = [
            _emulator.Exchange(
                rank=r,
                heaps=heaps,
                pair_bytes=most,
                state=self.states[r],
                timeout_seconds=_TIMEOUT_SECONDS,
            )
            for r in ranks
        ]
        self.pair_bytes = self.exchanges[0].pair_bytes
        source_bytes = max(_VECTOR, case.num_ranks * self.pair_bytes)
        self.sources = [machine.allocate(f"source@{r}", "device", r, source_bytes) for r in ranks]
        self.num_warps = case.num_blocks * case.num_warps
        self.sums = [machine.allocate(f"sums@{r}", "device", r, 4 * self.num_warps) for r in ranks]
        control = _emulator.exchange_rows(case.num_ranks, most, 0, 0)
        flag = struct.pack("<I", case.calls_before)
        for r in ranks:
            machine.write(r, heaps[r], flag * (control // 4))
            machine.write(r, self.states[r], flag + bytes(state_bytes - 4))
        machine.meet()
        self.report = RunReport()
        self.gave_up: dict[int, int] = {}  # by rank: the ranks missing, a bit each

    def run(self) -> RunReport:
        report = self.report
        programs = {rank: self._program(rank) for rank in range(self.case.num_ranks)}
        try:
            for rank in list(programs):
                self._advance(programs, rank)
            while True:
                outcome = self.machine.run()
                report.steps, report.switches = outcome.steps, outcome.switches
                if outcome.status == "failed":
                    report.kind, report.text = outcome.kind, outcome.text
                    return report
                if outcome.status == "done":
                    break
                self._advance(programs, outcome.rank)
        except _WrongBytes as error:
            report.kind, report.text = "wrong result", f"{self.case}: {error}"
            return report
        except _emulator.HostFailure as error:
            report.kind, _, report.text = str(error).partition("\n")
            return report
        gone = {stop.rank for stop in self.stops if stop.pause_seconds == 0}
        if set(programs) - gone:
            report.kind, report.text = "unfinished", f"ranks {sorted(programs)}"
        elif self.gave_up:
            report.kind = "fault" if self.stops else "needless fault"
            report.text = f"ranks missing, a bit each, by rank: {self.gave_up}"
        return report

    def _advance(self, programs: dict[int, Generator[None, None, None]], rank: int) -> None:
        """Runs a rank's program until it waits for its stream, or to its end."""
        try:
            next(programs[rank])
        except StopIteration:
            del programs[rank]
        else:
            self.machine.host_step(rank)

    def _program(self, rank: int) -> Generator[None, None, None]:
        case, machine = self.case, self.machine
        received = [row[rank] for row in case.num_bytes]
        for call, reads in enumerate(case.reads):
            machine.write(rank, self.sources[rank], self._rows_of(rank, call))
            args = self.exchanges[rank].args(
                source=self.sources[rank],
                sent=list(case.num_bytes[rank]),
                received=received,
                sums=self.sums[rank] if reads else 0,
                num_blocks=case.num_blocks,
            )
            kernel = "exchange_read_kernel" if reads else "exchange_kernel"
            threads = 32 * case.num_warps
            machine.launch(rank, kernel, args, case.num_blocks, threads, 4, self.kernels)
            yield
            words = machine.read(rank, self.states[rank], 4 * _emulator.EXCHANGE_STATE_WORDS)
            missing = struct.unpack_from("<I", words, 4 * _emulator.EXCHANGE_MISSING)[0]
            if missing != 0:
                self.gave_up[rank] = missing
                return
            self._judge(rank, call, reads)

    def _judge(self, rank: int, call: int, reads: bool) -> None:
        case, total = self.case, 0
        epoch = case.calls_before
        for _ in range(call + 1):
            epoch = 2 if epoch == 0xFFFFFFFF else epoch + 1
        for source in range(case.num_ranks):
            size = case.num_bytes[source][rank]
            if source == rank or size == 0:
                continue
            begin = rank * self.pair_bytes
            sent = self._rows_of(source, call)[begin : begin + size]
            place = _emulator.exchange_rows(case.num_ranks, self.pair_bytes, epoch, source)
            if self.machine.read(rank, self.heaps[rank] + place, size) != sent:
                raise _WrongBytes(f"what rank {rank} received of rank {source} in call {call}")
            total += int(np.frombuffer(sent, dtype=np.uint32).sum(dtype=np.uint64))
        if reads:
            sums = struct.unpack(
                f"<{self.num_warps}I", self.machine.read(rank, self.sums[rank], 4 * self.num_warps)
            )
            if (sum(sums) - total) % 2**32:
                raise _WrongBytes(f"the sums that rank {rank} read in call {call}")

    def _rows_of(self, rank: int, call: int) -> bytes:
        """This rank's memory: rows for each rank, other ones in every call."""
        size = max(_VECTOR, self.case.num_ranks * self.pair_bytes)
        i = np.arange(size, dtype=np.uint32)
        return (i * 7 + (i >> 8) * 13 + 31 * call + 101 * rank).astype(np.uint8).tobytes()


def explore_exchanges(
    *,
    runs: int | None = None,
    seconds: float | None = None,
    kernels: Any = None,
    progress: Callable[[int], None] = lambda run: None,
) -> CaseTally[tuple[ExchangeCase, tuple[Stop, ...]]]:
    """Drawn exchanges. `explore_stops`."""
    return explore_stops(
        draw_exchange, run_exchange, kernels=kernels, runs=runs, seconds=seconds, progress=progress
    )
