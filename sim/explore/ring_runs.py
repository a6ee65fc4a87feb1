"""Sends around a ring on the emulated machine: drawn calls and stops, each under one schedule.

Every rank is a program of its own, which launches its part of the calls. They are drawn in an order in which
each returns before the next is made; the ranks keep to their own parts of it, and to nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepep import _emulator
from deepep.reference.side_primitives import RingModel
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.explore.case_runs import CaseTally, explore_stops
from deepep.sim.explore.scenarios import RunReport, Stop, ThreadSchedule

_TIMEOUT_SECONDS = 0.1
_THREADS = 64


@dataclass(frozen=True)
class RingStep:
    """A tensor's way from a rank to its neighbour, or, `takes`, its way out of the slot there.

    number: of the tensor. dtype: a number; that of the taking differs if the tensor is to be refused. waits:
    the rank's host waits for its stream behind it.
    """

    src: int
    dst: int
    takes: bool
    number: int
    num_bytes: int
    dtype: int
    is_wrong: bool
    waits: bool

    @property
    def rank(self) -> int:
        return self.dst if self.takes else self.src


@dataclass(frozen=True)
class RingCase:
    """num_slots: tensors that may be under way to a neighbour. slot_bytes: of one, at most."""

    num_ranks: int
    num_slots: int
    slot_bytes: int
    steps: tuple[RingStep, ...]


class _WrongTensor(Exception):
    """A rank received something else than was sent, or without a word what is of another kind."""


def draw_ring(seed: int) -> RingCase:
    """A function of the seed."""
    choices = RandomChoices(seed)
    ranks, slots, size = choices.pick((2, 2, 3, 4)), choices.pick((1, 1, 2, 3)), choices.pick((16, 100))
    model = RingModel(ranks, slots)
    under_way: dict[tuple[int, int], list[RingStep]] = {}
    steps: list[RingStep] = []
    ways = [(src, dst) for src in range(ranks) for dst in sorted(model.neighbours(src))]
    for number in range(choices.integer(1, 16)):
        way = choices.pick(ways)
        queue = under_way.setdefault(way, [])
        if queue and (choices.flag() or len(queue) == slots):
            steps.append(_taking(queue.pop(0), choices))
            continue
        step = RingStep(
            *way,
            takes=False,
            number=number,
            num_bytes=choices.pick((size, 0, 1, choices.integer(0, size))),
            dtype=choices.integer(0, 3),
            is_wrong=False,
            waits=choices.flag(),
        )
        queue.append(step)
        steps.append(step)
    steps += [_taking(left, choices) for queue in under_way.values() for left in queue]
    return RingCase(ranks, slots, size, tuple(steps))


def _taking(sent: RingStep, choices: RandomChoices) -> RingStep:
    wrong = choices.integer(0, 9) == 0
    return RingStep(
        sent.src,
        sent.dst,
        takes=True,
        number=sent.number,
        num_bytes=sent.num_bytes,
        dtype=sent.dtype + 4 * wrong,
        is_wrong=wrong,
        waits=wrong or choices.flag(),
    )


def run_ring(
    case: RingCase, schedule: ThreadSchedule, *, stops: Sequence[Stop] = (), kernels: Any = None
) -> RunReport:
    """Runs the case's calls, and compares what each rank received with what was sent."""
    return _RingRun(case, schedule, stops, kernels or _emulator.own_kernels()).run()


class _RingRun:
    def __init__(self, case: RingCase, schedule: ThreadSchedule, stops: Sequence[Stop], kernels: Any) -> None:
        self.case, self.stops = case, stops
        ranks = range(case.num_ranks)
        self.machine = machine = _emulator.Machine(
            num_ranks=case.num_ranks,
            max_blocks=1,
            max_threads=_THREADS,
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
        self.begin = _emulator.control_bytes(case.num_ranks, 1, 1)
        words, size = _emulator.ring_bytes(case.num_slots, case.slot_bytes)
        heaps = [machine.allocate(f"heap@{r}", "symmetric", r, self.begin + size) for r in ranks]
        states = [machine.allocate(f"state@{r}", "device", r, _emulator.STATE_BYTES) for r in ranks]
        faults = [machine.allocate(f"fault@{r}", "host", r, _emulator.FAULT_BYTES) for r in ranks]
        for r in ranks:
            machine.write(r, heaps[r], bytes(self.begin + words))
            machine.write(r, states[r], bytes(_emulator.STATE_BYTES))
            machine.write(r, faults[r], bytes(_emulator.FAULT_BYTES))
        self.domains = [
            _emulator.Domain(
                machine=machine,
                kernels=kernels,
                num_threads=_THREADS,
                rank=r,
                heaps=heaps,
                max_local_experts=1,
                max_blocks=1,
                staging_bytes=0,
                state=states[r],
                fault=faults[r],
                timeout_seconds=_TIMEOUT_SECONDS,
            )
            for r in ranks
        ]
        self.tensors = {
            step: machine.allocate(f"tensor {i}", "device", step.rank, max(1, step.num_bytes))
            for i, step in enumerate(case.steps)
        }
        for step, tensor in self.tensors.items():
            machine.write(step.rank, tensor, bytes(step.num_bytes) if step.takes else _bytes_of(step))
        machine.meet()
        self.report = RunReport()
        self.gave_up: dict[int, tuple[int, ...]] = {}  # by rank: operation, phase, ranks missing as bits

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
        except _WrongTensor as error:
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
            report.text = f"operation, phase, ranks missing as bits, by rank: {self.gave_up}"
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
        """Launches the rank's calls; whenever its stream is idle, looks at what has come."""
        mine = [step for step in self.case.steps if step.rank == rank]
        launched: list[RingStep] = []
        counts: Counter[tuple[int, bool]] = Counter()
        for i, step in enumerate(mine):
            self._launch(step, counts)
            launched.append(step)
            comes_to_wrong = i + 1 < len(mine) and mine[i + 1].is_wrong
            if not (step.waits or comes_to_wrong or i + 1 == len(mine)):
                continue
            yield
            fault = self.domains[rank].take_fault()
            if fault is not None and not (step.is_wrong and fault.phase == _emulator.DISAGREEMENT):
                self.gave_up[rank] = fault.operation, fault.phase, fault.missing
                return
            if step.is_wrong and fault is None:
                raise _WrongTensor(f"rank {rank} takes tensor {step.number} for another kind")
            for done in launched:
                if done.takes and not done.is_wrong and done.num_bytes:
                    got = self.machine.read(rank, self.tensors[done], done.num_bytes)
                    if got != _bytes_of(done):
                        raise _WrongTensor(f"what rank {rank} received as tensor {done.number}")
            launched.clear()

    def _launch(self, step: RingStep, counts: Counter[tuple[int, bool]]) -> None:
        domain, peer = self.domains[step.rank], step.src if step.takes else step.dst
        launch = domain.ring_receive if step.takes else domain.ring_send
        launch(
            peer=peer,
            slot=counts[peer, step.takes] % self.case.num_slots,
            tensor=self.tensors[step],
            num_bytes=step.num_bytes,
            dtype=step.dtype,
            begin=self.begin,
            num_slots=self.case.num_slots,
            slot_bytes=self.case.slot_bytes,
        )
        counts[peer, step.takes] += 1


def _bytes_of(step: RingStep) -> bytes:
    """The tensor that travels, other bytes than any other."""
    i = np.arange(step.num_bytes, dtype=np.uint32)
    return (i * 7 + 31 * step.number + 101 * step.src).astype(np.uint8).tobytes()


def explore_rings(
    *,
    runs: int | None = None,
    seconds: float | None = None,
    kernels: Any = None,
    progress: Callable[[int], None] = lambda run: None,
) -> CaseTally[tuple[RingCase, tuple[Stop, ...]]]:
    """Drawn rings. `explore_stops`."""
    return explore_stops(draw_ring, run_ring, kernels=kernels, runs=runs, seconds=seconds, progress=progress)
