"""The walks of docs/architecture.md are taken: each function named is there, and is entered in that order."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.sources import ROOT
from harness.traced_calls import CallLog, definitions

PAGE = ROOT / "docs" / "architecture.md"
STEP = re.compile(r"^\d+\. (?P<where>(?:\(rank\) )?)`(?P<file>[\w/.]+): (?P<name>[\w.]+)`", re.MULTILINE)
WALKS = ("A dispatch on CUDA", "A low-latency call with a hook", "One fuzz example")

MANY_LINES = 80


@dataclass(frozen=True)
class Step:
    """A function that a walk passes. on_rank: in a rank's process, where the walk begins in another."""

    file: str
    name: str
    on_rank: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def is_python(self) -> bool:
        return self.file.endswith(".py")


def walk(page: str, title: str) -> list[Step]:
    """The steps of a walk of the page."""
    section = page.partition(f"## Walk: {title}\n")[2].partition("\n## ")[0]
    return [Step(found["file"], found["name"], bool(found["where"])) for found in STEP.finditer(section)]


def missing(steps: Sequence[Step], root: Path = ROOT) -> list[str]:
    """Steps whose file is not there, or does not define the function, or takes too many lines for it."""
    problems = []
    for step in steps:
        path = root / step.file
        if not path.exists():
            problems.append(f"{step}: no such file")
        elif step.is_python:
            lengths = {made.name: made.lines for made in definitions(str(path)).values()}
            if step.name not in lengths:
                problems.append(f"{step}: no such function")
            elif lengths[step.name] > MANY_LINES:
                problems.append(f"{step}: {lengths[step.name]} lines")
        elif not re.search(rf"\b{re.escape(step.name)}\b\s*[(<{{,]", path.read_text()):
            problems.append(f"{step}: no such function")
    return problems


def not_passed(steps: Sequence[Step], calls: Sequence[str]) -> str:
    """The first step that is not entered after the one before it; empty if all are."""
    ahead = iter(calls)
    return next((str(step) for step in steps if str(step) not in ahead), "")


@pytest.mark.parametrize("title", WALKS)
def test_every_step_is_there(title: str) -> None:
    steps = walk(PAGE.read_text(), title)
    assert len(steps) >= 8
    assert not (problems := missing(steps)), "\n".join(problems)


DISPATCH_ON_STUBS = """
import json
from harness import stub_cuda
from harness.traced_calls import CallLog
stub_cuda.install(16)
import torch
with stub_cuda.stub_buffer() as buffer:
    x, topk_idx = torch.zeros((16, 256), dtype=torch.bfloat16), torch.zeros((16, 2), dtype=torch.int64)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    def dispatch():
        return buffer.dispatch(
            x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
            topk_idx=topk_idx, topk_weights=torch.ones((16, 2)),
        )
    kept = dispatch()
    with CallLog() as log:
        dispatch()
print(json.dumps(log.calls))
"""
"""A dispatch of the CUDA backend without CUDA: for a process of its own, since it replaces parts of torch."""


def test_a_dispatch_on_cuda_goes_this_way() -> None:
    steps = walk(PAGE.read_text(), "A dispatch on CUDA")
    assert any(step.file.startswith("csrc/kernels/") for step in steps)
    command = [sys.executable, "-c", DISPATCH_ON_STUBS]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout.splitlines()[-1])
    assert not (lost := not_passed([step for step in steps if step.is_python], calls)), lost


def decode_once(ctx: Any) -> list[str]:
    """A low-latency dispatch and combine with hooks, as a rank makes them; what was entered."""
    import deepep

    ranks, most, hidden, experts = ctx.num_ranks, 8, 128, 4 * ctx.num_ranks
    with CallLog() as log:  # before the buffer, whose thread communicates
        size = deepep.Buffer.get_low_latency_rdma_size_hint(most, hidden, ranks, experts)
        buffer = deepep.Buffer(ctx.group, num_rdma_bytes=size, low_latency_mode=True, backend="reference")
        x = torch.ones(most, hidden, dtype=torch.bfloat16)
        topk_idx = torch.arange(most * 2).view(most, 2) % experts
        rows, _, handle, _, receive = buffer.low_latency_dispatch(
            x, topk_idx, most, experts, use_fp8=False, return_recv_hook=True
        )
        receive()
        weights = torch.full((most, 2), 0.5)
        out, _, receive = buffer.low_latency_combine(rows, topk_idx, weights, handle, return_recv_hook=True)
        receive()
    assert torch.equal(out, x)
    buffer.destroy()
    return log.calls


def test_a_low_latency_call_goes_this_way(world_of: Callable[[int], Any]) -> None:
    steps = walk(PAGE.read_text(), "A low-latency call with a hook")
    for calls in world_of(2).run(decode_once):
        assert not (lost := not_passed(steps, calls)), lost


def test_a_fuzz_example_goes_this_way(world_of: Callable[[int], Any], tmp_path: Path) -> None:
    from deepep.sim.cases.case import Limits
    from deepep.sim.fuzz.buffer_runs import run_buffer
    from deepep.sim.fuzz.fuzzer import Fuzzer
    from deepep.sim.fuzz.subjects import InWorld

    steps = walk(PAGE.read_text(), "One fuzz example")

    def run_rank(ctx: Any, case: Any) -> Any:
        with CallLog() as log:
            view = run_buffer(ctx, case, "reference")
        (tmp_path / f"{ctx.rank}.json").write_text(json.dumps(log.calls))
        return view

    subject = InWorld("buffer", run_rank, world_of, may_lack=("src_rank", "src_token"))
    fuzzer = Fuzzer([subject], seed=2, limits=Limits(ranks=(2,), masks=0))
    with CallLog() as log:
        report = fuzzer.run(examples=1)
    assert report.examples == 1
    assert report.finding is None
    for on_rank, calls in (
        (False, log.calls),
        (True, json.loads((tmp_path / "0.json").read_text())),
        (True, json.loads((tmp_path / "1.json").read_text())),
    ):
        part = [step for step in steps if step.on_rank == on_rank]
        assert len(part) >= 3
        assert not (lost := not_passed(part, calls)), lost


def test_a_lost_step_is_seen(tmp_path: Path) -> None:
    page = "## Walk: A\n1. `a.py: f`: begins.\n2. (rank) `a.py: K.g`: ends.\n\n## Walk: B\n1. `a.py: h`\n"
    steps = walk(page, "A")
    assert steps == [Step("a.py", "f"), Step("a.py", "K.g", on_rank=True)]
    assert walk(page, "B") == [Step("a.py", "h")]
    (tmp_path / "a.py").write_text("def f(): ...\nclass K:\n    @x\n    def h(self): ...\n")
    (tmp_path / "d.py").write_text("def f():\n" + "    ...\n" * 80)
    assert missing([Step("d.py", "f")], tmp_path) == ["d.py: f: 81 lines"]
    (tmp_path / "b.hpp").write_text("void load(int);\n")
    assert missing([*steps, Step("b.hpp", "load"), Step("b.hpp", "store"), Step("c.py", "f")], tmp_path) == [
        "a.py: K.g: no such function",
        "b.hpp: store: no such function",
        "c.py: f: no such file",
    ]
    assert not_passed(steps, ["a.py: f", "a.py: K.g"]) == ""
    assert not_passed(steps, ["a.py: K.g", "a.py: f"]) == "a.py: K.g"
    assert not_passed(steps, []) == "a.py: f"
