"""All-reduces over symmetric memory on the emulated machine: drawn calls and stops, each under one schedule.

Every rank is a program of its own: it writes addends, launches, and looks at the sums. Nothing but the flags
keeps the ranks in step; who has given up launches its further calls all the same, as a host would that does
not know of it yet.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepep import _emulator
from deepep.collectives.codecs import rounding_key
from deepep.collectives.schedules import ADDEND, ANYBODY, RESULT
from deepep.reference.all_reduce import all_reduce
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.cases.gradients import KINDS, draw_gradient
from deepep.sim.explore.case_runs import CaseTally, explore_stops
from deepep.sim.explore.scenarios import RunReport, Stop, ThreadSchedule
from deepep.sim.rules.reductions import same_numbers

_TIMEOUT_SECONDS = 0.1
_SHARED_BYTES = 12
_KERNELS = {True: "all_reduce_oneshot_kernel", False: "all_reduce_direct_kernel"}


@dataclass(frozen=True)
class ReduceCall:
    """One all-reduce. form: a codec's name. count: elements. offset: of the tensor's begin, in elements."""

    count: int
    form: str = "plain"
    is_bf16: bool = False
    is_oneshot: bool = False
    is_nearest: bool = False
    mean: bool = True
    kind: str = KINDS[0]
    offset: int = 0
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_bf16 else torch.float32

    @property
    def dice(self) -> tuple[int, int, int] | None:
        return None if self.is_nearest else (self.seed, 1, 2)

    def inputs(self, num_ranks: int) -> list[Tensor]:
        """Every rank's addends."""
        rng = np.random.default_rng([11, self.seed])
        return [draw_gradient(rng, self.count, self.kind).to(self.dtype) for _ in range(num_ranks)]

    def expected(self, num_ranks: int) -> Tensor:
        """The oracle's bits."""
        return all_reduce(self.inputs(num_ranks), "direct", self.form, mean=self.mean, dice=self.dice)


@dataclass(frozen=True)
class ReduceCase:
    """Calls of all ranks, one after the other. calls_before: the epoch that calls of before have left."""

    num_ranks: int
    calls: tuple[ReduceCall, ...]
    num_blocks: int = 2
    num_warps: int = 2
    calls_before: int = 0


class _WrongSum(Exception):
    """A rank has another result than the oracle."""


def draw_reduce(seed: int) -> ReduceCase:
    """Up to a few blocks of elements for each warp. A function of the seed."""
    choices = RandomChoices(seed)
    calls = tuple(
        ReduceCall(
            count=choices.pick((0, 1, 127, 128, 129, 300, 515, 900)),
            form=choices.pick(("plain", "fixed32", "fp8", "fp8", "fp16", "bf16")),
            is_bf16=choices.flag(),
            is_oneshot=choices.flag(),
            is_nearest=choices.flag(),
            mean=choices.flag(),
            kind=choices.pick(KINDS),
            offset=choices.pick((0, 0, 0, 1, 4)),
            seed=seed + number,
        )
        for number in range(choices.integer(1, 4))
    )
    return ReduceCase(
        num_ranks=choices.pick((2, 2, 3, 4)),
        calls=calls,
        num_blocks=choices.pick((1, 2, 3)),
        num_warps=choices.pick((1, 2, 2)),
        calls_before=choices.pick((0, 0, 0xFFFFFFFF, 0xFFFFFFFE)),
    )


def run_reduce(
    case: ReduceCase, schedule: ThreadSchedule, *, stops: Sequence[Stop] = (), kernels: Any = None
) -> RunReport:
    """Runs the case's calls, and compares what each rank has with the oracle's."""
    return _ReduceRun(case, schedule, stops, kernels or _emulator.own_kernels()).run()


class _ReduceRun:
    def __init__(
        self, case: ReduceCase, schedule: ThreadSchedule, stops: Sequence[Stop], kernels: Any
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
            max_steps=4_000_000,
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
        most = max(call.count for call in case.calls)
        pair_bytes = 4 * 128 * (most // 128 + 1)
        size = _emulator.all_reduce_bytes(case.num_ranks, pair_bytes)
        heaps = [machine.allocate(f"heap@{r}", "symmetric", r, size) for r in ranks]
        state_bytes = 4 * _emulator.ALL_REDUCE_STATE_WORDS
        self.states = [machine.allocate(f"state@{r}", "device", r, state_bytes) for r in ranks]
        self.missing = [machine.allocate(f"missing@{r}", "host", r, 4) for r in ranks]
        self.tensors = [machine.allocate(f"tensor@{r}", "device", r, 4 * (most + 8)) for r in ranks]
        self.made = [
            _emulator.AllReduce(
                rank=r,
                heaps=heaps,
                pair_bytes=pair_bytes,
                state=self.states[r],
                host_missing=self.missing[r],
                timeout_seconds=_TIMEOUT_SECONDS,
            )
            for r in ranks
        ]
        flag = struct.pack("<I", case.calls_before)
        for r in ranks:
            machine.write(r, heaps[r], flag * (_emulator.all_reduce_control_bytes(case.num_ranks) // 4))
            machine.write(r, self.states[r], flag + bytes(state_bytes - 4))
            machine.write(r, self.missing[r], bytes(4))
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
        except _WrongSum as error:
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
        for number, call in enumerate(case.calls):
            place = self.tensors[rank] + call.offset * call.dtype.itemsize
            mine = torch.empty(call.count, dtype=call.dtype, device="cpu").copy_(
                call.inputs(case.num_ranks)[rank]
            )
            machine.write(rank, place, mine.view(torch.uint8).numpy().tobytes() or bytes(1))
            dice, keys = call.dice, []
            if dice is not None:
                keys = [*rounding_key(*dice, rank, ADDEND), *rounding_key(*dice, ANYBODY, RESULT)]
            args = self.made[rank].args(
                tensor=place,
                count=call.count,
                is_bf16=call.is_bf16,
                is_oneshot=call.is_oneshot,
                format="plain" if call.form == "fixed32" else call.form,
                is_fixed=call.form == "fixed32",
                divisor=float(case.num_ranks if call.mean else 1),
                keys=keys,
                first_index=0,
                num_blocks=case.num_blocks,
            )
            kernel, threads = _KERNELS[call.is_oneshot], 32 * case.num_warps
            machine.launch(rank, kernel, args, case.num_blocks, threads, _SHARED_BYTES, self.kernels)
            yield
            words = machine.read(rank, self.states[rank], 4 * _emulator.ALL_REDUCE_STATE_WORDS)
            missing = struct.unpack_from("<I", words, 4 * _emulator.ALL_REDUCE_MISSING)[0]
            if machine.read(rank, self.missing[rank], 4) != struct.pack("<I", missing):
                raise _WrongSum(f"rank {rank}'s host reads another word than {missing} in call {number}")
            if missing != 0:
                self.gave_up[rank] = missing
            else:
                self._judge(rank, number, place)

    def _judge(self, rank: int, number: int, place: int) -> None:
        call = self.case.calls[number]
        if call.count == 0:
            return
        raw = bytearray(self.machine.read(rank, place, call.count * call.dtype.itemsize))
        got = torch.frombuffer(raw, dtype=torch.uint8).view(call.dtype)
        if not same_numbers(got, call.expected(self.case.num_ranks)):
            raise _WrongSum(f"rank {rank}'s sum in call {number}")


def explore_reduces(
    *,
    runs: int | None = None,
    seconds: float | None = None,
    kernels: Any = None,
    progress: Callable[[int], None] = lambda run: None,
) -> CaseTally[tuple[ReduceCase, tuple[Stop, ...]]]:
    """Drawn all-reduces. `explore_stops`."""
    return explore_stops(
        draw_reduce, run_reduce, kernels=kernels, runs=runs, seconds=seconds, progress=progress
    )
