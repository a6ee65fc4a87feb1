"""Hypothesis strategies for routing layouts and whole cases, for users' own property tests.

    from hypothesis import given
    from deepep.sim.cases.strategies import cases, routings

    @given(cases())
    def test_mine(case): ...

Needs hypothesis (`pip install 'deepep[sim]'`); nothing else in deepep.sim imports it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from deepep.extras import needed_for
from deepep.sim.cases.case import Case, Limits, draw_case, draw_indices, draw_options, draw_shape, split
from deepep.sim.cases.options import SPACE, Options
from deepep.sim.cases.routing import PATTERNS, Indices, RoutingShape
from deepep.sim.cases.traces import TraceSource

with needed_for("deepep.sim.cases.strategies"):
    from hypothesis import strategies as st

__all__ = ["cases", "options", "routings", "shapes", "traced_cases"]

Item = TypeVar("Item")


class _Drawn:
    """Decisions made by hypothesis, so that they are shrunk, stored and replayed by it."""

    entries_one_by_one = 48

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.integer(0, len(items) - 1)]

    def flag(self, probability: float = 0.5) -> bool:
        return bool(self._draw(st.booleans()))

    def seed(self) -> int:
        return self.integer(0, 2**32 - 1)


@st.composite
def shapes(draw: Any, limits: Limits | None = None) -> RoutingShape:
    """Numbers of ranks, experts, choices and tokens: even, uneven, zero on some ranks or on all."""
    return draw_shape(_Drawn(draw), limits or Limits())


@st.composite
def routings(
    draw: Any, shape: RoutingShape | None = None, *, patterns: Sequence[str] = tuple(PATTERNS)
) -> tuple[Indices, ...]:
    """topk_idx by rank, each [T, K] int64: an index pattern, maybe with a twist, or entries one by one."""
    choices = _Drawn(draw)
    limits = Limits(patterns=patterns)
    shape = shape or draw_shape(choices, limits)
    return split(draw_indices(choices, limits, shape)[0], shape.num_tokens)


@st.composite
def options(draw: Any, **fixed: Any) -> Options:
    """Every option of the interface (deepep.sim.cases.options.SPACE), except those given."""
    unknown = set(fixed) - set(SPACE)
    if unknown:
        raise TypeError(f"options() got unknown options: {', '.join(sorted(unknown))}")
    return draw_options(_Drawn(draw), fixed)


@st.composite
def cases(draw: Any, limits: Limits | None = None) -> Case:
    """Whole examples, within `limits`."""
    return draw_case(_Drawn(draw), limits)


@st.composite
def traced_cases(draw: Any, trace: str | os.PathLike[str], limits: Limits | None = None) -> Case:
    """Windows of a recorded routing trace (docs/trace.md), as examples with any options."""
    return _source(Path(trace)).draw(_Drawn(draw), limits or Limits())


_source = cache(TraceSource.load)
