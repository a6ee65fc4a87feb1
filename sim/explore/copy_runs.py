"""The copy kernels on the emulated machine: drawn sizes, rings and launches, each under one schedule.

Every rank copies its own memory into its region of the next rank's, all at once, as the floor is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepep import _emulator
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.explore.case_runs import CaseTally, explore_cases
from deepep.sim.explore.scenarios import RunReport, ThreadSchedule

_TIMEOUT_NS = 100_000_000


@dataclass(frozen=True)
class CopyCase:
    """num_bytes, a multiple of 16, by num_blocks of num_warps; stages and stage_bytes only of bulk copies."""

    num_bytes: int
    num_blocks: int
    num_warps: int
    bulk: bool = True
    num_stages: int = 3
    stage_bytes: int = 16
    num_ranks: int = 2


def draw_copy(seed: int, *, bulk: bool = True) -> CopyCase:
    """A few stages' worth for each warp, up to four rounds of its ring. A function of its arguments."""
    choices = RandomChoices(seed)
    num_blocks, num_warps = choices.pick((1, 1, 2)), choices.pick((1, 1, 2))
    stages, stage_bytes = choices.integer(3, 5), 16 * choices.integer(1, 6)
    chunks = choices.integer(0, 4 * stages * num_blocks * num_warps)
    num_bytes = max(0, chunks * stage_bytes - 16 * choices.integer(0, 5))
    return CopyCase(num_bytes, num_blocks, num_warps, bulk, stages, stage_bytes, choices.pick((1, 2, 2)))


def run_copy(case: CopyCase, schedule: ThreadSchedule, kernels: Any = None) -> RunReport:
    """Copies, and compares with what was sent; twice, the second time other bytes to the same places."""
    machine = _emulator.Machine(
        num_ranks=case.num_ranks,
        max_blocks=case.num_blocks,
        max_threads=32 * case.num_warps,
        strategy=schedule.strategy,
        seed=schedule.seed,
        expected_steps=schedule.expected_steps,
        max_steps=2_000_000,
    )
    kernels = kernels or _emulator.own_kernels()
    size = max(16, case.num_bytes)
    ranks = range(case.num_ranks)
    sources = [machine.allocate(f"source@{r}", "device", r, size) for r in ranks]
    targets = [machine.allocate(f"target@{r}", "symmetric", r, size) for r in ranks]
    report = RunReport()
    for turn in range(2):
        try:
            sent = [_pattern(size, 31 * turn + rank) for rank in ranks]
            for rank in ranks:
                machine.write(rank, sources[rank], sent[rank])
                _launch(machine, kernels, case, rank, sources[rank], targets[(rank + 1) % case.num_ranks])
            outcome = machine.run()
            report.steps, report.switches = outcome.steps, outcome.switches
            if outcome.status == "failed":
                report.kind, report.text = outcome.kind, outcome.text
                return report
            machine.meet()
            for rank in ranks:
                receiver = (rank + 1) % case.num_ranks
                if case.num_bytes == 0:
                    continue
                if machine.read(receiver, targets[receiver], case.num_bytes) != sent[rank][: case.num_bytes]:
                    report.kind, report.text = "wrong result", f"{case}: what rank {receiver} received"
                    return report
            machine.meet()  # nobody sends again before all have read
        except _emulator.HostFailure as error:
            report.kind, _, report.text = str(error).partition("\n")
            return report
    return report


def _launch(machine: Any, kernels: Any, case: CopyCase, rank: int, source: int, target: int) -> None:
    threads = 32 * case.num_warps
    if case.bulk:
        shared = _emulator.bulk_copy_shared_bytes(case.num_warps, case.num_stages, case.stage_bytes)
        args = _emulator.bulk_copy_args(
            source=source,
            target=target,
            num_bytes=case.num_bytes,
            stage_bytes=case.stage_bytes,
            num_stages=case.num_stages,
            timeout_ns=_TIMEOUT_NS,
        )
        machine.launch(rank, "bulk_copy_kernel", args, case.num_blocks, threads, shared, kernels)
    else:
        args = _emulator.copy_args(source, target, case.num_bytes)
        machine.launch(rank, "copy_kernel", args, case.num_blocks, threads, 0, kernels)


def _pattern(size: int, salt: int) -> bytes:
    return bytes((i * 7 + (i >> 8) * 13 + salt) & 0xFF for i in range(size))


def explore_copies(
    *,
    runs: int | None = None,
    seconds: float | None = None,
    kernels: Any = None,
    progress: Callable[[int], None] = lambda run: None,
) -> CaseTally[CopyCase]:
    """Drawn copies, every fourth through registers; `explore_cases`."""

    def draw(seed: int) -> CopyCase:
        return draw_copy(seed, bulk=seed % 4 != 3)

    def run(case: CopyCase, schedule: ThreadSchedule) -> RunReport:
        return run_copy(case, schedule, kernels)

    return explore_cases(draw, run, runs=runs, seconds=seconds, progress=progress)
