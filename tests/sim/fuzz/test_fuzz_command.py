"""`python -m deepep fuzz`: exit statuses, files, traces, replay."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from deepep.cli import fuzz
from deepep.sim.cases.case import Case
from deepep.sim.fuzz.subjects import InProcess
from deepep.trace import TraceWriter


@pytest.fixture
def run(tmp_path, monkeypatch):
    import typer

    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(fuzz.command)

    def call(*args):
        return CliRunner().invoke(app, [str(a) for a in args])

    return call


def test_a_clean_run_says_how_much_was_tried(run):
    result = run("--backend", "oracle", "--examples", 40, "--ranks", 4)
    assert result.exit_code == 0, result.output
    assert re.search(r"examples\s+40\b", result.output)
    assert re.search(r"examples a second\s+[\d.]+", result.output)
    assert re.search(r"\d+ of \d+ alternatives, \d+ of \d+ pairs", result.output)


def test_time_ends_a_run(run):
    result = run("--backend", "core", "--minutes", "0.01")
    assert result.exit_code == 0, result.output


def test_processes_can_be_fuzzed(run):
    result = run("--backend", "all_to_all", "--examples", 16, "--ranks", 2)
    assert result.exit_code == 0, result.output
    result = run("--backend", "reference", "--examples", 16, "--ranks", 2)
    assert result.exit_code == 0, result.output
    assert "fuzzing buffer:reference" in result.output


@pytest.fixture
def trace(tmp_path):
    writer = TraceWriter(num_layers=1, num_ranks=2, num_experts=6, num_topk=2)
    rng = np.random.default_rng(0)
    for step in range(4):
        chosen = [torch.from_numpy(rng.integers(-1, 6, (20, 2))) for _ in range(2)]
        writer.add(step, 0, chosen, [torch.ones(20, 2)] * 2)
    path = tmp_path / "routing.safetensors"
    writer.finish().save(path)
    return path


def test_ones_own_trace_can_be_fuzzed(run, trace):
    result = run("--backend", "oracle", "--examples", 48, "--ranks", 4, "--trace", trace)
    assert result.exit_code == 0, result.output


def test_misuse_has_a_status_of_its_own(run, trace, tmp_path):
    result = run("--trace", tmp_path / "missing.safetensors", "--backend", "oracle")
    assert result.exit_code == 2
    assert "--trace" in result.output
    other = tmp_path / "other.json"
    other.write_text("{}")
    result = run("--replay", other, "--backend", "oracle")
    assert result.exit_code == 2
    assert "--replay" in result.output
    assert run("--backend", "abacus").exit_code == 2


def loses_the_last_row(case: Case):
    from deepep.sim.rules.oracle import observe

    views = observe(case)
    for view in views:
        if view.recv_x is not None and len(view.recv_x) > 1:
            view.recv_x = view.recv_x[:-1]
    return views


def test_a_failure_is_saved_drawn_and_replayed(run, monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "subjects_of", lambda backend: [InProcess("lossy", loses_the_last_row)])
    result = run("--examples", 200, "--ranks", 2, "--out", "found")
    assert result.exit_code == 1, result.output
    assert "tokens arrive exactly once" in result.output
    assert "which token goes where" in result.output
    file = tmp_path / "found" / "lossy-tokens-arrive-exactly-once.json"
    assert f"--replay found/{file.name}" in result.output.replace("\n", "")
    assert file.stat().st_size < 3000
    assert file.with_suffix(".png").exists()
    again = run("--replay", file)
    assert again.exit_code == 1, again.output
    assert "tokens arrive exactly once" in again.output
    monkeypatch.undo()
    fixed = run("--replay", file, "--backend", "oracle")
    assert fixed.exit_code == 0, fixed.output
    assert "nothing fails" in fixed.output


def test_the_same_seed_gives_the_same_run(run):
    outputs = [run("--backend", "oracle", "--examples", 32, "--seed", 5).output for _ in range(2)]
    pairs = [re.search(r"of \d+ alternatives, (\d+) of", o) for o in outputs]
    assert pairs[0] is not None
    assert pairs[1] is not None
    assert pairs[0].group(1) == pairs[1].group(1)
