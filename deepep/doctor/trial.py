"""The doctor put to the test: faults of each kind made on purpose, in processes of this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deepep.doctor.judge import Suspect, judge
from deepep.doctor.probe import Delay, Examination, run_examination

if TYPE_CHECKING:
    from deepep.sim import World

Fault = Literal["none", "rank", "process", "link"]
FAULTS: tuple[Fault, ...] = ("none", "rank", "process", "link")
LATE, SLOW_MESSAGE = 0.05, 0.05  # seconds, in each round; of each message
STOPPED, RUNS = 0.1, 0.006  # seconds, in turn


@dataclass(frozen=True)
class Trial:
    """One run: the fault that was made, of whom, and whom the judge named."""

    fault: Fault
    ranks: tuple[int, ...]
    named: tuple[Suspect, ...]

    @property
    def is_right(self) -> bool:
        """That one is named and nobody else; without a fault, nobody."""
        found = [(suspect.kind, suspect.ranks) for suspect in self.named]
        return found == ([] if self.fault == "none" else [(self.fault, self.ranks)])


def run_trial(world: World, fault: Fault, number: int, rounds: int, backend: str | None) -> Trial:
    """Examines a world's ranks while one fault lasts; `number` says whose it is."""
    size = world.num_ranks
    victim, other = number % size, (number + 1 + number // size % (size - 1)) % size
    delay = {"rank": Delay(victim, LATE), "link": Delay(victim, SLOW_MESSAGE, other)}.get(fault)
    ranks = {"none": (), "link": (victim, other)}.get(fault, (victim,))
    world.ensure_started()
    pending = world.submit(run_examination, rounds, backend, delay, timeout=600.0)
    over = threading.Event()
    stopper = threading.Thread(target=_stop_in_turn, args=(world, victim, over))
    if fault == "process":
        stopper.start()
    try:
        found: Examination = pending.results()[0]
    finally:
        over.set()
        if fault == "process":
            stopper.join()
    return Trial(fault, ranks, tuple(judge(found.evidence)))


def _stop_in_turn(world: World, rank: int, over: threading.Event) -> None:
    while not over.wait(RUNS):
        world.stop(rank)
        over.wait(STOPPED)
        world.resume(rank)


def run_trials(
    world: World, times: int, rounds: int, backend: str | None, progress: Callable[[Trial], None]
) -> list[Trial]:
    """So many runs of each fault, and as many without any."""
    trials = []
    for fault in FAULTS:
        for number in range(times):
            trials.append(run_trial(world, fault, number, rounds, backend))
            progress(trials[-1])
    return trials
