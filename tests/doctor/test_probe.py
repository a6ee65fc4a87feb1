"""Measurements between processes: everybody meets everybody, a fault shows in its place, whatever else the
machine does; and the command says what the judge said.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from deepep.api.waits import WaitStatistics
from deepep.cli import doctor
from deepep.doctor.judge import Evidence
from deepep.doctor.probe import Delay, Examination, _opponents, run_examination
from deepep.doctor.trial import Trial, run_trial


@pytest.mark.parametrize("size", range(1, 10))
def test_every_two_ranks_meet_once_and_agree_when(size: int) -> None:
    turns = [_opponents(rank, size) for rank in range(size)]
    for rank, opponents in enumerate(turns):
        assert sorted(o for o in opponents if o is not None) == [r for r in range(size) if r != rank]
        for turn, opponent in enumerate(opponents):
            assert opponent is None or turns[opponent][turn] == rank


def test_a_delayed_message_shows_in_its_link(world_of: Any) -> None:
    """A sleep takes no less than it was asked for, so this holds on any machine."""
    found = world_of(3).run(run_examination, 3, "reference", Delay(2, 0.02, to=0))[0]
    assert found.backend == "reference"
    assert all(0 < share <= 1.01 for share in found.evidence.share)
    assert found.evidence.links[0][2] >= 0.02
    assert all(found.evidence.links[i][k] > 0 for i in range(3) for k in range(3) if i != k)
    assert all(found.evidence.links[i][i] == found.evidence.late[i][i] == 0 for i in range(3))
    assert found.waits is not None
    assert all(found.waits.of(phase).shape == (3, 3) for phase in ("arrive", "rows"))


WELL = Evidence(
    late=[[0.0, 0.0], [0.0, 0.0]], links=[[0.0, 1e-3], [1e-3, 0.0]], share=[1.0, 1.0], work=1e-3, hosts=[0, 0]
)
ILL = replace(WELL, links=[[0.0, 1e-3], [9e-3, 0.0]])
WAITS = WaitStatistics(
    {
        ("dispatch", "arrive"): torch.tensor([[0, 3], [5, 0]]),
        ("low_latency_dispatch", "kernels"): torch.tensor([[0, 7], [2, 0]]),
    },
    {("dispatch", "arrive"): 2},
)


@pytest.mark.parametrize(
    ("evidence", "status", "words"), [(WELL, 0, "nobody stands out"), (ILL, 1, "check ")]
)
def test_the_command_draws_and_names(
    monkeypatch: pytest.MonkeyPatch, evidence: Evidence, status: int, words: str
) -> None:
    found = Examination(evidence, WAITS, "reference")
    monkeypatch.setattr(doctor, "_in_own_processes", lambda *_: found)
    app = typer.Typer()
    app.command()(doctor.command)
    done = CliRunner().invoke(app, ["--device", "cpu"])
    assert done.exit_code == status, done.output
    assert words in done.output
    assert "traffic: ms in all" in done.output
    assert "waited for another to launch in low latency" in " ".join(done.output.split())
    if status:
        assert "the link from rank 0 to rank 1 is 9 times as slow" in done.output


def test_the_command_refuses_what_cannot_be() -> None:
    app = typer.Typer()
    app.command()(doctor.command)
    assert CliRunner().invoke(app, ["--device", "tpu"]).exit_code == 2


class Pending:
    """A run that gives one examination."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def results(self) -> list[Examination]:
        return [Examination(self.evidence, None, "reference")]


class StubWorld:
    """Two ranks that are examined with the delay that is asked for, which shows where it was put."""

    num_ranks = 2

    def __init__(self, evidence: Evidence) -> None:
        self.evidence, self.delays = evidence, []

    def ensure_started(self) -> None:
        pass

    def submit(self, function: Any, rounds: int, backend: Any, delay: Any, timeout: float) -> Pending:
        self.delays.append(delay)
        return Pending(self.evidence)


def test_a_trial_is_right_if_the_fault_and_nobody_else_is_named() -> None:
    world: Any = StubWorld(ILL)
    trial = run_trial(world, "link", 0, 3, None)
    assert (trial.ranks, trial.is_right) == ((0, 1), True)
    assert world.delays[0].to == 1
    assert not run_trial(world, "link", 1, 3, None).is_right  # of rank 1's to rank 0 it was another
    assert not run_trial(world, "none", 0, 3, None).is_right
    assert run_trial(StubWorld(WELL), "none", 0, 3, None).is_right  # type: ignore[arg-type]
    assert not Trial("rank", (0,), ()).is_right
    doctor._tell(Console(quiet=True), trial)
