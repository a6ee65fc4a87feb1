"""The benchmark: run as a user runs it, on CPU; that its checks can fail; and what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from deepep.bench.figures import BenchReport, Figure
from deepep.bench.operations import FRESH
from deepep.bench.plot import draw_report, panels_of
from deepep.bench.rank import run_rank
from deepep.bench.sweep import Shape, Sweep
from deepep.bench.table import print_report
from deepep.cli.bench import command
from deepep.errors import ArgumentError

SHAPE = Shape(tokens=9, hidden=128, topk=3, experts=8)
SMALL = Sweep(2, (SHAPE,), dtypes=("bf16",), iterations=50, warmup=0)
OPERATIONS = [
    ("layout", "deepep", None),
    *((name, "deepep", "bf16") for name in FRESH),
    ("cached dispatch", "deepep", "bf16"),
    *((name, "deepep", "fp8") for name in FRESH),
    ("cached dispatch", "deepep", "fp8"),
    ("combine", "deepep", "bf16"),
    ("dispatch", "gloo alone", "bf16"),
    ("dispatch", "gloo with permute", "bf16"),
    ("dispatch", "gloo alone", "fp8"),
    ("dispatch", "gloo with permute", "fp8"),
    ("combine", "gloo alone", "bf16"),
    ("combine", "gloo with reduce", "bf16"),
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def invoke(*options: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, options)


# as a user runs it


def test_the_command_measures_checks_and_writes(tmp_path: Path) -> None:
    done = run(
        "deepep", "bench", "--device", "cpu", "--ranks", "3", "--tokens", "5", "--hidden", "128",
        "--dtype", "fp8", "--routing", "zipf", "--scales", "column-major",
        "--iterations", "50", "--warmup", "0",
        "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "functional figures" in done.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "b.json").read_text())
    expected = [o for o in OPERATIONS if o[2] != "bf16" or o[0] == "combine"]
    assert [(f["operation"], f["by"], f["dtype"]) for f in written["figures"]] == expected
    assert written["problems"] == []
    environment = written["environment"]
    assert environment["functional_only"]
    assert environment["checked"]
    assert environment["command"].startswith("python -m deepep bench --device cpu --ranks 3")
    for figure in written["figures"]:
        assert 0 < figure["median"] <= figure["p99"]
        assert figure["host"] > 0
        assert figure["sms"] is figure["floor"] is figure["floor_ratio"] is None
        moves = figure["operation"] != "layout"
        assert (figure["wire_bytes"] > 0) == (figure["logical_bytes"] > 0) == moves
        if moves:
            assert figure["wire_bytes"] <= 2 * figure["logical_bytes"]  # two of three ranks are others
            assert figure["wire_gbs"] == pytest.approx(figure["wire_bytes"] / figure["median"] / 1e3)


def test_the_command_measures_low_latency(tmp_path: Path) -> None:
    done = run(
        "deepep", "bench", "--mode", "low-latency", "--device", "cpu", "--ranks", "2", "--tokens", "3",
        "--hidden", "128", "--dtype", "fp8", "--iterations", "50", "--warmup", "0",
        "--json", str(tmp_path / "b.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "functional figures" in done.stdout
    assert "x exchange" in done.stdout
    written = json.loads((tmp_path / "b.json").read_text())
    halves = [f"{name}, {half}" for name in ("dispatch", "combine") for half in ("send", "receive")]
    names = ["dispatch", "combine", "dispatch + combine", *halves, "dispatch", "combine"]
    figures = written["figures"]
    assert [figure["operation"] for figure in figures] == names
    assert [figure["by"] for figure in figures[-2:]] == ["gloo alone"] * 2
    for figure in figures:
        assert 0 < figure["median"] <= figure["p99"]
        assert figure["exchange"] is figure["kernels"] is figure["floor"] is None
    assert written["problems"] == []
    assert written["environment"]["mode"] == "low-latency"
    assert "low-latency dispatch" in written["environment"]["runs_on"]
    assert any("not captured in a graph" in note for note in written["notes"])


def test_the_command_measures_a_layer(tmp_path: Path) -> None:
    done = run(
        "deepep", "bench", "--mode", "layer", "--device", "cpu", "--ranks", "2", "--tokens", "3",
        "--hidden", "128", "--width", "16", "--iterations", "50", "--warmup", "0",
        "--json", str(tmp_path / "b.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "functional figures" in done.stdout
    assert "x products" in done.stdout
    written = json.loads((tmp_path / "b.json").read_text())
    layers = ["deepep", "deepep, FP8 rows", "plain torch", "deepep, fixed shapes", "products alone"]
    assert [f["by"] for f in written["figures"]] == layers * 2
    assert (written["environment"]["mode"], written["environment"]["width"]) == ("layer", 16)


def test_the_command_measures_overlap(tmp_path: Path) -> None:
    done = run(
        "deepep", "bench", "--mode", "overlap", "--device", "cpu", "--ranks", "2", "--tokens", "3",
        "--hidden", "128", "--width", "16", "--iterations", "50", "--warmup", "0", "--dtype", "bf16",
        "--json", str(tmp_path / "b.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x bound" in done.stdout
    written = json.loads((tmp_path / "b.json").read_text())
    parts = ("alone", "products alone", "together")
    operations = [f"{name}, {part}" for name in ("cached dispatch", "combine") for part in parts]
    assert [f["operation"] for f in written["figures"]] == operations
    assert written["environment"]["mode"] == "overlap"


def test_a_recorded_trace_is_measured(tmp_path: Path) -> None:
    """Replays in `bench` what `demo` recorded, and reports how skewed it is."""
    demo = run("deepep", "demo", "--ranks", "2", "--steps", "2", "--experts", "6", "--topk", "1",
               "--out", str(tmp_path))  # fmt: skip
    assert demo.returncode == 0, demo.stdout + demo.stderr
    done = run(
        "deepep", "bench", "--device", "cpu", "--ranks", "2", "--tokens", "300", "--hidden", "128",
        "--dtype", "bf16", "--routing", "trace", "--trace", str(tmp_path / "routing.safetensors"),
        "--layer", "1", "--peers", "", "--iterations", "50", "--warmup", "0",
        "--json", str(tmp_path / "b.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "busiest over mean: rows received" in done.stdout
    written = json.loads((tmp_path / "b.json").read_text())
    (skew,) = written["skew"]
    assert (skew["tokens"], skew["topk"], skew["experts"]) == (300, 1, 6)
    assert skew["sending"] == 1  # with one expert a token, every rank sends each token once
    assert skew["receiving"] >= 1
    assert skew["expert"] > 1
    assert (written["environment"]["trace"], written["environment"]["layer"]) == ("routing.safetensors", 1)


def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    done = run(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deepep", "bench",
        "--device", "cpu", "--tokens", "4", "--dtype", "bf16", "--peers", "",
        "--iterations", "50", "--warmup", "0",
        "--json", str(tmp_path / "b.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 ranks, CPU") == 1
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["environment"]["command"].startswith("torchrun --nproc-per-node 2 -m deepep bench")
    operations = [figure["operation"] for figure in written["figures"]]
    assert operations == ["layout", *FRESH, "cached dispatch", "combine"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tokens", "4k"], "tokens: got 4k"),
        (["--tokens", "0"], "tokens: got 0"),
        (["--experts", "7"], "experts: got 7; allowed: a positive multiple of the 2 ranks"),
        (["--experts", "2"], "topk: got 4; allowed: at most the 2 experts"),
        (["--dtype", "fp4"], "dtype: got fp4"),
        (["--hidden", "136"], "hidden: got 136; allowed: a multiple of 128"),
        (["--hidden", "12", "--dtype", "bf16"], "hidden: got 12; allowed: a multiple of 8"),
        (["--iterations", "49"], "iterations: got 49; allowed: 50 or more"),
        (["--ranks", "0"], "ranks: got 0"),
        (["--routing", "random"], "routing: got random"),
        (["--routing", "trace"], "trace: got None"),
        (["--scales", "diagonal"], "scales: got diagonal"),
        (["--peers", "mpi"], "peers: got mpi"),
        (["--device", "tpu"], "device: got tpu"),
        (["--mode", "decode"], "mode: got decode"),
        (["--mode", "low-latency", "--sms", "8"], "sms: got (8,); allowed: none"),
        (["--mode", "low-latency", "--scales", "column-major"], "scales: got column-major"),
        (["--mode", "layer", "--sms", "8"], "sms: got (8,); allowed: none"),
        (["--mode", "layer", "--plot", "curve.png"], "plot: got curve.png"),
        (["--mode", "layer", "--width", "12"], "width: got 12; allowed: a multiple of 8"),
        (["--trace", "nowhere.safetensors", "--routing", "trace"], "nowhere.safetensors"),
        (["--backend", "nonsense"], "backend: got 'nonsense'"),  # by the ranks
    ],
)
def test_what_cannot_be_measured_is_refused(options: list[str], complaint: str) -> None:
    device = [] if "--device" in options else ["--device", "cpu"]
    done = invoke(*device, *options)
    assert done.exit_code == 2, done.output
    assert complaint in " ".join(done.output.split())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_command_on_two_gpus(tmp_path: Path) -> None:
    done = run(
        "deepep", "bench", "--ranks", "2", "--tokens", "4096", "--sms", "8,24", "--peers", "all_to_all",
        "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "functional" not in done.stdout
    for figure in json.loads((tmp_path / "b.json").read_text())["figures"]:
        if figure["wire_bytes"]:
            assert figure["floor_sms"] <= (figure["sms"] or 132)
            assert figure["floor_ratio"] > 0.9, "faster than a plain copy: one of the two is measured wrongly"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_low_latency_on_two_gpus(tmp_path: Path) -> None:
    done = run(
        "deepep", "bench", "--mode", "low-latency", "--ranks", "2", "--tokens", "1,128",
        "--dtype", "fp8", "--peers", "all_to_all", "--iterations", "50", "--json", str(tmp_path / "b.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["problems"] == []
    figures = [figure for figure in written["figures"] if figure["by"] == "deepep"]
    assert {figure["operation"] for figure in figures} >= {"pair, graph of 1", "pair, graph of 8"}
    for figure in figures:
        if figure["operation"].endswith(("send", "receive")):
            assert figure["kernels"] > 0
        else:
            assert figure["exchange_ratio"] > 0.9, "faster than a bare exchange: one of the two is wrong"


def figure(operation: str, by: str, sms: int | None, **given: Any) -> Figure:
    fields = {"dtype": "bf16", "median": 200.0, "p99": 210.0, "host": 12.0, "wire_bytes": 58_000_000, **given}
    return Figure(SHAPE, operation, by, sms=sms, **fields)


def test_rates_and_ratio() -> None:
    one = figure("dispatch", "deepep", 8, logical_bytes=100_000_000, floor=160.0, floor_sms=8)
    assert (one.wire_gbs, one.logical_gbs, one.ratio) == (290.0, 500.0, 1.25)
    assert one.as_dict()["floor_ratio"] == 1.25
    assert one.as_dict()["tokens"] == SHAPE.tokens
    none = figure("layout", "deepep", None, wire_bytes=0)
    assert (none.wire_gbs, none.logical_gbs, none.ratio) == (None, None, None)


# what was wrong is reported


def measured_with_defect(context: Any, defect: str) -> BenchReport:
    """A small run on a rank, with one bit wrong on rank 1 in what `defect` names."""
    from deepep import Buffer
    from deepep.bench import rank as rank_module
    from deepep.bench.collective import CollectiveExchange

    owner, _, name = defect.partition(".")
    target: Any = {"Buffer": Buffer, "CollectiveExchange": CollectiveExchange}[owner]
    real = getattr(target, name)

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        values = first[0] if isinstance(first, tuple) else first
        if context.rank == 1 and values.numel():
            values.view(torch.uint8).view(-1)[0] ^= 1
        return result

    setattr(target, name, spoiled)
    clock = rank_module.HostClock
    rank_module.HostClock = lambda group, device, iterations, warmup: clock(group, device, 2, 0)
    try:
        return run_rank(context.group, context.device, SMALL)
    finally:
        setattr(target, name, real)
        rank_module.HostClock = clock


@pytest.mark.parametrize("name", ["get_dispatch_layout", "dispatch", "combine"])
def test_a_wrong_result_ends_the_run(world_of: Any, name: str) -> None:
    for report in world_of(2).run(measured_with_defect, f"Buffer.{name}"):
        (problem,) = report.problems
        assert "rank 1: " in problem
        assert " bytes differ" in problem
        operation = {"get_dispatch_layout": "layout"}.get(name, name)
        assert problem.startswith(f"deepep {operation}")
        assert all(f.operation != operation for f in report.figures), "what is wrong is not timed"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("there", "gloo alone dispatch bf16: rank 1: recv_x"),
        ("back", "gloo alone combine bf16: rank 1: returned_rows"),
        ("dispatch", "gloo with permute dispatch bf16: rank 1: recv_x"),
        ("combine", "gloo with reduce combine bf16: rank 1: combined_x"),
    ],
)
def test_a_wrong_result_of_a_peer_is_noted(world_of: Any, name: str, what: str) -> None:
    report = world_of(2).run(measured_with_defect, f"CollectiveExchange.{name}")[0]
    assert report.problems == []
    assert len(report.figures) == len([o for o in OPERATIONS if o[2] != "fp8"])
    assert any(what in note for note in report.notes)


def test_lists_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[Sweep] = []

    def refuse(sweep: Sweep, cuda: bool) -> BenchReport:
        swept.append(sweep)
        raise ArgumentError("enough", "seen", "nothing")

    monkeypatch.setattr("deepep.cli.bench._run_in_own_processes", refuse)
    invoke("--device", "cpu", "--ranks", "4", "--tokens", "64, 8,64", "--hidden", "256,128", "--dtype", "fp8")
    invoke("--device", "cpu", "--peers", "")
    shapes = [Shape(t, h, 4, 32) for h in (256, 128) for t in (64, 8)]
    assert swept[0] == Sweep(4, tuple(shapes), dtypes=("fp8",), width=64)
    assert swept[1].shapes == (Shape(64, 512, 4, 16),)
    assert swept[1].peers == ()


def test_a_wrong_result_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ranks", "device", "backend", "transport", "routing", "iterations", "date")
    wrong = BenchReport(dict.fromkeys(names, "x"), problems=["deepep combine: rank 1: off"])
    monkeypatch.setattr("deepep.cli.bench._run_in_own_processes", lambda sweep, cuda: wrong)
    done = invoke("--device", "cpu")
    assert done.exit_code == 1
    assert "WRONG deepep combine: rank 1: off" in done.output


# what is shown


def test_curves_of_low_latency_are_drawn_by_tokens(tmp_path: Path) -> None:
    from dataclasses import replace

    from deepep.bench.low_latency.plot import curves_of, draw_curves

    figures = []
    for tokens, time in ((1, 12.0), (8, 12.5), (128, 16.0)):
        shape = replace(figure("low", "deepep", None).shape, tokens=tokens)
        for by, more in (("deepep", 0.0), ("bare exchange", -3.0), ("nccl alone", 4.0)):
            figures += [
                replace(figure(name, by, None, median=time + more, p99=time + more + 1), shape=shape)
                for name in ("dispatch", "combine")
            ]
    facts = {"ranks": 2, "device": "2 x GPU", "routing": "uniform", "functional_only": False}
    panels = curves_of(figures)
    assert [len(rows) for rows in panels.values()] == [9, 9]
    assert [title.split(",")[0] for title in panels] == ["dispatch bf16", "combine bf16"]
    draw_curves(BenchReport(facts, figures), tmp_path / "c.svg")
    picture = (tmp_path / "c.svg").read_text()
    for words in ("bare exchange", "nccl alone", "T, tokens of a rank", "128"):
        assert f"<!-- {words} -->" in picture


def test_table_plot_and_json_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    figures = [figure("layout", "deepep", None, dtype=None, wire_bytes=0)]
    for sms, time in ((8, 250.0), (24, 200.0)):
        figures += [
            figure("dispatch", "deepep", sms, median=time, floor=160.0, floor_sms=8),
            figure("cached dispatch", "deepep", sms, median=time - 10, floor=160.0, floor_sms=8),
            figure("dispatch", "deep_ep", sms, median=time + 90, floor=160.0, floor_sms=8),
            figure("combine", "deepep", sms, median=time, floor=160.0, floor_sms=8),
        ]
    figures.append(figure("dispatch", "nccl alone", None, floor=150.0, floor_sms=132))
    facts = {"ranks": 2, "device": "2 x GPU", "backend": "cuda", "transport": "NCCL", "routing": "uniform",
            "iterations": 60, "date": "now", "functional_only": False}  # fmt: skip
    report = BenchReport(facts, figures, notes=["[a] note"])
    print_report(report, Console(file=sys.stdout))
    shown = capsys.readouterr().out
    assert "160.0 (8 SMs)" in shown
    assert "1.562" in shown  # 250 / 160
    assert "290.0" in shown  # 58 MB in 200 us
    assert "[a] note" in shown
    panels = panels_of(figures)
    assert {title: len(rows) for (_, title), rows in panels.items()} == {
        "dispatch bf16": 7,
        "combine bf16": 2,
    }
    for name in ("a.png", "a.svg"):
        draw_report(report, tmp_path / name)
    picture = (tmp_path / "a.svg").read_text()
    for words in ("floor", "deepep, cached", "nccl alone"):
        assert f"<!-- {words} -->" in picture
    report.save(tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert [f["floor_ratio"] for f in saved["figures"][1:3]] == [1.5625, 1.5]
