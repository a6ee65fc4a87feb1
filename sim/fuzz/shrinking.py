"""Making a failing case small: fewer ranks, tokens, choices and options, as long as it still fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from deepep.sim.cases.case import Case
from deepep.sim.cases.options import SPACE
from deepep.sim.cases.routing import Indices


def shrink(case: Case, fails: Callable[[Case], bool], *, seconds: float = 20.0) -> Case:
    """The smallest case found that still fails, in at most about `seconds`.

    `fails(candidate)` runs a candidate: whether it fails in the way that matters. Greedy: the first simpler
    candidate that fails is taken, and the search starts again from there.
    """
    deadline = time.monotonic() + seconds
    improved = True
    while improved:
        improved = False
        for candidate in simpler(case):
            if time.monotonic() >= deadline:
                return case
            if fails(candidate):
                case, improved = candidate, True
                break
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Legal cases that are simpler than this one, the boldest first."""
    for candidate in _candidates(case):
        candidate = replace(candidate.legal(), origin=case.origin)
        # legal() may have undone the only change: offering the same case again would loop indefinitely.
        if weight(candidate) < weight(case):
            yield candidate


def weight(case: Case) -> tuple[int, ...]:
    """The quantities that shrinking makes smaller, the most important first."""
    used = sum(int((indices >= 0).sum()) for indices in case.topk_idx)
    plain = case.options.to_json()
    return (
        case.parent is not None,
        case.num_ranks,
        sum(case.num_tokens),
        case.num_topk,
        used,
        case.num_experts,
        len(case.masked),
        sum(SPACE[name].index(value) for name, value in plain.items() if value in SPACE[name]),
        case.hidden,
        sum(int(indices.sum()) for indices in case.topk_idx),
        case.seed,
    )


def _candidates(case: Case) -> Iterator[Case]:
    if case.parent is not None:
        yield replace(case, parent=None)
        # Its tensors are cut from the other case's, so it keeps their shapes and dtypes.
        yield from _fewer_entries(case)
        yield from _lower_entries(case)
        return
    yield from _fewer_ranks(case)
    yield from _fewer_tokens(case)
    yield from _fewer_choices(case)
    yield from _fewer_experts(case)
    yield from _plainer(case)
    yield from _lower_entries(case)


def _fewer_ranks(case: Case) -> Iterator[Case]:
    """Without one rank: its tokens are gone, choices of its experts become -1, later experts move up."""
    if case.num_ranks == 1:
        return
    local = case.num_local_experts
    for gone in reversed(range(case.num_ranks)):
        matrices = []
        for rank, indices in enumerate(case.topk_idx):
            if rank != gone:
                owner = indices // local
                moved = np.where(owner > gone, indices - local, indices)
                matrices.append(np.where(owner == gone, -1, moved))
        masked = tuple(r - (r > gone) for r in case.masked if r != gone)
        if len(masked) < case.num_ranks - 1:
            yield replace(case, num_experts=case.num_experts - local, topk_idx=tuple(matrices), masked=masked)


def _fewer_tokens(case: Case) -> Iterator[Case]:
    """Without the tokens of a rank, half of them, or one."""
    for pieces in (1, 2):
        for rank, count in enumerate(case.num_tokens):
            size = -(-count // pieces)
            for start in range(0, count, size) if size else ():
                yield _without_tokens(case, rank, start, start + size)
    for rank, count in enumerate(case.num_tokens):
        for token in reversed(range(count)):
            yield _without_tokens(case, rank, token, token + 1)


def _without_tokens(case: Case, rank: int, start: int, stop: int) -> Case:
    matrices = list(case.topk_idx)
    matrices[rank] = np.delete(matrices[rank], slice(start, stop), axis=0)
    return replace(case, topk_idx=tuple(matrices))


def _fewer_choices(case: Case) -> Iterator[Case]:
    """Without gaps; without one of the K columns; without choices."""
    widest = max((int((row >= 0).sum()) for indices in case.topk_idx for row in indices), default=0)
    if max(widest, 1) < case.num_topk:
        yield replace(case, topk_idx=tuple(_packed(i, max(widest, 1)) for i in case.topk_idx))
    if case.num_topk > 1:
        for column in reversed(range(case.num_topk)):
            yield replace(case, topk_idx=tuple(np.delete(i, column, axis=1) for i in case.topk_idx))
    yield from _fewer_entries(case)


def _fewer_entries(case: Case) -> Iterator[Case]:
    """Without the choices of one token, or one choice."""
    for rank, indices in enumerate(case.topk_idx):
        for token in range(len(indices)):
            if (indices[token] >= 0).sum() > 1:
                yield _with_entries(case, rank, token, slice(None), -1)
    for rank, indices in enumerate(case.topk_idx):
        for token, k in np.argwhere(indices >= 0).tolist():
            yield _with_entries(case, rank, token, k, -1)


def _packed(indices: Indices, num_topk: int) -> Indices:
    """[T, num_topk]: each token's choices, in their order, in front of its -1."""
    order = np.argsort(indices < 0, axis=1, kind="stable")
    return np.take_along_axis(indices, order, axis=1)[:, :num_topk]


def _with_entries(case: Case, rank: int, token: int, k: int | slice, expert: int) -> Case:
    matrices = list(case.topk_idx)
    matrices[rank] = matrices[rank].copy()
    matrices[rank][token, k] = expert
    return replace(case, topk_idx=tuple(matrices))


def _fewer_experts(case: Case) -> Iterator[Case]:
    """One local expert per rank, or one less; choices of the experts that go move to others of their rank."""
    for left in sorted({1, case.num_local_experts - 1}):
        if 0 < left < case.num_local_experts:
            matrices = []
            for indices in case.topk_idx:
                owner, local = indices // case.num_local_experts, indices % case.num_local_experts
                matrices.append(np.where(indices < 0, -1, owner * left + local % left))
            yield replace(case, num_experts=left * case.num_ranks, topk_idx=tuple(matrices))


def _plainer(case: Case) -> Iterator[Case]:
    """With plainer options, narrower rows, no masks, another seed."""
    if case.masked:
        yield replace(case, masked=())
    for name, value in case.options.to_json().items():
        if value in SPACE[name]:
            for alternative in SPACE[name][: SPACE[name].index(value)]:
                yield case.with_options(**{name: alternative})
        else:
            yield case.with_options(**{name: SPACE[name][0]})
    for hidden in (16, 128, 512):
        if hidden < case.hidden:
            yield replace(case, hidden=hidden)
    if case.seed:
        yield replace(case, seed=0)


def _lower_entries(case: Case) -> Iterator[Case]:
    """With an entry naming the first expert of its rank, or of the world."""
    for rank, indices in enumerate(case.topk_idx):
        for token, k in np.argwhere(indices > 0).tolist():
            expert = int(indices[token, k])
            for lower in sorted({0, expert - expert % case.num_local_experts}):
                if lower < expert:
                    yield _with_entries(case, rank, token, k, lower)
