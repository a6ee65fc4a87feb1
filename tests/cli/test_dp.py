"""`deepep dp`: small runs of what it measures, and its misuse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from deepep.bench.reductions import AUTO, FP8, TORCH, TORCH_BF16, ReductionTimes
from deepep.cli import dp, dp_bench, dp_efficiency, dp_topologies
from deepep.cli.demo_gradients import run_gradients
from deepep.cli.terminal import make_console
from deepep.demo.compressed import CONTROL, train_with
from deepep.demo.config import DemoConfig
from deepep.sim.faults.outages import OutageCosts
from deepep.sim.links import comparing
from deepep.sim.links.clusters import CLUSTERS, EmulatedCluster
from deepep.sim.links.comparing import CHOSEN, CHOSEN_FP8, GLOO, SIZES, ClusterComparison

HAS_NAMESPACES = (
    shutil.which("ip") is not None
    and shutil.which("unshare") is not None
    and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
)


def trained(context: Any, form: str, config: DemoConfig) -> float:
    losses = train_with(context.group, form, config)
    return sum(losses[-6:]) / 6


def test_fp8_trains_like_float32_and_two_bits_do_not(world_of: Callable[[int], Any]) -> None:
    """`python -m deepep dp convergence` in small, with its bounds."""
    config = DemoConfig(
        num_ranks=2,
        steps=12,
        layers=1,
        num_experts=4,
        num_topk=2,
        hidden=48,
        expert_hidden=32,
        shared_hidden=32,
        context=64,
        sequences=4,
    )
    means = {
        form: world_of(2).run(trained, form, config, timeout=300.0)[0] for form in ("off", "fp8", CONTROL)
    }
    assert abs(means["fp8"] - means["off"]) <= dp.MOST_OFF
    assert means[CONTROL] - means["off"] >= dp.LEAST_OFF


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NAMESPACES, reason="no network namespaces for this user, or no ip command")
def test_bytes_on_an_interface_of_its_own() -> None:
    command = [sys.executable, "-m", "deepep", "dp", "bytes", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fp8" in done.stdout


def test_rates_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert dp._codec(6000)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("fp8", "fp16", "bf16", "fixed32"))


def test_outages_are_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 4 ranks that lose one at once, three quarters are left of whatever a gap leaves."""
    costs = OutageCosts(2, 0.5, 0.0, 1000.0, 10)
    costs.save(tmp_path / "costs.json")
    assert dp_efficiency.simulate(4, 1, str(tmp_path / "costs.json"))
    printed = capsys.readouterr().out
    assert "0.750" in printed
    assert "restart 1000.0 s" in printed
    assert dp_efficiency.simulate(128, 6, "")
    with pytest.raises(typer.Exit):
        dp_efficiency.simulate(4, 1, str(tmp_path / "none.json"))
    with pytest.raises(typer.Exit):
        dp_efficiency.simulate(4, 4, "")


def test_topologies_are_measured_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that a file has is measured again, and the mean is judged once all is there."""
    runs = []

    def compare(cluster: EmulatedCluster, rounds: int, pinned: bool, sizes: Any) -> ClusterComparison:
        runs.append((cluster.name, tuple(sizes)))
        seconds = {
            size: {GLOO: 1.0, CHOSEN: 0.9, CHOSEN_FP8: 0.3, "native": 0.9, "direct": 0.9} for size in sizes
        }
        plans = {size: {CHOSEN: "direct", CHOSEN_FP8: "direct"} for size in sizes}
        return ClusterComparison(cluster.name, cluster.groups, seconds, plans)

    monkeypatch.setattr(comparing, "compare", compare)
    file = str(tmp_path / "times.json")
    assert dp_topologies.topologies(4, 3, True, "flat", "256K", file)
    assert "14 of 15 are not measured" in capsys.readouterr().out
    assert dp_topologies.topologies(4, 3, True, "flat,slow-port", "", file)
    assert runs == [("flat", (SIZES[1],)), ("flat", (SIZES[0], SIZES[2])), ("slow-port", SIZES)]
    assert not dp_topologies.topologies(4, 3, True, "", "", file)
    assert len(runs) == len(CLUSTERS) + 1
    assert "geometric mean: 0.90; allowed: at most 0.78" in capsys.readouterr().out
    runs.clear()
    assert not dp_topologies.topologies(4, 3, True, "", "", file)
    assert not runs
    for ranks, clusters, sizes in ((8, "", ""), (4, "ring", ""), (4, "", "1K")):
        with pytest.raises(typer.Exit):
            dp_topologies.topologies(ranks, 3, True, clusters, sizes, file)


def test_every_check_of_the_makefile_says_what_it_takes() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    words = re.search(r"^CLUSTER \?= (.*)$", makefile, re.M)
    assert words is not None
    checks = [*words[1].split(), "bench"]
    assert sorted(checks) == sorted(dp._USED)
    app = typer.Typer()
    app.command()(dp.command)
    for what in checks:  # misuse of each, so that none runs
        done = CliRunner().invoke(app, [what, "--ranks", "1"])
        assert (what, done.exit_code, type(done.exception)) == (what, 2, SystemExit)


def test_schedules_without_hope_are_timed_once() -> None:
    """And gloo, and what was chosen, in every round, however long they take."""
    seconds = {GLOO: [9.0, 7.0, 8.0], CHOSEN: [6.0, 2.0, 2.5], CHOSEN_FP8: [0.1, 0.2, 0.3]}
    seconds |= {"native": [7.0, 3.1, 5.0], "direct": [2.0, 2.1, 2.2], "ring": [2.9, 2.0, 3.0]}
    ways = {way: (lambda way=way: way) for way in seconds}
    ran: list[str] = []

    def timed(run: Callable[[], object]) -> float:
        ran.append(str(run()))
        return seconds[ran[-1]][ran.count(ran[-1]) - 1]

    found = comparing.medians(ways, 3, timed)
    assert found == {GLOO: 8.0, CHOSEN: 2.5, CHOSEN_FP8: 0.2, "native": 7.0, "direct": 2.1, "ring": 2.9}
    assert ran.count("native") == 1


def test_reductions_are_timed_and_judged(
    world_of: Callable[[int], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m deepep dp bench` in small, on the CPU; bars are for ranks with a GPU each."""
    found = world_of(2).run(dp_bench._measured, [4096], 1, 2, timeout=120.0)[0]
    assert found.wrong == []
    assert dp_bench.show(found, make_console())
    assert "no GPU here" in capsys.readouterr().out
    seconds = {4096: {TORCH: [1.0, 3.0, 2.0], TORCH_BF16: [1.0], AUTO: [2.1], FP8: [1.4]}}
    plans = {4096: {AUTO: "native", FP8: "direct fp8"}}
    assert not dp_bench.show(ReductionTimes("cuda", 2, False, seconds=seconds, plans=plans), make_console())
    assert "4,096 bytes, auto: 1.05; allowed: at most 1.02" in capsys.readouterr().out
    for shared in (
        ReductionTimes("cuda", 2, True, seconds=seconds, plans=plans),
        ReductionTimes("cuda", 2, False, "two ranks on one GPU", {4096: {AUTO: [1.0]}}, plans),
    ):
        assert dp_bench.show(shared, make_console())
    assert not dp_bench.show(ReductionTimes("cuda", 2, True, wrong=["rank 0"]), make_console())
    assert [dp_bench._bytes_of(word) for word in ("12", "64k", "1M", "2G")] == [12, 65536, 1 << 20, 2 << 30]
    for word in ("", "M", "1T", "-1", "0"):
        with pytest.raises(typer.Exit):
            dp_bench._bytes_of(word)


@pytest.mark.slow
def test_a_rank_that_is_killed_in_an_all_reduce_is_missed() -> None:
    assert dp_bench._killed(3, "gloo", make_console())


def test_misuse() -> None:
    command = [sys.executable, "-m", "deepep", "dp", "speed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "allowed: bits, codec, bytes, convergence" in done.stderr


def test_the_demo_draws_gradients_on_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the loopback where networks cannot be emulated, and it says so."""
    config = DemoConfig(
        num_ranks=2,
        steps=2,
        layers=1,
        num_experts=4,
        num_topk=2,
        hidden=48,
        expert_hidden=32,
        shared_hidden=32,
        context=64,
        sequences=2,
    )
    assert run_gradients(config, "auto", tmp_path / "out", probe_seconds=0.1)
    assert (tmp_path / "out" / "data_parallel.png").stat().st_size > 10_000
    assert "groups found" in capsys.readouterr().out
