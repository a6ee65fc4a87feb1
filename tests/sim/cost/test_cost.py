"""The cost model: bytes counted one by one, published figures within a tenth or with a reason."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepep.cli import main
from deepep.sim.cost import report
from deepep.sim.cost.loads import RowCounts, count_rows, uniform_routing
from deepep.sim.cost.model import H200, LOW_LATENCY, THROUGHPUT, Cluster, RowShape, low_latency, throughput
from deepep.sim.cost.published import ROWS, TOLERANCE, compare
from deepep.trace import TraceWriter


def one_by_one(topk: list[np.ndarray], experts: int, size: int) -> dict[str, list[int]]:
    """The counts by walking every token, without a table."""
    ranks = len(topk)
    found = {field.name: [0] * ranks for field in fields(RowCounts)}
    for source, indices in enumerate(topk):
        for row in indices.tolist():
            owners = [e // (experts // ranks) for e in row if e >= 0]
            found["tokens"][source] += 1
            found["choices"][source] += len(owners)
            found["remote_choices"][source] += sum(o // size != source // size for o in owners)
            found["per_rank"][source] += len(set(owners))
            found["kept_choices"][source] += owners.count(source)
            found["kept_ranks"][source] += source in owners
            found["remote_ranks"][source] += sum(o // size != source // size for o in set(owners))
            domains = {o // size for o in owners}
            found["per_domain"][source] += len(domains)
            for domain in domains:
                gateway = domain * size + source % size
                if domain != source // size:
                    found["cross"][source] += 1
                    found["hold"][gateway] += 1
                for owner in {o for o in owners if o // size == domain and o != gateway}:
                    found["spread"][gateway] += 1
                    found["receive"][owner] += 1
    return found


@pytest.mark.parametrize(("ranks", "size"), [(1, 8), (4, 2), (4, 4), (6, 3), (8, 1), (8, 8)])
def test_rows_are_counted_one_by_one(ranks: int, size: int) -> None:
    rng = np.random.default_rng(ranks * 10 + size)
    topk = [rng.integers(-1, 2 * ranks, (int(rng.integers(0, 20)), 5)) for _ in range(ranks)]
    counts = count_rows(topk, 2 * ranks, size)
    for name, want in one_by_one(topk, 2 * ranks, min(size, ranks)).items():
        assert getattr(counts, name).tolist() == want, name


def test_published_figures_are_met_or_explained() -> None:
    for row in ROWS:
        for figure, value, reason in compare(row):
            off = abs(value / figure - 1)
            assert off <= TOLERANCE or reason, f"{row.name}: {value:.1f} for {figure}"
            assert off > TOLERANCE or not reason, f"{row.name}: explains what needs no reason"
            assert off < 0.15, row.name
    explained = sum(bool(reason) for row in ROWS for reason in row.reason)
    assert explained == 3


def test_a_mode_has_two_fitted_constants() -> None:
    assert [len(fields(fitted)) for fitted in (THROUGHPUT, LOW_LATENCY)] == [2, 2]


def test_fewer_bytes_take_less_time_and_a_hot_rank_takes_more() -> None:
    cluster, shape = H200, RowShape()
    even = count_rows(uniform_routing(16, 64, 4, tokens=512), 64, 8)
    hot = count_rows([np.zeros((32, 4), dtype=np.int64) for _ in range(16)], 64, 8)
    slow = throughput(hot, replace(cluster, start=0.0), shape, combine=False)
    assert slow.bound == "links"  # one rank's links take in everything
    assert slow.link_bytes == 14 * 32 * shape.sent_bytes()  # of rank 8 it is the gateway itself
    fp8, bf16 = (throughput(even, cluster, RowShape(fp8=kind), combine=False) for kind in (True, False))
    assert fp8.microseconds < bf16.microseconds
    designs = ("expert", "rank", "domain")
    sent = [low_latency(even, cluster, shape, combine=False, design=kind).nic_bytes for kind in designs]
    assert sent == sorted(sent, reverse=True)
    assert sent[0] > sent[2]
    none = count_rows([np.full((3, 2), -1)] * 4, 4, 2)
    assert throughput(none, cluster, shape, combine=True).microseconds == cluster.start


@pytest.mark.parametrize("size", [2, 4])
def test_what_stays_on_a_rank_goes_by_no_link(size: int) -> None:
    """Rank r's tokens name expert r alone; then also the next rank's, in its domain."""
    cluster, shape = Cluster("small", size, 100.0, 10.0), RowShape(hidden=1024, num_topk=2)
    own = [np.full((16, 1), rank) for rank in range(4)]
    both = [np.repeat([[rank, rank ^ 1]], 16, axis=0) for rank in range(4)]
    for design in ("expert", "rank", "domain"):
        for topk, rows in ((own, 0), (both, 16)):
            made = low_latency(count_rows(topk, 4, size), cluster, shape, combine=True, design=design)
            assert (made.nic_bytes, made.link_bytes) == (0, rows * shape.returned_bytes()), design


def test_a_sample_counts_like_the_expectation() -> None:
    """E = 256, K = 8: 5.29 distinct domains of eight at 64 ranks, 1.99 of two at 16; groups bound them."""

    def domains(ranks: int, groups: int = 1, kept: int = 1) -> float:
        topk = uniform_routing(ranks, 256, 8, num_groups=groups, kept_groups=kept)
        counts = count_rows(topk, 256, 8)
        return float(counts.per_domain.sum() / counts.tokens.sum())

    assert domains(64) == pytest.approx(5.29, abs=0.05)
    assert domains(16) == pytest.approx(1.99, abs=0.02)
    assert 3.5 < domains(64, 8, 4) <= 4
    assert domains(64, 8, 2) <= 2


def test_a_trace_is_predicted_by_its_slowest_rank(tmp_path: Path) -> None:
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=8, num_topk=2)
    for step in range(2):
        idx = torch.full((64, 2), step, dtype=torch.int64)
        writer.add(step, 0, [idx], [torch.ones(64, 2)])
    path = tmp_path / "trace.safetensors"
    writer.finish().save(path)
    table = report.trace_table(path, 4, Cluster("pair", 2, 100.0, 10.0), RowShape(hidden=1024, num_topk=2))
    assert table.startswith("2 batches")
    assert "dispatch" in table


def test_the_command(tmp_path: Path) -> None:
    picture = tmp_path / "times.png"
    base = [sys.executable, "-m", "deepep", "predict"]
    done = subprocess.run([*base, "--ranks", "16", "--plot", str(picture)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dispatch, 4096 tokens" in done.stdout
    assert picture.stat().st_size > 10_000
    wrong = subprocess.run([*base, "--ranks", "7"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "ranks: got 7" in wrong.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--nic", "0"), ("--link", "nan"), ("--start", "-1"), ("--ranks-per-domain", "0")),
        *(("--tokens", "-4"), ("--hidden", "0"), ("--hidden", "200")),
    ],
)
def test_numbers_of_which_there_are_no_times_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--ranks", "8", option, value])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


def test_shapes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed: whole parts"):
        count_rows([np.zeros((1, 1), dtype=np.int64)] * 6, 12, 4)
