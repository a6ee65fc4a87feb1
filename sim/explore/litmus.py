"""Litmus kernels (csrc/emulator/litmus*.hpp): small programs that ask what the memory model says.

Of each program in PROGRAMS one variant is right, and every other lacks one ordering.
`python -m deepep.sim.explore.litmus` prints what caught each, as the table in docs/verification.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepep import _emulator
from deepep.sim.emulator.shapes import STRATEGIES


@dataclass
class Litmus:
    """One litmus kernel on `ranks` ranks, each in the role of its number."""

    kernel: str
    ranks: int = 2
    writer: int = 0
    reader: int = 0
    blocks: int = 1
    threads: int = 32
    shared: int = 0
    num_sms: int = 0
    timeout_ns: int = 1_000_000
    faults: Sequence[_emulator.MachineFault] = ()
    words: int = 1024  # symmetric, zero
    out_words: int = 256  # of each rank, zero
    launches: int = 1
    launches_of: Mapping[int, int] = field(default_factory=dict)  # of some ranks, where it is another number
    ranks_per_node: int = 0  # 0: one domain, and one array of words for all
    max_open_puts: int = 0
    weak_signals: bool = False
    out: list[Any] = field(default_factory=list)  # after a run, by rank

    def run(self, seed: int, strategy: str = "random") -> Any:
        """The machine's outcome; `out` holds what the ranks wrote."""
        machine = _emulator.Machine(
            num_ranks=self.ranks,
            max_blocks=self.blocks,
            max_threads=self.threads,
            num_sms=self.num_sms,
            ranks_per_node=self.ranks_per_node,
            max_open_puts=self.max_open_puts,
            weak_signals=self.weak_signals,
            strategy=strategy,
            seed=seed,
            expected_steps=200,
            max_steps=1_000_000,
            faults=list(self.faults),
        )
        words, links = [], []
        for rank in range(self.ranks if self.ranks_per_node else 1):
            space = "remote" if self.ranks_per_node else "symmetric"
            words.append(machine.allocate(f"words@{rank}", space, rank, 4 * self.words))
            links.append(machine.allocate(f"links@{rank}", "symmetric", rank, 4 * self.words))
            for array in (words, links):
                machine.write(rank, array[rank], bytes(4 * self.words))
        outs = []
        for rank in range(self.ranks):
            outs.append(machine.allocate(f"out@{rank}", "device", rank, 4 * self.out_words))
            machine.write(rank, outs[rank], bytes(4 * self.out_words))
        machine.meet()
        for rank in range(self.ranks):
            own, neighbour = (rank, min(rank ^ 1, self.ranks - 1)) if self.ranks_per_node else (0, 0)
            args = _emulator.litmus_args(
                role=rank,
                writer=self.writer,
                reader=self.reader,
                words=words[own],
                out=outs[rank],
                timeout_ns=self.timeout_ns,
                links=links[own],
                neighbour=links[neighbour],
                far=words[neighbour],
            )
            for _ in range(self.launches_of.get(rank, self.launches)):
                machine.launch(
                    rank,
                    self.kernel,
                    args,
                    self.blocks,
                    self.threads,
                    self.shared,
                    _emulator.own_kernels(),
                )
        outcome = machine.run()
        self.out = [
            np.frombuffer(machine.peek(address, 4 * self.out_words), dtype=np.uint32) for address in outs
        ]
        return outcome

    def outcomes(self, seeds: Iterable[int], seen: Callable[[Litmus], Any] | None = None) -> Counter[Any]:
        """Over seeds and strategies: kinds of failure, and `seen` of the runs that did not fail."""
        found: Counter[Any] = Counter()
        for seed in seeds:
            for strategy in STRATEGIES:
                outcome = self.run(seed, strategy)
                found[outcome.kind or (seen(self) if seen else "done")] += 1
        return found

    def first_failure(self, schedules: int) -> tuple[str, int] | None:
        """The kind of the first failure and the number of schedules it took; None if none of them fails."""
        for number in range(schedules):
            outcome = self.run(number // len(STRATEGIES), STRATEGIES[number % len(STRATEGIES)])
            if outcome.kind:
                return outcome.kind, number + 1
        return None


@dataclass(frozen=True)
class Program:
    """A litmus kernel and its variants.

    rule: what variant 0 does right. wrong, right: other variants, by number.
    published: the number of the variant that is a bug this field has published.
    """

    kernel: str
    rule: str
    wrong: Mapping[int, str]
    right: Mapping[int, str] = field(default_factory=dict)
    published: int | None = None
    how: Mapping[str, Any] = field(default_factory=dict)

    def litmus(self, variant: int) -> Litmus:
        given = {"shared": 4096, "timeout_ns": 100_000_000, "writer": variant, **self.how}
        return Litmus(self.kernel, **given)


_ONE_RANK = {"ranks": 1}
_TWO_NODES = {"ranks_per_node": 1}

PROGRAMS = (
    Program(
        "bulk_load_kernel",
        "a bulk load is waited for through its mbarrier's phase",
        {
            1: "no proxy fence behind mbarrier_init",
            2: "no wait",
            3: "a relaxed wait",
            4: "the bytes of one of two copies expected",
            5: "waits for the phase before",
            6: "waits for the phase after",
            7: "nobody waits at all",
            8: "only lane 0 waits",
        },
        how=_ONE_RANK,
    ),
    Program(
        "reload_kernel",
        "a stage that was read plainly is reloaded behind a proxy fence and a barrier",
        {
            1: "a missing proxy fence before a stage is reloaded",
            2: "no barrier before it is reloaded",
            3: "fence and barrier before the reading",
            4: "one phase for all rounds",
            5: "the parity for a phase",
        },
        published=1,
        how=_ONE_RANK,
    ),
    Program(
        "bulk_store_kernel",
        "a bulk store is fenced, waited for, and released with system scope",
        {
            1: "no proxy fence between filling the stage and the store",
            3: "no barrier between them",
            4: "a proxy fence for global memory",
            5: "only its reading waited for",
            6: "the signal before the wait",
            7: "a missing system release between bulk stores and the barrier's signal",
            8: "no commit",
        },
        {2: "the proxy fence by the storing lane, behind the barrier", 9: "a fence and a relaxed signal"},
        published=7,
    ),
    Program(
        "relay_kernel",
        "a stage is loaded again when its store was read",
        {
            1: "a stage reused before its store was read (stages - 1 groups pending)",
            2: "no wait for the reading",
            3: "nothing waited for at the end",
            4: "only the reading waited for at the end",
            5: "no commit",
        },
        published=1,
        how=_ONE_RANK,
    ),
    Program(
        "groups_kernel",
        "the first of two groups is complete when one may be pending",
        {1: "the second is read"},
        how=_ONE_RANK,
    ),
    Program(
        "pull_kernel",
        "what another rank stored plainly is loaded in bulk behind a proxy fence",
        {1: "no proxy fence", 3: "one for shared memory", 4: "one before the flag is seen"},
        {2: "the fence on the other rank, before its flag"},
    ),
    Program(
        "give_back_kernel",
        "a slot that was read plainly is stored to in bulk behind a proxy fence",
        {1: "no proxy fence"},
        {2: "the fence on the reading rank"},
    ),
    Program(
        "hand_over_kernel",
        "an arrival releases and a wait acquires",
        {1: "a relaxed arrival", 2: "a relaxed wait"},
        how={"ranks": 1, "threads": 64},
    ),
    Program(
        "generation_kernel",
        "a flag carries the round it belongs to",
        {1: "a parity flag with no generation that accepts a stale signal"},
        published=1,
    ),
    Program(
        "cleaning_kernel",
        "a slot is cleaned when the bulk stores to it are complete",
        {1: "a slot cleaned while a late write is in flight"},
        published=1,
    ),
    Program(
        "put_signal_kernel",
        "a signal tells of its put",
        {
            1: "a relaxed wait",
            3: "a relaxed wait and a fence of gpu scope",
            4: "no wait",
            5: "the data in a put of its own before",
            8: "a fence behind both",
            9: "the other node by pointer",
        },
        {
            2: "a relaxed wait and a fence",
            6: "a fence of puts between",
            7: "a quiet between",
            10: "a signal that is added",
        },
        how=_TWO_NODES,
    ),
    Program(
        "put_source_kernel",
        "a put's source is written again behind a quiet",
        {1: "nothing between", 2: "a fence of puts"},
        how=_TWO_NODES,
    ),
    Program(
        "put_again_kernel",
        "a slot is given back by a signal behind a fence of system scope",
        {1: "no fence", 2: "a fence of gpu scope"},
        how=_TWO_NODES,
    ),
    Program(
        "put_relay_kernel",
        "what came from another node is handed on over NVLink",
        {
            1: "a relaxed flag to the neighbour",
            2: "a relaxed wait for the signal",
            3: "the neighbour reads the NIC's memory itself",
        },
        how={"ranks": 4, "ranks_per_node": 2},
    ),
    Program(
        "put_count_kernel",
        "a signal that is added to tells of all its puts",
        {1: "each sets it"},
        how={"ranks": 3, "ranks_per_node": 1},
    ),
    Program(
        "put_then_bulk_kernel",
        "what a put brought is loaded in bulk behind a proxy fence",
        {1: "no proxy fence"},
        how=_TWO_NODES,
    ),
    Program(
        "put_cleaning_kernel",
        "a slot is cleaned when a quiet has completed the puts to it",
        {1: "a slot cleaned while a put is in flight past the end of its kernel", 2: "a fence of puts"},
        published=1,
        how={"ranks_per_node": 1, "launches": 2, "launches_of": {1: 1}},
    ),
    Program(
        "put_quiet_kernel",
        "a quiet completes the puts its thread knows of",
        {1: "a put it does not know of"},
        how={"ranks_per_node": 1, "threads": 64},
    ),
)


def markdown(schedules: int = 300) -> Iterator[str]:
    """The table: rule, what was removed or replaced, what caught it, after how many schedules."""
    yield "| rule | without it | caught by | schedules |"
    yield "|---|---|---|---|"
    for program in PROGRAMS:
        for variant, what in {0: "", **program.right, **program.wrong}.items():
            failure = program.litmus(variant).first_failure(schedules)
            rule = program.rule if variant == 0 else ""
            text = f"**{what}**" if variant == program.published else what
            if variant not in program.wrong:
                text = f"(right) {what}".strip()
                verdict = f"nothing | {schedules}" if failure is None else f"**{failure[0]}** | {failure[1]}"
            else:
                verdict = f"**escaped** | {schedules}" if failure is None else f"{failure[0]} | {failure[1]}"
            yield f"| {rule} | {text} | {verdict} |"


if __name__ == "__main__":
    print("\n".join(markdown()))
