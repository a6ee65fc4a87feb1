"""Ranks as threads of this process, with gloo connections between them: for the control plane, which does
not care whose threads its ranks are. None of them can die; a world of processes (deepep.sim) is for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepep.runtime.control.transport import private_group, set_timeout

HANG = 120.0
"""Seconds after which a test is taken to hang."""


class Ranks:
    """Ranks of one group, whose threads begin anew with every run; the store is kept."""

    def __init__(self, num_ranks: int, store: dist.Store | None = None) -> None:
        self.num_ranks = num_ranks
        self.store = dist.HashStore() if store is None else store
        self.groups: list[Any] = [None] * num_ranks
        self._meet = threading.Barrier(num_ranks)
        self.run(self._join)

    def _join(self, rank: int) -> None:
        self.groups[rank] = private_group(self.store, rank, self.num_ranks, HANG, "cpu")

    def meet(self) -> None:
        """Returns once all ranks have called it."""
        self._meet.wait(HANG)

    def run(self, part: Callable[[int], Any]) -> list[Any]:
        """Calls `part(rank)` as every rank. Returns what it returned, or the exception that it raised."""
        outcomes: list[Any] = [None] * self.num_ranks

        def play(rank: int) -> None:
            try:
                outcomes[rank] = part(rank)
            except BaseException as error:  # it is what the test asks for
                outcomes[rank] = error

        threads = [threading.Thread(target=play, args=(r,), daemon=True) for r in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG)
            assert not thread.is_alive(), "a rank hangs"
        return outcomes


def raised(call: Callable[[], Any]) -> BaseException | None:
    """The exception that `call` raises, or None."""
    try:
        call()
    except BaseException as error:  # it is what the test asks for
        return error
    return None


def be_patient(buffer: Any, seconds: float) -> None:
    """Gives a buffer on the reference another time-out, from its next call on: a short one is for the call
    that waits it out, and no machine stalls so long that the others miss a long one.
    """
    membership = buffer.runtime._control.membership
    membership.timeout, membership.grace = seconds, 1.0 + 0.05 * seconds
    for link in (membership._control, membership._payload):
        if link is not None:
            set_timeout(link.group, seconds)


def exchange(buffer: Any, rank: int, num_ranks: int) -> torch.Tensor:
    """A dispatch of one row to every rank, and its combine: the row times the number of ranks there are."""
    idx = torch.arange(num_ranks)[None]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_ranks)
    x = torch.full((1, 16), float(rank + 1)).bfloat16()
    out = buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, torch.ones(1, num_ranks))
    combined: torch.Tensor = buffer.combine(out[0], out[4])[0]
    return combined / x


def works(buffer: Any, rank: int, num_ranks: int) -> bool:
    """True if all ranks take part and the sums are right."""
    return bool((exchange(buffer, rank, num_ranks) == num_ranks).all())
