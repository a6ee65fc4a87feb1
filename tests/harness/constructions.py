"""Many constructions and reconnections of Buffer in a row, none of which may fail: nobody is dead.

    python tests/harness/constructions.py --ranks 3 --count 20000 --groups 3

A round is a construction, a rank left out and a rank taken in again, each followed by a dispatch and a
combine whose sums are known, and the end. Several groups of ranks go on side by side, every other of them
with its store in a file. The first round that fails ends the run; then the command says for how long the
ranks' processes stood still. Status 1: a false fault of the library. Status 2: a process had no processor for
half of the time-out or longer, so that the run says nothing about the library.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from deepep import Buffer, DeepEPError
from deepep.sim.worlds.world import World

#: Times that a round connects the ranks: at construction, without one of them, and with all of them again.
PER_ROUND = 3
#: Seconds that a peer may take, on a machine with more ranks than cores.
PATIENCE = 60.0
#: Rounds that are begun at once; the next follow on the same group.
PORTION = 100
STORES = ("tcp", "file")
HIDDEN, TOKENS, EXPERTS_EACH = 16, 4, 2


class Pulse:
    """A thread that does nothing but note for how long it could not: `longest`, in seconds."""

    BEAT = 0.02

    def __init__(self) -> None:
        self.longest = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self.BEAT):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last - self.BEAT), now

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()


@dataclass(frozen=True)
class Account:
    """A rank's account of some rounds: how many went well, the error of the next, "" if there was none;
    seconds of the longest round, and of the longest time for which its process stood still.
    """

    rounds: int
    error: str
    longest: float
    still: float


def train(buffer: Any, ranks: list[int]) -> None:
    """Dispatches every token to all of `ranks` and combines: each comes back once from each of them."""
    num_experts = EXPERTS_EACH * buffer.group_size
    idx = torch.tensor([[r * EXPERTS_EACH for r in ranks]] * TOKENS)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts)
    x = torch.full((TOKENS, HIDDEN), float(buffer.rank + 1)).bfloat16()
    received, *_, handle, _ = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert)
    assert received.shape == (TOKENS * len(ranks), HIDDEN), received.shape
    assert torch.equal(buffer.combine(received, handle)[0], x * len(ranks))


def live(ctx: Any, number: int, options: dict[str, Any]) -> None:
    """Runs the round `number`, from which it follows who is left out."""
    everyone = list(range(ctx.num_ranks))
    buffer = Buffer(ctx.group, timeout=PATIENCE, enable_shrink=True, **options)
    train(buffer, everyone)
    absent = number % ctx.num_ranks
    if ctx.rank != absent:
        buffer.low_latency_update_mask_buffer(absent, True)
        train(buffer, [r for r in everyone if r != absent])
    buffer.low_latency_clean_mask_buffer()
    train(buffer, everyone)
    buffer.destroy()


def construct_often(ctx: Any, rounds: int, first: int, options: dict[str, Any]) -> Account:
    """Runs `rounds` rounds on this rank, up to the first that fails."""
    done, longest, error = 0, 0.0, ""
    with Pulse() as pulse:
        while done < rounds and not error:
            start = time.monotonic()
            try:
                live(ctx, first + done, options)
                done += 1
            except DeepEPError as raised:
                error = f"{type(raised).__name__}: {raised}"
            longest = max(longest, time.monotonic() - start)
    return Account(done, error, longest, pulse.longest)


class FalseFault(Exception):
    """A round failed with nobody dead. accounts: the ranks'."""

    def __init__(self, accounts: list[Account]) -> None:
        tales = [
            f"rank {rank}, after {a.rounds} rounds (its process stood still for {a.still:.1f} s): {a.error}"
            for rank, a in enumerate(accounts)
        ]
        super().__init__("\n".join(tales))
        self.is_starved = max(account.still for account in accounts) >= PATIENCE / 2


@dataclass(frozen=True)
class Plan:
    """A group's work: `rounds` rounds on `ranks` ranks that meet through a store of a kind of `STORES`."""

    ranks: int
    rounds: int
    store: str
    options: dict[str, Any]

    def run(self) -> tuple[float, float]:
        """Runs it in processes of its own. Returns the seconds of the longest round, and of the longest
        standstill. Raises FalseFault.
        """
        longest = still = 0.0
        with World(self.ranks, timeout=PATIENCE, grace=PATIENCE, store=self.store) as world:
            for first in range(0, self.rounds, PORTION):
                rounds = min(PORTION, self.rounds - first)
                seconds = 10 * PATIENCE + 10.0 * rounds
                accounts = world.run(construct_often, rounds, first, self.options, timeout=seconds)
                if any(account.error for account in accounts):
                    raise FalseFault(accounts)
                longest = max(longest, *(account.longest for account in accounts))
                still = max(still, *(account.still for account in accounts))
        return longest, still


def run(ranks: int, count: int, groups: int, options: dict[str, Any]) -> str:
    """Runs at least `count` constructions and reconnections; what to say of them. Raises FalseFault."""
    rounds = -(-count // (PER_ROUND * groups))
    plans = [Plan(ranks, rounds, STORES[i % len(STORES)], options) for i in range(groups)]
    start = time.monotonic()
    with ThreadPoolExecutor(groups) as pool:
        longest, still = map(max, zip(*pool.map(Plan.run, plans), strict=True))
    return (
        f"{PER_ROUND * rounds * groups} constructions and reconnections of {ranks} ranks, "
        f"{groups} groups side by side: none failed; {time.monotonic() - start:.0f} s, "
        f"the longest three {longest:.2f} s, the longest standstill of a process {still:.2f} s"
    )


def main() -> int:
    """Runs the command, and says what it did in one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--count", type=int, default=20_000, help="constructions and reconnections in all")
    parser.add_argument("--groups", type=int, default=2, help="groups of ranks side by side")
    parser.add_argument("--backend", default="reference")
    args = parser.parse_args()
    try:
        print(run(args.ranks, args.count, args.groups, {"backend": args.backend}))
    except FalseFault as fault:
        print(fault, file=sys.stderr)
        print(
            "starved: says nothing of the library" if fault.is_starved else "a false fault", file=sys.stderr
        )
        return 2 if fault.is_starved else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
