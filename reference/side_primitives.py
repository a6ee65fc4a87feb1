"""All-gathers, sends around a ring and fetches from a table over the ranks, seen from above: their oracle.

Pure functions over lists indexed by rank, and a model of the ring that says which calls return.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import require


def gathered(tensors: Sequence[Tensor | None]) -> Tensor:
    """[R, ...]: every rank's tensor, in the order of ranks; zeros for None, a rank that is left out."""
    like = next((t for t in tensors if t is not None), None)
    require(like is not None, "tensors: got none; allowed: one rank's at least")
    assert like is not None
    return torch.stack([torch.zeros_like(like) if t is None else t for t in tensors])


def fetched(storages: Sequence[Tensor], indices: Tensor, sf: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Entries of the table that the ranks' storages [n, H] make, one rank's behind the other's.

    indices [T, k]: any order, any repeats. sf [R * n, P] or None: scales of all entries. Returns the entries
    [T * k, H] and their scales [T, k * P].
    """
    rows = [row for storage in storages for row in storage]
    wanted = [int(index) for index in indices.flatten()]
    require(
        all(0 <= index < len(rows) for index in wanted), f"indices: got {wanted}; allowed: 0 .. {len(rows)}"
    )
    data = storages[0].new_empty(len(wanted), storages[0].shape[1])
    for place, index in enumerate(wanted):
        data[place] = rows[index]
    if sf is None:
        return data, None
    scales = sf.new_empty(len(wanted), sf.shape[1])
    for place, index in enumerate(wanted):
        scales[place] = sf[index]
    return data, scales.view(indices.shape[0], indices.shape[1] * sf.shape[1])


class RingModel:
    """Tensors on their way between neighbours of a ring of `num_ranks`, at most `inflight` on each way."""

    def __init__(self, num_ranks: int, inflight: int) -> None:
        self.num_ranks, self.inflight = num_ranks, inflight
        self._under_way: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)

    def neighbours(self, rank: int) -> set[int]:
        """The ranks before and behind `rank`; one of two ranks, none of one."""
        return {(rank + step) % self.num_ranks for step in (-1, 1)} - {rank}

    def returns_send(self, src: int, dst: int) -> bool:
        """True if a send now would return before anything else is received."""
        return len(self._under_way[src, dst]) < self.inflight

    def returns_recv(self, src: int, dst: int) -> bool:
        """True if a receive now would return before anything else is sent."""
        return bool(self._under_way[src, dst])

    def send(self, src: int, dst: int, t: Tensor) -> None:
        """`src` sends a tensor."""
        require(dst in self.neighbours(src), f"dst: got {dst}; allowed: a neighbour of {src}")
        require(self.returns_send(src, dst), f"send: got {self.inflight} under way; allowed: fewer")
        self._under_way[src, dst].append(t.clone())

    def recv(self, src: int, dst: int) -> Tensor:
        """The tensor that `dst` receives: the oldest that `src` sent it and it has not received."""
        require(self.returns_recv(src, dst), "recv: got nothing under way; allowed: a tensor")
        return self._under_way[src, dst].popleft()
