"""The hunt: each mutant of the kernels is explored until it fails, and what caught it is put in a table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Event
from typing import Any

from deepep import _emulator
from deepep.sim.cases.case import draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.emulator.shapes import GPUS
from deepep.sim.explore.case_runs import CaseTally
from deepep.sim.explore.copy_runs import explore_copies
from deepep.sim.explore.exchange_runs import explore_exchanges
from deepep.sim.explore.explorer import (
    LIMITS,
    TWO_LEVEL_LIMITS,
    draw_scenario,
    draw_tall_scenario,
    draw_two_level_scenario,
    explore,
)
from deepep.sim.explore.kernel_edits import COPY_FILE
from deepep.sim.explore.kernel_mutants import (
    COPY_ENGINE_FILES,
    COUNTING_FILES,
    EXCHANGE_FILES,
    EXPANDED_FILES,
    FAR_FILES,
    HARMLESS,
    LOW_LATENCY_FILES,
    LOW_LATENCY_OPTIONS,
    MASKING_EDITS,
    MASKING_FILES,
    RAIL_FILES,
    REDUCE_FILES,
    RING_FILES,
    ROW_FILES,
    SPREADING_FILES,
    TWO_LEVEL_FILES,
    Mutant,
    build,
    precompile,
)
from deepep.sim.explore.low_latency import LowLatencyScenario, run
from deepep.sim.explore.low_latency_explorer import (
    FAR_LIMITS,
    LOW_LATENCY_LIMITS,
    RAIL_LIMITS,
    draw_far_low_latency,
    draw_low_latency,
    draw_rail_low_latency,
    explore_low_latency,
)
from deepep.sim.explore.mutant_library import MutantLibrary, can_share
from deepep.sim.explore.reduce_runs import explore_reduces
from deepep.sim.explore.ring_runs import explore_rings
from deepep.sim.explore.row_runs import explore_rows
from deepep.sim.explore.scenarios import RunReport, Scenario
from deepep.sim.explore.shrinking import draw_shrinking, run_shrinking
from deepep.sim.explore.spread_runs import explore_spreads

#: Small cases, so that a schedule costs milliseconds; the bugs are in the protocol, not in the sizes.
HUNTING_LIMITS = replace(LIMITS, ranks=(2, 3, 2), max_tokens=4, max_topk=4, hidden=(16, 136, 128))

#: Launch shapes of _copy_engine_scenario.
_WITH_COPY_ENGINES = tuple(gpu for gpu in GPUS if gpu.ce_chunks > 0)

#: Of _counting_scenario: hosts wait, so experts are counted as well.
COUNTING_LIMITS = replace(
    LIMITS,
    ranks=(1, 1, 2),
    max_tokens=70,
    max_topk=3,
    max_local_experts=2,
    hidden=(16,),
    masks=False,
    fixed={"mode": "ht", "schedule": "sync", "topk": True, "worst": "off", "cached": False},
)

LOW_LATENCY_HUNTING_LIMITS = replace(
    LOW_LATENCY_LIMITS, ranks=(2, 3, 2), max_tokens=4, max_topk=4, hidden=(16, 136, 128)
)

#: By file, what explores the cases of one kernel.
CASES: dict[tuple[str, ...], Callable[..., CaseTally[Any]]] = {
    (COPY_FILE,): explore_copies,
    EXCHANGE_FILES: explore_exchanges,
    REDUCE_FILES: explore_reduces,
    RING_FILES: explore_rings,
    ROW_FILES: explore_rows,
    SPREADING_FILES: explore_spreads,
}

#: Scenarios at which hunts begin that took dozens of schedules, or hundreds, from the first one. A hint, no
#: more: where draws or kernels have changed, the hunt goes on from there and takes as long as it takes.
FIRST_SEEDS: dict[str, int] = {
    "barrier/barrier.hpp finish: sync_block removed": 13,
    "barrier/barrier.hpp wait_arrivals: load sys -> gpu": 96,
    "combine/credit.hpp wait_owners: load sys -> gpu": 48,
    "combine/drive.hpp drive_copy_engine: load sys -> gpu": 58,
    "combine/drive.hpp: a peer that is not warned of what is written over": 99,
    "combine/finish.hpp: sums without a look for warnings behind them": 121,
    "combine/push.hpp signal_rows: sync_block removed": 68,
    "combine/reduce.hpp reduce_rows: load sys -> gpu": 222,
    "common/group.hpp: two odd epochs in a row": 53,
    "dispatch/count_experts.hpp add_entries: fetch_add gpu -> block": 25,
    "dispatch/count_experts.hpp count_experts: fetch_add acq_rel -> acquire": 298,
    "dispatch/count_experts.hpp count_experts: fetch_add acq_rel -> relaxed": 298,
    "dispatch/count_experts.hpp count_experts: fetch_add acq_rel -> release": 298,
    "dispatch/count_experts.hpp: experts' totals that are not cleared": 15,
    "dispatch/host_counts.hpp post_counts_to_host: sync_block removed": 455,
    "dispatch/signal.hpp wait_rows: load sys -> gpu": 185,
    "layout/symmetric_layout.hpp: one mailbox for all epochs": 30,
    "low_latency/combine_call.hpp finish: sync_block removed": 51,
    "low_latency/combine_digest.hpp: any dispatch": 37,
    "low_latency/combine_reduce.hpp: flags of rows that were not made": 98,
    "low_latency/dispatch_call.hpp finish: sync_block removed": 69,
    "low_latency/dispatch_spread.hpp: words that nobody waited for": 8,
    "low_latency/logfmt_rows.hpp sum_unit: load -> load_once (5)": 14,
    "low_latency/logfmt_rows.hpp sum_unit: load -> load_once (6)": 14,
    "low_latency/logfmt_rows.hpp: a group encoded by itself": 106,
    "low_latency/patience.hpp: held up in silence": 842,
    "two_level/combine_call.hpp wait_digest: load sys -> gpu": 129,
    "two_level/domain_sum.hpp: a window that is counted behind its last put": 27,
    "two_level/metadata.hpp relay_metadata: fence acq_rel -> acquire": 76,
    "two_level/metadata.hpp relay_metadata: fence sys -> gpu": 76,
    "two_level/metadata.hpp relay_metadata: fence.sys removed": 76,
    "two_level/save_counts.hpp post_counts_to_host: sync_block removed": 4644,
    "two_level/wait_metadata.hpp wait_metadata: load sys -> gpu": 18,
}


@lru_cache(maxsize=4096)
def _low_latency_scenario(seed: int, file: str) -> LowLatencyScenario:
    """One in which a mutant of this file takes effect."""
    limits = LOW_LATENCY_HUNTING_LIMITS
    limits = replace(limits, fixed={**limits.fixed, **LOW_LATENCY_OPTIONS.get(file, {})})
    scenario = draw_low_latency(seed, limits=limits, num_cases=1 + seed % 3)
    if seed % 4 != 3 or scenario.cases[-1].masked:
        return scenario
    # Refusals between combines along one handle: nothing but digests puts those in order.
    return replace(scenario, spoils="combine", num_combines=3)


FAR_HUNTING_LIMITS = replace(FAR_LIMITS, ranks=(2, 3, 4), max_tokens=4, max_topk=4, hidden=(16, 136, 128))


RAIL_HUNTING_LIMITS = replace(RAIL_LIMITS, max_tokens=4, max_topk=4, hidden=(16, 136))


@lru_cache(maxsize=4096)
def _far_scenario(seed: int, file: str) -> LowLatencyScenario:
    """Several calls one after the other, so that memory is used again; of a file's options."""
    if file.startswith(RAIL_FILES):
        scenario = draw_rail_low_latency(seed, limits=RAIL_HUNTING_LIMITS, num_cases=1 + seed % 3)
    else:
        limits = FAR_HUNTING_LIMITS
        limits = replace(limits, fixed={**limits.fixed, **LOW_LATENCY_OPTIONS.get(file, {})})
        scenario = draw_far_low_latency(seed, limits=limits, num_cases=1 + seed % 3)
    if seed % 4 != 3 or scenario.cases[-1].masked:
        return scenario
    return replace(scenario, spoils="combine", num_combines=3)


@lru_cache(maxsize=4096)
def _shrinking_scenario(seed: int, file: str) -> LowLatencyScenario:
    """One of kernels that may mask; of files that are in the way of all calls, every other one."""
    if not file.endswith("mend.hpp"):
        if seed % 2:
            return _low_latency_scenario(seed // 2, file)
        seed //= 2
    scenario = draw_shrinking(seed, limits=LOW_LATENCY_HUNTING_LIMITS)
    # Sends that wait are seldom: those of combines in halves, with weights of their own.
    return replace(scenario, hooked=True, carries_weights=False) if seed % 4 == 1 else scenario


def _run_either(scenario: LowLatencyScenario, *args: Any, **named: Any) -> RunReport:
    return (run_shrinking if scenario.gpu.shrinks else run)(scenario, *args, **named)


@lru_cache(maxsize=4096)
def _scenario(seed: int) -> Scenario:
    if seed % 4 == 3:
        return draw_tall_scenario(seed // 4)
    return draw_scenario(seed, limits=HUNTING_LIMITS)


@lru_cache(maxsize=4096)
def _copy_engine_scenario(seed: int) -> Scenario:
    """A dispatch, and combines whose rows copy engines return, one after the other into the same staging."""
    scenario = draw_scenario(seed, limits=HUNTING_LIMITS, num_cases=1)
    gpu = replace(_WITH_COPY_ENGINES[seed % len(_WITH_COPY_ENGINES)], calls_before=scenario.gpu.calls_before)
    return replace(scenario, gpu=gpu, use_layout="no", use_barrier=False, short_slots=False, num_combines=3)


@lru_cache(maxsize=4096)
def _counting_scenario(seed: int) -> Scenario:
    """One or two dispatches by top-k of a few stretches of tokens, which blocks mostly count together."""
    choices = RandomChoices(seed)
    cases = [draw_case(choices, COUNTING_LIMITS)]
    if seed % 5 == 0:
        cases.append(draw_case(choices, replace(COUNTING_LIMITS, ranks=(cases[0].num_ranks,))))
    gpu = replace(GPUS[(3, 4, 5)[seed % 3]], alone_tokens=64 if seed % 4 == 0 else 0)
    return Scenario(tuple(cases), gpu, use_layout="inside", num_combines=0)


@lru_cache(maxsize=4096)
def _expanded_scenario(seed: int) -> Scenario:
    """One whose combines are of expanded rows."""
    return replace(_scenario(seed), expands=("rows", "weighted")[seed % 2])


TWO_LEVEL_HUNTING_LIMITS = replace(
    TWO_LEVEL_LIMITS, ranks=(3, 4, 3), max_tokens=50, max_topk=3, hidden=(16,), masks=0.05
)


@lru_cache(maxsize=4096)
def _two_level_scenario(seed: int) -> Scenario:
    """Ranks of several domains; mostly several windows of the smallest size.

    In every fifth, calls in which only what a gateway relays puts ranks in order: rank 2 is the gateway of
    ranks 0 and 1, and only rank 0 has tokens.
    """
    if seed % 5 != 4:
        return draw_two_level_scenario(seed, limits=TWO_LEVEL_HUNTING_LIMITS)
    limits = replace(TWO_LEVEL_HUNTING_LIMITS, ranks=(3,), max_tokens=16, masks=0.0)
    scenario = draw_two_level_scenario(seed // 5, limits=limits)
    cases = tuple(
        replace(case, topk_idx=tuple(idx if rank == 0 else idx[:0] for rank, idx in enumerate(case.topk_idx)))
        for case in scenario.cases
    )
    again = {"ranks_per_node": 2, "cached": True}
    repeated = tuple(case.with_options(**again) for case in cases) * (3 - len(cases))
    return replace(scenario, cases=repeated, num_combines=3 * (seed % 2), short_slots=False)


@dataclass(frozen=True)
class Catch:
    """One mutant's outcome. failure: the report of the run that caught it; None if it escaped."""

    mutant: Mutant
    failure: RunReport | None
    runs: int
    seconds: float

    @property
    def caught_by(self) -> str:
        return "" if self.failure is None else self.failure.kind


class HuntOver(Exception):
    """The hunt is given up."""


def hunt(
    mutant: Mutant,
    kernels: Any,
    *,
    runs: int = 400,
    seconds: float = 60.0,
    over: Event | None = None,
) -> Catch:
    """Explores one mutant: in every second run a rank stops somewhere.

    kernels: a loaded library in which the mutant runs. Raises HuntOver once `over` is set.
    """

    def progress(_: object) -> None:
        if over is not None and over.is_set():
            raise HuntOver

    progress(None)
    begin = time.monotonic()
    first = FIRST_SEEDS.get(mutant.name, 0)
    for files, explore_kind in CASES.items():
        if mutant.file.startswith(files):
            cases = explore_kind(runs=runs, seconds=seconds, kernels=kernels, progress=progress)
            found = None if cases.failure is None else cases.failure.report
            return Catch(mutant, found, cases.runs, cases.seconds)
    if mutant.file.startswith((*LOW_LATENCY_FILES, *FAR_FILES, *RAIL_FILES)):
        masks = mutant.file in MASKING_FILES or mutant.name in MASKING_EDITS
        drawn = partial(_shrinking_scenario if masks else _low_latency_scenario, file=mutant.file)
        if mutant.file.startswith((*FAR_FILES, *RAIL_FILES)):
            drawn = partial(_far_scenario, file=mutant.file)
        calls = explore_low_latency(
            first_seed=first,
            runs=runs,
            seconds=seconds,
            schedules_per_scenario=4,  # in three of them a rank stops
            with_stops=True,
            scenarios=drawn,
            runner=_run_either if masks else run,
            kernels=kernels,
        )
        found = None if calls.failure is None else calls.failure.report
        return Catch(mutant, found, calls.runs, calls.seconds)
    if mutant.file.startswith(TWO_LEVEL_FILES):
        crossings = explore(
            first_seed=first,
            runs=runs,
            seconds=seconds,
            schedules_per_scenario=2,
            with_stops=True,
            scenarios=_two_level_scenario,
            kernels=kernels,
            progress=progress,
        )
        found = None if crossings.failure is None else crossings.failure.report
        return Catch(mutant, found, crossings.runs, crossings.seconds)
    by_copy_engine = mutant.file in COPY_ENGINE_FILES
    counts = mutant.file in COUNTING_FILES
    scenarios = _copy_engine_scenario if by_copy_engine else _counting_scenario if counts else _scenario
    if mutant.file in EXPANDED_FILES:
        scenarios = _expanded_scenario
    tally = explore(
        first_seed=first,
        runs=runs,
        seconds=seconds,
        schedules_per_scenario=4 if by_copy_engine else 2,
        with_stops=True,
        scenarios=scenarios,
        kernels=kernels,
        progress=progress,
    )
    found = None if tally.failure is None else tally.failure.report
    return Catch(mutant, found, tally.runs, time.monotonic() - begin)


def hunt_all(
    wanted: Sequence[Mutant],
    csrc: Path,
    *,
    runs: int = 400,
    seconds: float = 60.0,
    workers: int = 2,
    done: Callable[[Catch], None] | None = None,
) -> list[Catch]:
    """All of them, `workers` at a time, in their order; `done` is called as each is finished.

    Those that are known to be harmless get a tenth of the time: to be seen escaping.
    """

    over = Event()

    def one(mutant: Mutant) -> Catch:
        patience = seconds / 10 if mutant.name in HARMLESS else seconds
        with libraries.running(mutant) as kernels:
            catch = hunt(mutant, kernels, runs=runs, seconds=patience, over=over)
        if done is not None:
            done(catch)
        return catch

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        libraries = _Libraries(wanted, csrc, Path(folder))
        try:
            return list(pool.map(one, wanted))
        except BaseException:  # Ctrl-C: the pool waits for its workers, which look at this between two runs
            over.set()
            raise


class _Libraries:
    """Libraries that mutants run in: one for all that can share it, one each for the others."""

    def __init__(self, wanted: Sequence[Mutant], csrc: Path, folder: Path) -> None:
        self._csrc, self._folder = csrc, folder
        self._common = precompile(csrc, folder)
        shared = [mutant for mutant in wanted if can_share(mutant)]
        (folder / "shared").mkdir()
        self._library = MutantLibrary(shared, csrc, folder / "shared") if shared else None
        self._kernels = _emulator.load_kernels(str(self._library.path)) if self._library else None

    @contextmanager
    def running(self, mutant: Mutant) -> Iterator[Any]:
        """The kernels in which this thread runs the mutant, until the block ends."""
        if self._library is None or not can_share(mutant):
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                path = build(mutant, self._csrc, Path(folder), self._common)
                kernels = _emulator.load_kernels(str(path))
            yield kernels
            return
        self._library.choose(mutant)
        try:
            yield self._kernels
        finally:
            self._library.choose(None)


def markdown(catches: Sequence[Catch]) -> Iterator[str]:
    """The table of docs/verification.md: mutation, what caught it, after how many schedules and seconds."""
    yield "| mutation | caught by | schedules | seconds |"
    yield "|---|---|---|---|"
    for catch in catches:
        name = catch.mutant.name
        if catch.failure is not None:
            yield f"| {name} | {catch.caught_by} | {catch.runs} | {catch.seconds:.2f} |"
        elif name in HARMLESS:
            yield f"| {name} | harmless: {HARMLESS[name]} | {catch.runs} | {catch.seconds:.2f} |"
        else:
            yield f"| {name} | **escaped** | {catch.runs} | {catch.seconds:.2f} |"
