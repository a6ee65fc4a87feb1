"""Fields of rows: shapes in which a warp writes it for many tokens, for few, for one, or for none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from deepep.sim.cases.case import Case
from deepep.sim.cases.options import Options
from deepep.sim.emulator.calls import Gpu
from deepep.sim.emulator.shapes import GPUS
from deepep.sim.explore.emulated import run
from deepep.sim.explore.explorer import draw_schedule
from deepep.sim.explore.scenarios import RunReport, Scenario

#: Two warps for all tokens, roles apart, and so many warps that several share a token.
FEW_WARPS, APART = GPUS[1], GPUS[3]
MANY_WARPS = Gpu(num_blocks=2, num_threads=256, push_blocks=1, local_blocks=1)


@dataclass(frozen=True)
class Shape:
    """tokens by rank; starved: the last rank is sent nothing. scales: P of FP8 rows, 0: BF16."""

    tokens: tuple[int, ...]
    topk: int
    local_experts: int = 3
    scales: int = 0
    layout: str = "row"
    index: str = "int64"
    masked: tuple[int, ...] = ()
    starved: bool = False
    with_topk: bool = True

    def case(self) -> Case:
        rng = np.random.default_rng(len(self.tokens) + self.topk)
        experts = self.local_experts * len(self.tokens)
        end = experts - self.local_experts if self.starved else experts
        indices = [rng.integers(-1, end, (count, self.topk)) for count in self.tokens]
        for matrix in indices:
            matrix[rng.random(len(matrix)) < 0.2] = -1  # tokens that go nowhere
        options = Options(
            payload="e4m3+float32" if self.scales else "bf16",
            scale_columns=max(1, self.scales),
            scale_layout=self.layout,
            idx_dtype=self.index,
            topk=self.with_topk,
            cached=True,
        )
        return Case(experts, tuple(indices), 16, options=options, masked=self.masked).legal()


SHAPES = [
    Shape((130, 65), topk=8),
    Shape((33, 97, 0), topk=1, index="int32"),
    Shape((70, 64), topk=32, scales=1),
    Shape((64, 35, 1), topk=6, scales=7, layout="padded", starved=True),
    Shape((40, 66), topk=3, index="int32", scales=33, layout="every_other"),
    Shape((34, 66, 5), topk=8, local_experts=1, scales=56, layout="column", masked=(1,)),
    Shape((45, 20), topk=5, scales=70, layout="column", with_topk=False),
    Shape((68, 3), topk=7, scales=65),
    Shape((1, 2, 1, 0), topk=32, scales=2, index="int32"),
    Shape((2, 1), topk=1, scales=64),
]


@pytest.mark.parametrize("gpu", [FEW_WARPS, APART, MANY_WARPS], ids=["few warps", "apart", "many warps"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_fields_agree_with_the_oracle(shape: Shape, gpu: Gpu) -> None:
    scenario = Scenario((shape.case(),), gpu)
    for seed in range(2):
        report = run(scenario, draw_schedule(seed))
        assert report.kind == "ok", report.text


def run_lying(scenario: Scenario, source: int, destination: int, missing: int, seed: int) -> RunReport:
    """`source` posts to `destination` `missing` rows fewer than its tokens make."""
    views = scenario.expected[0]
    counts = np.array(views[source].num_tokens_per_rank)
    counts[destination] -= missing
    changed = [*views]
    changed[source] = replace(views[source], num_tokens_per_rank=counts)
    lying = Scenario(scenario.cases, scenario.gpu, num_combines=0)
    lying.__dict__["expected"] = [changed]
    return run(lying, draw_schedule(seed))


@pytest.mark.parametrize("missing", [1, 20, 50])
@pytest.mark.parametrize("gpu", [FEW_WARPS, APART], ids=["few warps", "apart"])
def test_no_more_rows_are_written_than_were_posted(gpu: Gpu, missing: int) -> None:
    """Neither they nor what travels with them: the next source's lie there, and it would be a race."""
    case = Shape((90, 80, 5), topk=4).case()
    assert case.is_token_in_rank(0)[:, 1].sum() > 50
    for seed in range(3):
        report = run_lying(Scenario((case,), gpu), 0, 1, missing, seed)
        # The lines that were posted and left out: rank 1's host is first to find that they did not come.
        assert report.kind == "read of memory never written", f"{report.kind}: {report.text}"
        assert report.text.startswith("rank 1's host")
