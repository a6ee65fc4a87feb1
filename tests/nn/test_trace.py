"""The routing trace: what is written is read back exactly, and a file that lies is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deepep.trace import RoutingTrace, TraceError, TraceWriter

RANKS, LAYERS, EXPERTS, TOPK = 3, 2, 12, 4
STEPS = (0, 5, 6)


def batch(step: int, layer: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Uneven tokens per rank, none on rank 1 in step 5; -1 entries."""
    generator = torch.Generator().manual_seed(step * 10 + layer)
    sizes = [4 + layer, 0 if step == 5 else 3, 7]
    idx = [torch.randint(-1, EXPERTS, (t, TOPK), generator=generator) for t in sizes]
    return idx, [torch.rand(t, TOPK, generator=generator) for t in sizes]


def written(experts: int = EXPERTS) -> RoutingTrace:
    writer = TraceWriter(
        num_layers=LAYERS, num_ranks=RANKS, num_experts=experts, num_topk=TOPK, notes={"producer": "a test"}
    )
    for step in STEPS:
        for layer in range(LAYERS):
            writer.add(step, layer, *batch(step, layer))
    return writer.finish()


def test_every_batch_comes_back_in_order(tmp_path: Path) -> None:
    written().save(tmp_path / "t.safetensors")
    trace = RoutingTrace.load(tmp_path / "t.safetensors")
    assert (trace.num_steps, trace.num_layers, trace.num_ranks, trace.num_experts, trace.num_topk) == (
        3, LAYERS, RANKS, EXPERTS, TOPK,
    )  # fmt: skip
    assert trace.notes == {"producer": "a test"}
    assert len(trace) == 6
    seen = list(trace)
    assert [(b.step, b.layer) for b in seen] == [(s, y) for s in STEPS for y in range(LAYERS)]
    for b in seen:
        idx, weights = batch(b.step, b.layer)
        assert all(torch.equal(x, y) for x, y in zip(b.topk_idx, idx, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(b.topk_weights, weights, strict=True))
        assert all(x.dtype == torch.int64 for x in b.topk_idx)


def test_indices_take_two_bytes_where_they_fit() -> None:
    assert written().topk_idx.dtype == torch.int16
    assert written(experts=1 << 15).topk_idx.dtype == torch.int16
    assert written(experts=(1 << 15) + 1).topk_idx.dtype == torch.int32


def test_recorded_tensors_may_change_afterwards() -> None:
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=4, num_topk=1)
    idx, weights = torch.tensor([[3]], dtype=torch.int16), torch.tensor([[0.5]])
    writer.add(0, 0, [idx], [weights])
    idx.zero_()
    weights.zero_()
    only = next(iter(writer.finish()))
    assert only.topk_idx[0].item() == 3
    assert only.topk_weights[0].item() == 0.5


def test_resharding_keeps_tokens_and_their_order() -> None:
    whole = written().batch(0, 1)
    for ranks in (1, 2, 5, 40):
        parts = whole.reshard(ranks)
        assert len(parts.topk_idx) == len(parts.topk_weights) == ranks
        assert torch.equal(torch.cat(parts.topk_idx), torch.cat(whole.topk_idx))
        assert torch.equal(torch.cat(parts.topk_weights), torch.cat(whole.topk_weights))
        sizes = [len(p) for p in parts.topk_idx]
        assert max(sizes) - min(sizes) <= 1


def test_an_empty_trace_is_a_trace(tmp_path: Path) -> None:
    trace = TraceWriter(num_layers=2, num_ranks=2, num_experts=8, num_topk=3).finish()
    trace.save(tmp_path / "t.safetensors")
    assert list(RoutingTrace.load(tmp_path / "t.safetensors")) == []


def test_the_file_is_what_its_page_says(tmp_path: Path) -> None:
    """docs/trace.md, read with safetensors alone, as another program would."""
    written().save(tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata == {
        "format": "deepep.routing-trace", "version": "1", "num_steps": "3", "num_layers": "2",
        "num_ranks": "3", "num_experts": "12", "num_topk": "4", "producer": "a test",
    }  # fmt: skip
    assert tensors["step"].tolist() == [0, 5, 6]
    splits, (s, y, r) = tensors["row_splits"], (1, 1, 2)
    i = (s * 2 + y) * 3 + r
    rows = tensors["topk_idx"][splits[i] : splits[i + 1]]
    assert rows.tolist() == batch(5, 1)[0][2].tolist()
    page = (Path(__file__).parents[2] / "docs" / "trace.md").read_text()
    assert all(f"`{name}`" in page for name in [*tensors, "format", "version", "num_steps", "num_topk"])


def adding(*calls: tuple[int, int]) -> Callable[[], object]:
    def run() -> object:
        writer = TraceWriter(num_layers=LAYERS, num_ranks=RANKS, num_experts=EXPERTS, num_topk=TOPK)
        for step, layer in calls:
            writer.add(step, layer, *batch(step, layer))
        return writer.finish()

    return run


@pytest.mark.parametrize(
    "calls",
    [
        [(0, 1)],
        [(0, 0), (0, 0)],
        [(0, 0), (1, 1)],
        [(0, 0)],
        [(1, 0), (1, 1), (1, 0)],
        [(1, 0), (1, 1), (0, 0)],
    ],
)
def test_batches_out_of_order_are_refused(calls: list[tuple[int, int]]) -> None:
    with pytest.raises(TraceError):
        adding(*calls)()


@pytest.mark.parametrize(
    ("idx", "weights"),
    [
        ([[[EXPERTS]]], [[[1.0]]]),  # no such expert
        ([[[65536 + 1]]], [[[1.0]]]),  # would pass for expert 1 in 16 bits
        ([[[-2]]], [[[1.0]]]),
        ([[[0, 1]]], [[[1.0, 1.0]]]),  # K
        ([[[0]]], [[[1.0], [1.0]]]),  # T
        ([[[0]], [[0]]], [[[1.0]], [[1.0]]]),  # R
    ],
)
def test_a_malformed_batch_is_refused(idx: list, weights: list) -> None:
    writer = TraceWriter(num_layers=1, num_ranks=1, num_experts=EXPERTS, num_topk=1)
    with pytest.raises(TraceError):
        writer.add(0, 0, [torch.tensor(i) for i in idx], [torch.tensor(w) for w in weights])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m, t: m.update(format="other"), "not a routing trace"),
        (lambda m, t: m.update(version="2"), "version 2"),
        (lambda m, t: m.pop("num_ranks"), "lacks num_ranks"),
        (lambda m, t: m.update(num_layers="-1"), "lacks num_layers"),
        (lambda m, t: t.pop("step"), "lacks step"),
        (lambda m, t: m.update(num_steps="4"), "num_steps"),
        (lambda m, t: m.update(num_topk="5"), "num_topk"),
        (lambda m, t: m.update(num_ranks="2"), "row_splits"),
        (lambda m, t: m.update(num_experts="3"), "outside -1 to 2"),
        (lambda m, t: t.update(topk_weights=t["topk_weights"][1:].clone()), "topk_weights"),
        (lambda m, t: t.update(topk_weights=t["topk_weights"].double()), "topk_weights is torch.float64"),
        (lambda m, t: t["row_splits"][-1].add_(1), "row_splits does not run"),
        (lambda m, t: t["row_splits"][1].add_(100), "descends"),
        (lambda m, t: t["step"][0].add_(9), "ascend"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, change, complaint: str) -> None:
    path = tmp_path / "t.safetensors"
    written().save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(TraceError, match=complaint):
        RoutingTrace.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("not a trace")
    with pytest.raises(TraceError, match="safetensors"):
        RoutingTrace.load(tmp_path / "t")
    save_file({"x": torch.zeros(1)}, tmp_path / "u")
    with pytest.raises(TraceError, match="not a routing trace"):
        RoutingTrace.load(tmp_path / "u")
    with pytest.raises(OSError):
        RoutingTrace.load(tmp_path / "missing")
