"""Runs of `deepep.Buffer` that must give the same bits whatever changes around them: the number of SMs, which
rank is late, and how many operations went before. Every result is compared with the oracle.

What one rank does; any backend. tests/backends/cuda runs these on GPUs, tests/sim without.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from deepep.sim.cases.case import Case, Limits, draw_case
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.cases.options import Options
from deepep.sim.cases.routing import PATTERNS, RoutingShape
from deepep.sim.fuzz.buffer_runs import as_buffer_call, buffer_of, device_of, run_on_buffer
from deepep.sim.rules import oracle
from deepep.sim.rules.observed import RankView, first_difference
from deepep.sim.worlds.rank_process import RankContext

#: Seconds by which a rank is late.
LATE = 0.1
#: Clock cycles of a sleep on the device that take about that long: 1.8 GHz.
LATE_CYCLES = 180_000_000
#: Every option of the high-throughput interface, each at least once; what is not named is plain.
OPTION_SETS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, random values, cached": {"values": "normal", "cached": True},
    "NaN and infinity": {"values": "nonfinite", "combine_weights": True},
    "other rows, weights, a bias": {
        "values": "normal",
        "combine_rows": "other",
        "combine_weights": True,
        "biases": 1,
    },
    "signed zeros": {"values": "zeros"},
    "two biases, cached, asynchronous": {
        "values": "normal",
        "biases": 2,
        "cached": True,
        "schedule": "async",
    },
    "int32 indices, aligned counts": {"idx_dtype": "int32", "expert_alignment": 128},
    "no indices": {"topk": False, "cached": True, "biases": 1},
    "worst case exact": {"worst": "exact", "combine_weights": True, "values": "normal"},
    "worst case with room": {"worst": "more", "schedule": "async"},
    "fp8, row-major scales": {"payload": "e4m3+float32", "scale_columns": 7, "cached": True},
    "fp8, column-major scales": {
        "payload": "e4m3+float32",
        "scale_columns": 7,
        "scale_layout": "column",
        "cached": True,
    },
    "fp8, padded int32 scales": {
        "payload": "e4m3+int32",
        "scale_columns": 3,
        "scale_layout": "padded",
        "cached": True,
        "worst": "more",
    },
    "bytes, every other scale": {
        "payload": "uint8+float32",
        "scale_columns": 2,
        "scale_layout": "every_other",
        "expert_alignment": 8,
        "schedule": "async",
    },
}


def option_case(name: str, num_tokens: Sequence[int], **shape: int) -> Case:
    """A case with the options of OPTION_SETS[name].

    num_tokens: T by rank. shape: hidden, topk and local_experts.
    """
    ranks, local = len(num_tokens), shape["local_experts"]
    routing = RoutingShape(ranks, local * ranks, shape["topk"], tuple(num_tokens))
    seed = list(OPTION_SETS).index(name)
    indices = PATTERNS["uniform"](routing, np.random.default_rng(seed))
    indices[np.random.default_rng(seed + 1).random(indices.shape) < 0.1] = -1
    case = Case(
        num_experts=local * ranks,
        topk_idx=tuple(np.split(indices, np.cumsum(num_tokens)[:-1])),
        hidden=shape["hidden"],
        seed=seed,
        options=Options(**OPTION_SETS[name]),
    )
    return as_buffer_call(case.legal())


@dataclass(frozen=True)
class Late:
    """One rank is late for each of its calls by LATE seconds: its host, or its device's stream."""

    rank: int
    host: bool

    def hold_back(self, device: torch.device) -> None:
        """Delays what this rank does next."""
        if self.host or device.type != "cuda":
            time.sleep(LATE)
        else:
            torch.cuda._sleep(LATE_CYCLES)


class LateBuffer:
    """A buffer whose rank comes late to every collective call. Everything else passes through."""

    def __init__(self, buffer: Any, late: Late) -> None:
        self._buffer = buffer
        self._late = late
        self._device = device_of(buffer)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._buffer, name)
        if name not in ("dispatch", "combine"):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            self._late.hold_back(self._device)
            return attribute(*args, **kwargs)

        return call


def run_steadily(
    ctx: RankContext,
    cases: Sequence[Case],
    *,
    num_sms: Sequence[int] = (20,),
    late: Sequence[Late | None] = (None,),
    backend: str | None = None,
) -> str:
    """One rank's part: all cases, under each number of SMs and each lateness.

    Returns the digest of this rank's results, which all rounds shared. Raises AssertionError with the first
    difference, from the oracle or between rounds.
    """
    from deepep import Buffer

    buffer = buffer_of(ctx, backend)
    before = Buffer.num_sms
    digests = set()
    try:
        for sms in num_sms:
            Buffer.set_num_sms(sms)
            for one in late:
                mine = one is not None and one.rank == ctx.rank
                subject = LateBuffer(buffer, one) if mine and one is not None else buffer
                digest = hashlib.sha256()
                for case in cases:
                    view = run_on_buffer(case, subject)
                    check_own(case, ctx.rank, view, f"{sms} SMs, {one}")
                    add_to(digest, view)
                digests.add(digest.hexdigest())
    finally:
        Buffer.set_num_sms(before)
    assert len(digests) == 1, "equal to the oracle, but not to each other: a field the oracle does not have"
    return digests.pop()


@dataclass(frozen=True)
class Marathon:
    """A long run: operations made, and the digest of every rank's results."""

    operations: int
    digest: str


def long_run(
    ctx: RankContext,
    seed: int,
    operations: int,
    *,
    backend: str | None = None,
    limits: Limits | None = None,
) -> Marathon:
    """One rank's part of drawn cases, one after the other on the same buffer, at least `operations` calls."""
    from deepep import Buffer

    buffer = buffer_of(ctx, backend)
    made, digest = 0, hashlib.sha256()
    before = Buffer.num_sms
    try:
        for number, case in enumerate(drawn_cases(seed, ctx.num_ranks, limits)):
            if made >= operations:
                break
            Buffer.set_num_sms((1, 2, 3, 8, 20, 24, 132)[number % 7])
            view = run_on_buffer(case, buffer)
            made += 3 + case.options.cached  # layout, dispatch, combine
            check_own(case, ctx.rank, view, f"seed {seed}, case {number} after {made} operations")
            add_to(digest, view)
    finally:
        Buffer.set_num_sms(before)
    return Marathon(made, digest.hexdigest())


def drawn_cases(seed: int, num_ranks: int, limits: Limits | None = None) -> Iterator[Case]:
    """High-throughput cases without end: most of them small, every tenth with hundreds of tokens."""
    choices = RandomChoices(seed)
    fixed: dict[str, Any] = {"mode": "ht", "skew": "none"}
    small = limits or Limits(ranks=(num_ranks,), max_tokens=48, masks=0.0, fixed=fixed)
    large = Limits(
        ranks=(num_ranks,),
        max_tokens=700,
        max_local_experts=32,
        hidden=(512, 1024, 2048),
        masks=0.0,
        fixed=fixed,
    )
    number = 0
    while True:
        number += 1
        yield as_buffer_call(draw_case(choices, large if limits is None and number % 10 == 0 else small))


def check_own(case: Case, rank: int, view: RankView, when: str) -> None:
    """Raises AssertionError where this rank's results differ from the oracle's."""
    expected = expected_views(case)[rank]
    # What the oracle has and Buffer does not say (where a row is from) is left out.
    difference = first_difference([expected], [view])
    assert difference is None, f"{when}: {case}: {str(difference).replace('rank 0', f'rank {rank}', 1)}"


def expected_views(case: Case) -> list[RankView]:
    """The oracle's results for each rank; kept for the cases of late, which runs repeat."""
    key = f"{case!r} {case.seed}"
    if key not in _expected:
        _expected[key] = oracle.observe(case)
        while len(_expected) > 32:
            _expected.popitem(last=False)
    return _expected[key]


#: In the process of a rank: what `expected_views` has computed.
_expected: OrderedDict[str, list[RankView]] = OrderedDict()


def add_to(digest: Any, view: RankView) -> None:
    """Feeds all that a rank got into a hash."""
    for field in fields(RankView):
        value = getattr(view, field.name)
        if value is not None:
            digest.update(f"{field.name} {getattr(value, 'shape', value)}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
