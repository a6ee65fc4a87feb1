"""The kernels around the local experts on the emulated machine: drawn rows, each under one schedule.

Shapes: N received rows, K top-k entries, P pairs, L local experts, H channels of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep import _emulator
from deepep.sim.cases.choices import RandomChoices
from deepep.sim.explore.case_runs import CaseTally, explore_cases
from deepep.sim.explore.scenarios import RunReport, ThreadSchedule
from deepep.sim.rules.local_experts import gate_gradients, gated, reduced, sorted_pairs

KERNELS = (
    *("sort_pairs", "count_entries", "spread_rows", "reduce_rows", "weigh_rows"),
    *("swiglu", "swiglu_backward", "select_topk"),
)
#: shared memory of every launch: more than any of the kernels needs
SHARED_BYTES = 8192
#: scores, many of them equal
VALUES = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, 2.5, float("inf"), float("-inf"), float("nan")])
#: load of each expert before a launch that adds to it
LOAD = 1 << 40


@dataclass(frozen=True)
class RowCase:
    """One launch. hidden: H, a multiple of 8. weighted: of a reduction. seed: of the values. miscounted: so
    many pairs more, or fewer, than there are, a sort was given to expect.
    """

    kernel: str
    num_rows: int
    num_topk: int = 2
    num_local_experts: int = 2
    hidden: int = 8
    index_bytes: int = 8
    weighted: bool = True
    num_blocks: int = 1
    num_warps: int = 1
    seed: int = 0
    miscounted: int = 0

    def num_pairs(self, given: RowInputs) -> int:
        """P that a sort was given."""
        return max(0, len(given.pairs) + self.miscounted)


def draw_rows(seed: int) -> RowCase:
    """Fewer blocks than rows, and more. A function of its argument."""
    choices = RandomChoices(seed)
    return RowCase(
        kernel=KERNELS[seed % len(KERNELS)],
        num_rows=choices.pick((1, 2, 3, 5, 9)) if seed % len(KERNELS) > 1 else choices.integer(0, 90),
        num_topk=choices.pick((1, 2, 3, 8, 32)),
        num_local_experts=choices.integer(1, 4),
        hidden=8 * choices.pick((1, 2, 5, 33)),
        index_bytes=choices.pick((4, 8)),
        weighted=choices.pick((True, False)),
        num_blocks=choices.pick((1, 2)),
        num_warps=choices.pick((1, 2, 3)),
        seed=seed,
        miscounted=choices.pick((0, 0, 0, -3, 5)),
    )


@dataclass(frozen=True)
class RowInputs:
    """Values of a case. topk_idx [N, K]; pairs [P], slots [N, K], ends [L] as sorted; the others bfloat16 but
    for weights [N, K] and scores [N, H] float32: rows [N, H], y [P, H], h [N, 2H].
    """

    topk_idx: Tensor
    pairs: Tensor
    slots: Tensor
    ends: Tensor
    weights: Tensor
    rows: Tensor
    y: Tensor
    h: Tensor
    scores: Tensor


def inputs_of(case: RowCase) -> RowInputs:
    """Drawn. Rows are small whole numbers, so that their products add up to the same in any order."""
    generator = torch.Generator().manual_seed(case.seed)
    shape, local = (case.num_rows, case.num_topk), case.num_local_experts
    topk_idx = torch.randint(-1, local, shape, generator=generator)
    pairs, slots, ends = sorted_pairs(topk_idx, local)

    def whole(count: int) -> Tensor:
        return torch.randint(-8, 9, (count, case.hidden), generator=generator).bfloat16()

    return RowInputs(
        topk_idx.to(torch.int32 if case.index_bytes == 4 else torch.int64),
        pairs,
        slots,
        ends,
        torch.randn(shape, generator=generator),
        whole(case.num_rows),
        whole(len(pairs)),
        (4 * torch.randn(case.num_rows, 2 * case.hidden, generator=generator)).bfloat16(),
        VALUES[torch.randint(len(VALUES), (case.num_rows, case.hidden), generator=generator)],
    )


def expected(case: RowCase, given: RowInputs) -> list[Tensor]:
    """The outputs that the launch has to write, in the order of `run_rows`."""
    present = given.slots >= 0
    source = given.pairs // case.num_topk
    if case.kernel == "sort_pairs":
        room = case.num_pairs(given)
        pairs = torch.zeros(room, dtype=torch.int64, device="cpu")
        pairs[: len(given.pairs)] = given.pairs[:room]
        return [pairs, given.slots.where(given.slots < room, -1), given.ends.clamp(max=room)]
    if case.kernel == "count_entries":
        return [torch.bincount(given.topk_idx[given.topk_idx >= 0], minlength=case.num_local_experts) + LOAD]
    if case.kernel == "spread_rows":
        return [given.rows[source]]
    if case.kernel == "reduce_rows":
        return [reduced(given.y, given.weights if case.weighted else None, given.slots)]
    if case.kernel == "weigh_rows":
        rows = given.rows[source]
        dots = torch.zeros(given.slots.shape)
        dots[present] = (rows.float() * given.y.float()).sum(1)[given.slots[present]]
        return [rows * given.weights.flatten()[given.pairs].bfloat16().unsqueeze(1), dots]
    if case.kernel == "select_topk":
        order = torch.sort(given.scores, dim=1, descending=True, stable=True).indices
        return [order[:, : min(case.num_topk, case.hidden)]]
    if case.kernel == "swiglu":
        return [gated(given.h)]
    return [gate_gradients(given.h, given.rows)]


def run_rows(case: RowCase, schedule: ThreadSchedule, kernels: Any = None) -> RunReport:
    """Launches once, and compares what was written to the bit."""
    machine = _emulator.Machine(
        num_ranks=1,
        max_blocks=max(case.num_blocks, case.num_local_experts),
        max_threads=32 * case.num_warps,
        strategy=schedule.strategy,
        seed=schedule.seed,
        expected_steps=schedule.expected_steps,
        max_steps=5_000_000,
    )
    given, report = inputs_of(case), RunReport()
    wanted = expected(case, given)

    def put(name: str, values: Tensor) -> int:
        raw = _raw(values)
        address: int = machine.allocate(name, "device", 0, max(16, len(raw)))
        if raw:
            machine.write(0, address, raw)
        return address

    outputs = [
        machine.allocate(f"out{i}", "device", 0, max(16, len(_raw(values))))
        for i, values in enumerate(wanted)
    ]
    if case.kernel == "count_entries":
        machine.write(0, outputs[0], _raw(torch.full((case.num_local_experts,), LOAD)))
    args = _arguments(case, given, put, outputs)
    blocks = case.num_local_experts if case.kernel == "sort_pairs" else case.num_blocks
    try:
        machine.launch(
            0,
            f"{case.kernel}_kernel",
            args,
            blocks,
            32 * case.num_warps,
            SHARED_BYTES,
            kernels or _emulator.own_kernels(),
        )
        outcome = machine.run()
        report.steps, report.switches = outcome.steps, outcome.switches
        if outcome.status == "failed":
            report.kind, report.text = outcome.kind, outcome.text
            return report
        machine.meet()
        for i, (address, values) in enumerate(zip(outputs, wanted, strict=True)):
            raw = _raw(values)
            if raw and machine.read(0, address, len(raw)) != raw:
                report.kind, report.text = "wrong result", f"{case}: output {i}"
                return report
    except _emulator.HostFailure as error:
        report.kind, _, report.text = str(error).partition("\n")
    return report


def _arguments(case: RowCase, given: RowInputs, put: Callable[[str, Tensor], int], out: list[int]) -> bytes:
    if case.kernel == "sort_pairs":
        return _emulator.sort_pairs_args(
            topk_idx=put("topk_idx", given.topk_idx),
            index_bytes=case.index_bytes,
            num_local_experts=case.num_local_experts,
            num_entries=given.topk_idx.numel(),
            num_pairs=case.num_pairs(given),
            pairs=out[0],
            slots=out[1],
            ends=out[2],
        )
    if case.kernel == "count_entries":
        return _emulator.count_entries_args(
            topk_idx=put("topk_idx", given.topk_idx),
            index_bytes=case.index_bytes,
            num_experts=case.num_local_experts,
            num_entries=given.topk_idx.numel(),
            load=out[0],
        )
    if case.kernel == "select_topk":
        return _emulator.select_topk_args(
            num_tokens=case.num_rows,
            num_experts=case.hidden,
            num_topk=min(case.num_topk, case.hidden),
            scores=put("scores", given.scores),
            topk_idx=out[0],
        )
    if case.kernel == "swiglu":
        return _emulator.swiglu_args(
            num_rows=case.num_rows, width=case.hidden, h=put("h", given.h), out=out[0]
        )
    if case.kernel == "swiglu_backward":
        return _emulator.swiglu_backward_args(
            num_rows=case.num_rows,
            width=case.hidden,
            h=put("h", given.h),
            grad=put("grad", given.rows),
            out=out[0],
        )
    slots = put("slots", given.slots)
    span = {
        "num_rows": case.num_rows,
        "row_bytes": 2 * case.hidden,
        "num_topk": case.num_topk,
        "slots": slots,
    }
    if case.kernel == "spread_rows":
        return _emulator.spread_rows_args(**span, x=put("x", given.rows), out=out[0])
    weights = put("weights", given.weights) if case.weighted or case.kernel == "weigh_rows" else 0
    if case.kernel == "reduce_rows":
        return _emulator.reduce_rows_args(**span, y=put("y", given.y), weights=weights, out=out[0])
    return _emulator.weigh_rows_args(
        **span,
        grad=put("grad", given.rows),
        y=put("y", given.y),
        weights=weights,
        out=out[0],
        out_weights=out[1],
    )


def _raw(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""


def explore_rows(
    *,
    runs: int | None = None,
    seconds: float | None = None,
    kernels: Any = None,
    only: str | None = None,
    progress: Callable[[int], None] = lambda run: None,
) -> CaseTally[RowCase]:
    """Drawn launches; `explore_cases`. only: of this kernel."""
    offset, step = (0, 1) if only is None else (KERNELS.index(only), len(KERNELS))

    def run(case: RowCase, schedule: ThreadSchedule) -> RunReport:
        return run_rows(case, schedule, kernels)

    return explore_cases(
        lambda number: draw_rows(offset + step * number), run, runs=runs, seconds=seconds, progress=progress
    )
