"""Runs of the emulator's litmus kernels (csrc/emulator/litmus.hpp)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from deepep import _emulator

STRATEGIES = ("random", "pct", "starve")


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
    faults: Sequence[tuple[int, int, bool, int, bool]] = ()
    words: int = 1024  # symmetric, zero
    out_words: int = 256  # of each rank, zero
    launches: int = 1
    launches_of: dict[int, int] = field(default_factory=dict)  # of some ranks, where it is another number
    ranks_per_node: int = 0  # 0: one node, and one array of words for all
    out: list[Any] = field(default_factory=list)  # after a run, by rank

    def run(self, seed: int, strategy: str = "random") -> Any:
        """The machine's outcome; `out` holds what the ranks wrote."""
        machine = _emulator.Machine(
            num_ranks=self.ranks,
            max_blocks=self.blocks,
            max_threads=self.threads,
            num_sms=self.num_sms,
            ranks_per_node=self.ranks_per_node,
            strategy=strategy,
            seed=seed,
            expected_steps=200,
            max_steps=1_000_000,
            faults=list(self.faults),
        )
        words = []
        for rank in range(self.ranks if self.ranks_per_node else 1):
            words.append(machine.allocate(f"words@{rank}", "symmetric", rank, 4 * self.words))
            machine.write(rank, words[rank], bytes(4 * self.words))
        outs = []
        for rank in range(self.ranks):
            outs.append(machine.allocate(f"out@{rank}", "device", rank, 4 * self.out_words))
            machine.write(rank, outs[rank], bytes(4 * self.out_words))
        machine.meet()
        ranks = [r for r in range(self.ranks) for _ in range(self.launches_of.get(r, self.launches))]
        for rank in ranks:
            own, neighbour = (rank, min(rank ^ 1, self.ranks - 1)) if self.ranks_per_node else (0, 0)
            args = _emulator.litmus_args(
                rank, self.writer, self.reader, words[own], outs[rank], self.timeout_ns, words[neighbour]
            )
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


@pytest.fixture
def litmus() -> type[Litmus]:
    return Litmus


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    torch.set_num_threads(1)
