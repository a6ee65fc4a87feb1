"""Runs examples through Buffer while a fault befalls one rank, and judges whether the promises were kept.

The promises: nobody hangs. A rank that dies or stalls is named, on all others, by a PeerTimeoutError within
the deadline; once it is masked the others carry on with right results. In low latency it is masked by the
library, and no call fails. Ranks that pass different arguments
all get the same kind of error, and the buffer works on. Ranks whose calls do not match all get an error. A
delay below the deadline changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import Choices
from deepep.sim.faults.fault import CHANGES, Effect, Fault, FaultyBuffer, LeftOut, draw_fault
from deepep.sim.fuzz.buffer_runs import as_buffer_call, run_on_buffer
from deepep.sim.rules import oracle
from deepep.sim.rules.checking import Violation
from deepep.sim.rules.observed import RankView, first_difference
from deepep.sim.worlds.outcomes import Outcome, Status
from deepep.sim.worlds.rank_process import RankContext
from deepep.sim.worlds.world import World

#: Seconds beyond a buffer's own time-out in which its error has to come: what the library allows itself for
#: the ranks to agree on who is missing (1 s and 5 %), and what a busy machine adds.
GRACE = 4.0


@dataclass
class Tale:
    """One rank's account of a run.

    Attributes:
        views: of the examples it finished.
        error: name of the type of the error that stopped it, and its message.
        waited_on: the ranks that a PeerTimeoutError names.
        blamed: the rank that an ArgumentError names.
        seconds: from the call to the error.
        masked: the ranks masked in the end, by the library or because a PeerTimeoutError names them.
        after: view of an example that was run afterwards, if there was one.
    """

    views: list[RankView] = field(default_factory=list)
    error: str = ""
    message: str = ""
    waited_on: tuple[int, ...] = ()
    blamed: int | None = None
    seconds: float = 0.0
    masked: tuple[int, ...] = ()
    after: RankView | None = None


def run_with_fault(ctx: RankContext, cases: Sequence[Case], fault: Fault, timeout: float) -> Tale:
    """One rank's part: the examples on a fresh buffer, until an error; then one more example, if that can be.

    After a PeerTimeoutError the ranks it names are masked first; the last example is without those masked.
    """
    from deepep import Buffer
    from deepep.errors import ArgumentError, PeerTimeoutError

    buffer = Buffer(ctx.group, low_latency_mode=True, enable_shrink=True, timeout=timeout)
    faulty = FaultyBuffer(buffer, fault if ctx.rank == fault.rank else None)
    tale = Tale()
    try:
        for case in cases:
            try:
                tale.views.append(run_on_buffer(case, faulty))
            except LeftOut:
                continue
    except (ArgumentError, PeerTimeoutError) as error:
        tale.error, tale.message = type(error).__name__, str(error)
        tale.seconds = time.monotonic() - faulty.last_call_began
        if isinstance(error, PeerTimeoutError):
            tale.waited_on = error.record.waited_on
            if tale.waited_on and ctx.rank not in tale.waited_on:
                for rank in tale.waited_on:
                    buffer.low_latency_update_mask_buffer(rank, True)
        else:
            tale.blamed = error.rank
            if fault.effect is Effect.CHANGE:
                tale.after = run_on_buffer(cases[-1], buffer)
    tale.masked = buffer.info.masked_ranks
    if tale.masked:
        tale.after = run_on_buffer(_without(cases[-1], tale.masked), buffer)
    return tale


def draw_faulty_examples(
    choices: Choices, num_ranks: int, *, timeout: float, examples: int = 3
) -> tuple[list[Case], Fault]:
    """Examples for Buffer, and something that goes wrong in one of them, but the last.

    The last is for noticing: a rank that dies when it has sent what the others need is missed only then.
    """
    limits = Limits(
        ranks=(num_ranks,),
        max_tokens=6,
        hidden=(128,),
        masks=0.0,
        fixed={"mode": choices.pick(("ht", "ll")), "skew": "none"},
    )
    cases = [as_buffer_call(draw_case(choices, limits)) for _ in range(examples)]
    return cases, draw_fault(choices, cases[:-1], timeout=timeout)


def _without(case: Case, ranks: tuple[int, ...]) -> Case:
    """The example with these ranks masked from the start; `run_on_buffer` leaves masking to its caller."""
    return replace(case.with_options(mask_at="dispatch"), masked=ranks)


def judge_fault(world: World, cases: Sequence[Case], fault: Fault, timeout: float) -> None:
    """Runs the examples with the fault and checks what was promised.

    Raises:
        Violation: a promise was not kept.
    """
    gone = fault.effect in (Effect.KILL, Effect.STALL)
    outcomes = world.try_run(
        run_with_fault,
        list(cases),
        fault,
        timeout,
        timeout=20 * (timeout + GRACE),
        not_awaited=(fault.rank,) if fault.effect is Effect.STALL else (),
    )
    try:
        tales = _tales(outcomes, fault, gone)
        if gone and cases[0].options.mode == "ll":
            _others_go_on(tales, cases, fault)
        elif gone:
            _others_name_the_missing(tales, cases, fault, timeout)
        elif fault.effect is Effect.DELAY:
            _nothing_happened(tales, cases)
        elif fault.effect is Effect.CHANGE:
            _all_refuse_alike(tales, cases, fault)
        else:
            _all_notice(tales, timeout)
    except Violation as violation:
        raise Violation(f"{fault}: {violation}", violation.rank) from None


def _tales(outcomes: list[Outcome], fault: Fault, gone: bool) -> dict[int, Tale]:
    """The ranks' accounts; Violation if one is missing that should be there."""
    tales = {}
    for outcome in outcomes:
        if outcome.ok:
            tales[outcome.rank] = outcome.value
        elif outcome.rank != fault.rank or not gone:
            raise Violation(outcome.describe(), outcome.rank)
        else:
            expected = Status.DIED if fault.effect is Effect.KILL else Status.HUNG
            if outcome.status is not expected:
                raise Violation(outcome.describe(), outcome.rank)
    return tales


def _others_name_the_missing(
    tales: dict[int, Tale], cases: Sequence[Case], fault: Fault, timeout: float
) -> None:
    if fault.rank in tales:
        raise Violation("the fault did not strike", fault.rank)
    for rank, tale in tales.items():
        if tale.error != "PeerTimeoutError" or tale.waited_on != (fault.rank,):
            raise Violation(f"rank {rank}: got {tale.error or 'no error'}: {tale.message}", rank)
        if tale.seconds > timeout + GRACE:
            raise Violation(f"rank {rank}: the error took {tale.seconds:.1f} s, not {timeout}", rank)
    _goes_on_without(tales, cases, fault)
    _finished_are_right(tales, cases)


def _goes_on_without(tales: dict[int, Tale], cases: Sequence[Case], fault: Fault) -> None:
    after = _without(cases[-1], (fault.rank,))
    views = [tales[r].after or RankView() if r in tales else RankView() for r in range(after.num_ranks)]
    _same(after, views, "after masking the missing rank")


def _others_go_on(tales: dict[int, Tale], cases: Sequence[Case], fault: Fault) -> None:
    """Examples are complete up to the one that the fault struck, which is so or without the rank from its
    dispatch or its combine on; those after it are without it.
    """
    if fault.rank in tales:
        raise Violation("the fault did not strike", fault.rank)
    for rank, tale in tales.items():
        if tale.error or tale.masked != (fault.rank,):
            raise Violation(f"rank {rank}: masked {tale.masked}; {tale.error}: {tale.message}", rank)
    struck = fault.call // 2
    for position, case in enumerate(cases):
        without = _without(case, (fault.rank,))
        allowed = [without] if position > struck else [case]
        if position == struck:
            allowed += [without.with_options(mask_at="combine"), without]
        views = [tales[r].views[position] if r in tales else RankView() for r in range(case.num_ranks)]
        differences = [first_difference(oracle.observe(one), views) for one in allowed]
        if all(differences):
            raise Violation(f"example {position}: {differences}", fault.rank)
    _goes_on_without(tales, cases, fault)


def _nothing_happened(tales: dict[int, Tale], cases: Sequence[Case]) -> None:
    for rank, tale in tales.items():
        if tale.error:
            raise Violation(f"rank {rank}: got {tale.error}: {tale.message}", rank)
    _finished_are_right(tales, cases)


def _all_refuse_alike(tales: dict[int, Tale], cases: Sequence[Case], fault: Fault) -> None:
    expected = CHANGES[fault.change].error
    for rank, tale in tales.items():
        if tale.error != expected or tale.blamed is None:
            raise Violation(f"rank {rank}: expected {expected}, got {tale.error}: {tale.message}", rank)
        if expected != "MismatchError" and tale.blamed != fault.rank:
            raise Violation(f"rank {rank}: rank {tale.blamed} was blamed: {tale.message}", rank)
    views = [tales[rank].after or RankView() for rank in sorted(tales)]
    _same(cases[-1], views, "after the refused call")
    _finished_are_right(tales, cases)


def _all_notice(tales: dict[int, Tale], timeout: float) -> None:
    """Calls that do not match end in errors; who had made its last call before that is exempt."""
    if not any(tale.error or tale.masked for tale in tales.values()):
        raise Violation("nobody noticed that the calls do not match")
    for rank, tale in tales.items():
        if tale.seconds > timeout + GRACE:
            raise Violation(f"rank {rank}: the error took {tale.seconds:.1f} s, not {timeout}", rank)


def _finished_are_right(tales: dict[int, Tale], cases: Sequence[Case]) -> None:
    for position, case in enumerate(cases):
        views = [
            tales[rank].views[position] if rank in tales and position < len(tales[rank].views) else RankView()
            for rank in range(case.num_ranks)
        ]
        _same(case, views, f"example {position}")


def _same(case: Case, views: list[RankView], when: str) -> None:
    # Ranks that are gone have no view.
    difference = first_difference(oracle.observe(case), views)
    if difference is not None:
        raise Violation(f"{when}: {difference}", difference.rank)
