"""The benchmark: run as a user runs it, on CPU; its arithmetic by hand; and that its checks can fail."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import deepep
from deepep.bench import clock as clock_module
from deepep.bench import floor as floor_module
from deepep.bench import peers
from deepep.bench.clock import Clock, CudaClock, Timing, percentile
from deepep.bench.figures import Figure, Report
from deepep.bench.floor import Floor, pushes
from deepep.bench.plot import draw_report, panels_of
from deepep.bench.rank import run_rank
from deepep.bench.sweep import Shape, Sweep
from deepep.bench.table import print_report
from deepep.bench.workload import Workload, draw
from deepep.cli.bench import command
from deepep.errors import ArgumentError
from deepep.reference.layout import dispatch_layout
from deepep.trace import TraceWriter

SHAPE = Shape(tokens=9, hidden=128, topk=3, experts=8)
SMALL = Sweep(2, (SHAPE,), iterations=50, warmup=0)
OPERATIONS = [
    ("layout", "deepep", None),
    ("dispatch", "deepep", "bf16"),
    ("cached dispatch", "deepep", "bf16"),
    ("dispatch", "deepep", "fp8"),
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
        "--routing", "zipf", "--scales", "column-major", "--iterations", "50", "--warmup", "0",
        "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "functional figures" in done.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "b.json").read_text())
    assert [(f["operation"], f["by"], f["dtype"]) for f in told["figures"]] == OPERATIONS
    assert told["problems"] == []
    environment = told["environment"]
    assert environment["functional_only"]
    assert environment["checked"]
    assert environment["command"].startswith("python -m deepep bench --device cpu --ranks 3")
    for figure in told["figures"]:
        assert 0 < figure["median"] <= figure["p99"]
        assert figure["host"] > 0
        assert figure["sms"] is figure["floor"] is figure["floor_ratio"] is None
        moves = figure["operation"] != "layout"
        assert (figure["wire_bytes"] > 0) == (figure["logical_bytes"] > 0) == moves
        if moves:
            assert figure["wire_bytes"] <= 2 * figure["logical_bytes"]  # two of three ranks are others
            assert figure["wire_gbs"] == pytest.approx(figure["wire_bytes"] / figure["median"] / 1e3)


def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    done = run(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deepep", "bench",
        "--device", "cpu", "--tokens", "4", "--dtype", "bf16", "--iterations", "50", "--warmup", "0",
        "--json", str(tmp_path / "b.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 ranks, CPU") == 1
    told = json.loads((tmp_path / "b.json").read_text())
    assert told["environment"]["command"].startswith("torchrun --nproc-per-node 2 -m deepep bench")
    assert len(told["figures"]) == len([o for o in OPERATIONS if o[2] != "fp8"])


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


# the arithmetic


def workload(topk_idx: list[list[list[int]]], shape: Shape) -> Workload:
    indices = [torch.tensor(idx) for idx in topk_idx]
    layouts = [dispatch_layout(idx, shape.experts, len(indices)) for idx in indices]
    return Workload(shape, 0, indices, [torch.ones(idx.shape) for idx in indices], layouts)


def test_bytes_by_hand() -> None:
    """Two ranks, experts 0 and 1 on rank 0, 2 and 3 on rank 1. A token crosses once, for one expert or two."""
    shape = Shape(tokens=3, hidden=256, topk=2, experts=4)
    load = workload([[[0, 1], [0, 2], [2, 3]], [[0, 1], [0, 3], [1, -1]]], shape)
    assert load.rows.tolist() == [[2, 2], [3, 1]]
    bf16, fp8 = 512, 256 + 2 * 4
    dispatched = load.dispatched("bf16")
    assert dispatched.pairs == ((2 * bf16, 2 * bf16), (3 * bf16, 1 * bf16))
    assert dispatched.wire == 3 * bf16  # rank 1 to rank 0
    assert dispatched.logical == 5 * bf16  # rank 0 receives two of its own besides
    assert load.dispatched("fp8").wire == 3 * fp8
    combined = load.combined()
    assert combined.pairs == ((2 * bf16, 3 * bf16), (2 * bf16, 1 * bf16))
    assert (combined.wire, combined.logical) == (3 * bf16, 5 * bf16)


def test_the_busiest_port_may_be_a_receiver() -> None:
    """Three ranks of one expert each; ranks 1 and 2 send one token each to rank 0."""
    load = workload([[[-1]], [[0]], [[0]]], Shape(tokens=1, hidden=8, topk=1, experts=3))
    assert load.dispatched("bf16").wire == 2 * 16
    assert load.combined().wire == 2 * 16  # which sends as much when they go back


def figure(operation: str, by: str, sms: int | None, **given: Any) -> Figure:
    told = {"dtype": "bf16", "median": 200.0, "p99": 210.0, "host": 12.0, "wire_bytes": 58_000_000, **given}
    return Figure(SHAPE, operation, by, sms=sms, **told)


def test_rates_and_ratio() -> None:
    one = figure("dispatch", "deepep", 8, logical_bytes=100_000_000, floor=160.0, floor_sms=8)
    assert (one.wire_gbs, one.logical_gbs, one.ratio) == (290.0, 500.0, 1.25)
    assert one.as_dict()["floor_ratio"] == 1.25
    assert one.as_dict()["tokens"] == SHAPE.tokens
    none = figure("layout", "deepep", None, wire_bytes=0)
    assert (none.wire_gbs, none.logical_gbs, none.ratio) == (None, None, None)


def test_percentiles_are_samples() -> None:
    samples = [float(n) for n in range(100, 0, -1)]
    assert percentile(samples, 99) == 99.0
    assert percentile(samples[:60], 99) == 100.0
    assert percentile([7.0], 99) == 7.0


class Scripted(Clock):
    """A clock that has its samples written down."""

    def __init__(self, group: Any, samples: list[tuple[float, float]], warmup: int = 0) -> None:
        super().__init__(group, torch.device("cpu"), len(samples) - warmup, warmup)
        self._samples = iter(samples)

    def sample(self, call: Any) -> tuple[float, float]:
        call()
        return next(self._samples)


def test_a_sample_is_the_slowest_ranks(world_of: Any) -> None:
    """Ranks are slow in turn: each one's median is 1, the slowest's is 10. Warm-up does not count."""

    def measure(context: Any) -> Timing:
        slow = [(1.0, 5.0 + context.rank), (10.0, 5.0 + context.rank)]
        first, second = slow if context.rank == 0 else slow[::-1]
        samples = [(1e9, 1e9)] * 2 + [first, second] * 3
        return Scripted(context.group, samples, warmup=2).measure(lambda: None)

    assert world_of(2).run(measure) == [Timing(median=10.0, p99=10.0, host=6.0)] * 2


# CUDA's parts, on stand-ins


def test_cuda_samples_are_taken_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush, head start, alignment, start, call, end, wait; the result lives until then, and no longer."""
    log: list[str] = []
    results: list[weakref.ref[Any]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 2.0  # ms

    def synchronize(device: Any) -> None:
        held = any(r() is not None for r in results)
        log.append("wait, held" if held else "wait")

    monkeypatch.setattr(clock_module, "FLUSH_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles}"))
    timer = CudaClock(None, torch.device("cpu"), 50, 0, lambda: log.append("align"))
    log.clear()
    timer._flush.fill_(1)

    class Result:
        pass

    def call() -> Result:
        log.append("call")
        result = Result()
        results.append(weakref.ref(result))
        return result

    complete, host = timer.sample(call)
    # 2,000,000 cycles took 2 ms on the stand-in, so 200 us are 200,000.
    timed = ["sleep 200000", "align", "record", "call", "record", "wait, held"]
    assert log == [*timed, "align", "wait", "call", "wait, held"]
    assert complete == 2000.0
    assert 0 < host < 1e6
    assert not timer._flush.any()
    assert [r() for r in results] == [None, None]


PAIRS = ((7, 160, 320), (48, 9, 33), (16, 0, 5))


def test_pushes_do_not_collide() -> None:
    region = 320
    plans = [pushes(PAIRS, rank, region) for rank in range(3)]
    assert [[p.to for p in plan] for plan in plans] == [[1, 2], [2, 0], [0]]
    assert [[p.num_bytes for p in plan] for plan in plans] == [[160, 320], [48, 48], [16]]  # whole vectors
    written = [(p.to, at) for plan in plans for p in plan for at in range(p.target, p.target + p.num_bytes)]
    assert len(set(written)) == len(written)
    assert all(at < 3 * region for _, at in written)
    assert pushes(((5,),), 0, 16) == []


def test_the_floor_copies_the_bytes_and_takes_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of three, memmove for the kernel: 8 SMs are the fastest, and each count is measured once."""
    calls: list[int] = []
    heaps: list[torch.Tensor] = []

    def copy(source: int, target: int, num_bytes: int, sms: int, stream: int) -> None:
        assert stream == 77
        calls.append(sms)
        ctypes.memmove(target, source, num_bytes)

    def share(own: torch.Tensor, rank: int, gather: Any) -> Any:
        heaps.extend([own, torch.zeros_like(own), torch.zeros_like(own)])
        return SimpleNamespace(addresses=[heap.data_ptr() for heap in heaps])

    class ByCount(Clock):
        def sample(self, call: Any) -> tuple[float, float]:
            call()
            return abs(8 - calls[-1]) + 100.0, 0.0

        def largest(self, values: Any) -> list[float]:
            return list(values)

    kernels = ModuleType("deepep._cuda")
    kernels.__dict__["copy"] = copy
    monkeypatch.setitem(sys.modules, "deepep._cuda", kernels)
    monkeypatch.setattr(floor_module, "share_heap", share)
    monkeypatch.setattr(floor_module, "gather_over", lambda group: lambda mine: [mine] * 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    cpu = torch.device("cpu")
    floor = Floor(ByCount(None, cpu, 1, 0), None, 0, cpu, 313)  # rounded up to 320
    assert floor.all_sms == 132
    floor._source.copy_(torch.arange(floor._source.numel()) % 251)
    best = floor.best(PAIRS, 480, 24)
    assert best is not None
    assert (best.sms, best.timing.median, best.wire_bytes) == (8, 100.0, 480)
    assert sorted(set(calls)) == [1, 2, 4, 6, 8, 12, 16, 24]
    for to, size in ((1, 160), (2, 320)):
        assert torch.equal(heaps[to][:size], floor._source[to * 320 : to * 320 + size])
        assert not heaps[to][size:].any()
    assert not heaps[0].any()
    del calls[:]
    fewer = floor.best(PAIRS, 480, 7)
    assert fewer is not None
    assert fewer.sms == 7
    assert set(calls) == {7}, "the others are known"
    assert floor.best(((5,),), 0, 24) is None
    assert len(floor.measured) == 9


def test_deep_ep_is_opened_with_room_for_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sized:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
            return self.factor * hidden_bytes * ranks * FakeBuffer.sms

    class FakeBuffer:
        sms = 0

        def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
            self.sizes = (num_nvl_bytes, num_rdma_bytes)

        @staticmethod
        def set_num_sms(sms: int) -> None:
            FakeBuffer.sms = sms

        get_dispatch_config = staticmethod(lambda ranks: Sized(1))
        get_combine_config = staticmethod(lambda ranks: Sized(2))

    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(peers, "gather_over", lambda group: lambda mine: [mine, mine])
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert peers.open_deep_ep(group, 100, 24) == (None, "deep_ep: deep_ep is not installed")
    monkeypatch.setitem(sys.modules, "deep_ep", deepep)
    assert "this library" in peers.open_deep_ep(group, 100, 24)[1]
    other = ModuleType("deep_ep")
    monkeypatch.setitem(sys.modules, "deep_ep", other)
    assert "no Buffer" in peers.open_deep_ep(group, 100, 24)[1]
    other.__dict__["Buffer"] = FakeBuffer
    assert "not for 3 ranks" in peers.open_deep_ep(SimpleNamespace(size=lambda: 3), 100, 24)[1]
    buffer, why = peers.open_deep_ep(group, 100, 25)
    assert why == ""
    assert buffer.sizes == (2 * 200 * 2 * 24, 0)
    monkeypatch.setattr(peers, "gather_over", lambda group: lambda mine: [mine, "not there"])
    assert peers.open_deep_ep(group, 100, 24) == (None, "not there")


# routing


def traced(tmp_path: Path, ranks: int, lengths: list[list[int]]) -> tuple[str, list[list[torch.Tensor]]]:
    """A trace of two layers, E = 8, K = 3: (its file, the indices of layer 1 by step and rank)."""
    generator = torch.Generator().manual_seed(1)
    writer = TraceWriter(num_layers=2, num_ranks=ranks, num_experts=8, num_topk=3)
    layer_one = []
    for step, tokens in enumerate(lengths):
        for layer in range(2):
            idx = [torch.randint(-1, 8, (n, 3), generator=generator) for n in tokens]
            writer.add(step, layer, idx, [i.float() / 8 for i in idx])
        layer_one.append(idx)
    path = tmp_path / f"{ranks}.safetensors"
    writer.finish().save(path)
    return str(path), layer_one


def test_a_trace_is_replayed_in_order_and_again(tmp_path: Path) -> None:
    path, steps = traced(tmp_path, 2, [[3, 4], [2, 0]])
    load = draw(Sweep(2, (SHAPE,), routing="trace", trace=path, layer=1), SHAPE)
    for rank in range(2):
        once = torch.cat([step[rank] for step in steps])
        assert torch.equal(load.topk_idx[rank], torch.cat([once] * 3)[: SHAPE.tokens])
        assert torch.equal(load.topk_weights[rank], load.topk_idx[rank].float() / 8)
        expected = dispatch_layout(load.topk_idx[rank], 8, 2)
        assert torch.equal(load.layouts[rank].is_token_in_rank, expected.is_token_in_rank)


def test_a_trace_of_other_ranks_is_dealt_anew(tmp_path: Path) -> None:
    path, steps = traced(tmp_path, 1, [[8], [6]])
    load = draw(Sweep(2, (SHAPE,), routing="trace", trace=path, layer=1), SHAPE)
    second = torch.cat([steps[0][0][4:], steps[1][0][3:]])
    assert torch.equal(load.topk_idx[1], torch.cat([second] * 2)[: SHAPE.tokens])


@pytest.mark.parametrize(
    ("lengths", "layer", "shape", "complaint"),
    [
        ([[3, 3]], 2, SHAPE, "layer: got 2; allowed: 0 to 1"),
        ([[3, 3]], 0, Shape(9, 128, 2, 8), "topk: got 2; allowed: 3, as in the trace"),
        ([[3, 3]], 0, Shape(9, 128, 3, 16), "experts: got 16; allowed: 8, as in the trace"),
        ([[3, 0]], 0, SHAPE, "no tokens of rank 1"),
        ([], 0, SHAPE, "no tokens of rank 0"),
    ],
)
def test_a_trace_that_does_not_fit(
    tmp_path: Path, lengths: list[list[int]], layer: int, shape: Shape, complaint: str
) -> None:
    path, _ = traced(tmp_path, 2, lengths)
    with pytest.raises(ArgumentError, match=complaint):
        draw(Sweep(2, (shape,), routing="trace", trace=path, layer=layer), shape)


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_drawn_routing(routing: str) -> None:
    shape = Shape(tokens=200, hidden=128, topk=3, experts=8)
    load = draw(Sweep(2, (shape,), routing=routing), shape)
    assert [idx.shape for idx in load.topk_idx] == [(200, 3)] * 2
    assert not torch.equal(load.topk_idx[0], load.topk_idx[1])
    counts = sum(layout.num_tokens_per_expert for layout in load.layouts)
    assert counts.sum() == 2 * 200 * 3
    # 1200 draws: 150 an expert if uniform, give or take some 10; Zipf's first gets almost all 400 tokens.
    assert (counts.max() > 250) == (routing == "zipf")
    assert not (load.x(0) == 0).any()
    assert not torch.equal(load.x(0), load.x(1))
    assert torch.equal(load.x(1), draw(Sweep(2, (shape,), routing=routing), shape).x(1))


# what was wrong is told


def measured_with_defect(context: Any, defect: str) -> Report:
    """A small run on a rank, with one bit wrong on rank 1 in what `defect` names."""
    from deepep import Buffer
    from deepep.bench.collective import Exchange

    owner, _, name = defect.partition(".")
    target: Any = {"Buffer": Buffer, "Exchange": Exchange}[owner]
    real = getattr(target, name)

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        values = first[0] if isinstance(first, tuple) else first
        if context.rank == 1 and values.numel():
            values.view(torch.uint8).view(-1)[0] ^= 1
        return result

    setattr(target, name, spoiled)
    try:
        return run_rank(
            context.group, context.device, Sweep(2, (SHAPE,), dtypes=("bf16",), iterations=50, warmup=0)
        )
    finally:
        setattr(target, name, real)


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
    report = world_of(2).run(measured_with_defect, f"Exchange.{name}")[0]
    assert report.problems == []
    assert len(report.figures) == len([o for o in OPERATIONS if o[2] != "fp8"])
    assert any(what in note for note in report.notes)


def test_a_wrong_result_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ranks", "device", "backend", "transport", "routing", "iterations", "date")
    wrong = Report(dict.fromkeys(names, "x"), problems=["deepep combine: rank 1: off"])
    monkeypatch.setattr("deepep.cli.bench._run_in_own_processes", lambda sweep, cuda: wrong)
    done = invoke("--device", "cpu")
    assert done.exit_code == 1
    assert "WRONG deepep combine: rank 1: off" in done.output


# what is shown


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
    told = {"ranks": 2, "device": "2 x GPU", "backend": "cuda", "transport": "NCCL", "routing": "uniform",
            "iterations": 60, "date": "now", "functional_only": False}  # fmt: skip
    report = Report(told, figures, notes=["[a] note"])
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
    assert all(
        f"<!-- {word} -->" in picture for word in ("floor", "deepep, cached", "nccl alone", "deep\\_ep")[:3]
    )
    report.save(tmp_path / "a.json")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert [f["floor_ratio"] for f in saved["figures"][1:3]] == [1.5625, 1.5]
